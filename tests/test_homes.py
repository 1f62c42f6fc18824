"""Weights away from home, in CPU memory or in a checkpoint's files: part by part, and the same numbers to the bit."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM

import pruners
from eval.perplexity import perplexity
from pruners import anatomy, apply, checkpoint
from pruners.apply import Kept
from pruners.run import loss
from pruners.weights import homes, opening, sources, structure, sweep
from tests import families


@pytest.fixture(params=families.TINY)
def family(request):
    return request.param


def saved(kind, folder, dtype=torch.float32):
    model = families.tiny(kind).to(dtype)
    model.save_pretrained(folder, max_shard_size="20KB")
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def test_a_model_on_the_disk_computes_what_it_computes_in_memory(family, tmp_path):
    dtype = torch.bfloat16
    plain, tokens = saved(family, tmp_path, dtype), families.windows(family)
    model = opening.open_folder(tmp_path)
    assert model.dtype == dtype
    assert all(p.untyped_storage().nbytes() <= 8 for p in model.parameters())
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert all(p.untyped_storage().nbytes() <= 8 for p in model.parameters())
    assert homes.of(model).sweeps == 2
    assert model.num_parameters() == plain.num_parameters()


KIND = "llama"
BLOCKS = {"attention_blocks": (0, 3), "mlp_blocks": (0, 3)}
METHODS = {
    **{name: pruners.METHODS[name](sparsity=0.5) for name in ("magnitude", "wanda", "sparsegpt", "gblm", "random")},
    "gradient, l1": pruners.Gradient(0.5, norm="l1"),
    "wanda 2:4": pruners.Wanda(pattern="2:4"),
    "flap": pruners.Flap(ratio=0.4),
    "flap UL-UM": pruners.Flap(ratio=0.4, structure="UL-UM"),
    "wanda_sp": pruners.WandaSP(ratio=0.4),
    "magnitude_sp": pruners.MagnitudeSP(ratio=0.4),
    **{
        f"llm_pruner {importance}": pruners.LLMPruner(ratio=0.4, importance=importance, **BLOCKS)
        for importance in ("vector", "element1", "element2", "element_mix", "l1", "l2", "random")
    },
    "llm_pruner in steps": pruners.LLMPruner(ratio=0.5, steps=2, **BLOCKS),
    "llm_pruner layers": pruners.LLMPruner(ratio=0.4, granularity="layer"),
}


def same_weights(model, plain):
    found = {name: p.detach().clone() for part in homes.each(model) for name, p in part.items()}
    expected = dict(plain.named_parameters())
    return found.keys() == expected.keys() and all(torch.equal(found[name], p) for name, p in expected.items())


def at_home(home, folder):
    """The saved model with its weights there."""
    if home == "disk":
        return opening.open_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    if home == "host":
        homes.settle(model, sources.Memory(model), "cpu")
    return model


@pytest.mark.parametrize("home", ["host", "disk"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cut", [True, False])
def test_every_method_prunes_the_same_from_every_home(home, method, cut, tmp_path):
    if not cut and isinstance(METHODS[method], pruners.Unstructured):
        pytest.skip("cut is for structured methods")
    plain, tokens = saved(KIND, tmp_path), families.windows(KIND, 5)
    model = at_home(home, tmp_path)
    expected = pruners.prune(plain, METHODS[method], tokens, batch_size=2, cut=cut).to_dict()
    found = pruners.prune(model, METHODS[method], tokens, batch_size=3, cut=cut).to_dict()
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert same_weights(model, plain)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


@dataclass(frozen=True)
class Interrupted(pruners.MagnitudeSP):
    """All heads of the first block go, and a key is pressed at the second."""

    def choose(self, *args, **how):
        kept = super().choose(*args, **how)
        kept[0]["attention"][:] = False
        return kept

    def repairs(self, block, kept, dense):
        if block.index == 1:
            raise KeyboardInterrupt
        linear = block.linear(block.family.outward)
        return [(linear, torch.ones(linear.out_features))]


@pytest.mark.parametrize("before", ["dense", "magnitude_sp", "llm_pruner layers"])
@pytest.mark.parametrize("family", ["llama", "olmo2", "bloom"], indirect=True)
def test_a_cut_that_is_interrupted_leaves_the_model_of_the_folder(family, before, tmp_path):
    plain, tokens = saved(family, tmp_path / "dense"), families.windows(family)
    model = opening.open_folder(tmp_path / "dense")
    told = model.config.to_dict()
    if before != "dense":
        pruners.prune(model, METHODS[before])
    with pytest.raises(KeyboardInterrupt):
        pruners.prune(model, Interrupted(0.4))
    assert (type(model), model.config.to_dict()) == (type(plain), told)
    assert same_weights(model, plain)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    for subject in (plain, model):
        pruners.prune(subject, pruners.MagnitudeSP(0.4))
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    opened, _ = checkpoint.load(checkpoint.save(model, None, tmp_path / "out"))
    assert same_weights(opened, plain)


@pytest.mark.parametrize("before", ["magnitude", "magnitude_sp"])
def test_a_pruning_that_is_broken_off_leaves_what_was_set_since(before, tmp_path):
    saved("bloom", tmp_path)
    model, seen = opening.open_folder(tmp_path), []
    pruners.prune(model, METHODS[before])
    attention = anatomy.blocks(model)[0].attention
    attention.register_forward_pre_hook(lambda *_: seen.append(1))
    model.note = "mine"
    model.train()
    with pytest.raises(KeyboardInterrupt):
        pruners.prune(model, Interrupted(0.4))
    assert (model.note, model.training) == ("mine", True)
    with torch.inference_mode():
        model(families.windows("bloom"))
    assert seen == [1]


def test_how_a_model_in_memory_was_made_is_not_remembered(tmp_path):
    for home in ("host", "disk"):
        saved(KIND, tmp_path / home)
        assert (homes.of(at_home(home, tmp_path / home)).uncut is None) == (home == "host")


def made_of(model):
    """Every attribute of every module, hooks and configurations included."""
    return [
        (one, type(one), {name: dict(v) if isinstance(v, dict) else v for name, v in vars(one).items()})
        for one in model.modules()
    ]


@pytest.mark.parametrize("family", sorted(families.TINY.keys() - families.EXPERTS), indirect=True)
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "cut"])
@pytest.mark.parametrize("remove", [apply.cut, apply.zero])
def test_what_cutting_sets_is_put_back(family, dense, remove):
    model = families.tiny(family)
    if not dense:
        pruners.prune(model, pruners.MagnitudeSP(0.4))
    attention = anatomy.blocks(model)[0].attention
    model._weight_conversions, attention.forward = [], attention.forward  # as transformers and accelerate may
    before, put_back = made_of(model), structure.uncut(model)
    for block in anatomy.blocks(model):
        keep = Kept.all(block)
        keep.mlp[0], keep.attention[: 1 if block.index else None] = False, False
        remove(block, keep)
    if remove is apply.cut:
        apply.describe(model)
    put_back()
    assert made_of(model) == before


@pytest.mark.parametrize("family", ["llama", "opt"], indirect=True)
@pytest.mark.parametrize("granularity", ["layer", "channel"])
def test_what_goes_of_the_whole_model_is_put_back(family, granularity):
    model = families.tiny(family)
    before, put_back = made_of(model), structure.uncut(model)
    pruners.prune(model, pruners.LLMPruner(0.5, granularity=granularity), families.windows(family))
    put_back()
    assert made_of(model) == before


@pytest.mark.parametrize("method", ["gblm", "flap"])
def test_every_family_prunes_the_same_from_the_disk(family, method, tmp_path):
    if family in families.EXPERTS and method == "flap":
        pytest.skip("no structured method cuts experts; see test_experts_away.py")
    plain, tokens = saved(family, tmp_path), families.windows(family)
    model = opening.open_folder(tmp_path)
    for subject, size in ((plain, 4), (model, 2)):
        pruners.prune(subject, METHODS[method], tokens, batch_size=size)
    assert same_weights(model, plain)


def test_perplexity_reads_the_weights_once(family, tmp_path):
    plain, tokens = saved(family, tmp_path), families.windows("any", 12).flatten()
    model = opening.open_folder(tmp_path)
    try:
        expected = perplexity(plain, tokens, 16, batch_size=5)
    except ValueError as error:
        with pytest.raises(ValueError, match=re.escape(str(error))):
            perplexity(model, tokens, 16, batch_size=5)
        return
    assert perplexity(model, tokens, 16, batch_size=5) == expected
    assert homes.of(model).sweeps <= 3  # of the text, of a few tokens to see what follows the head, of the first block


def test_a_sweep_lets_go_of_each_block(tmp_path):
    saved(KIND, tmp_path)
    model, tokens = opening.open_folder(tmp_path), families.windows(KIND, 2)
    graphs = []
    for block in anatomy.modules(model):
        block.register_forward_hook(lambda _, __, made: graphs.append(made.requires_grad))
    for _ in sweep.over(model, [tokens, tokens]):  # as a scorer does, which forbids gradients in the loop alone
        pass
    assert len(graphs) > 2
    assert not any(graphs)  # which would hold its weights


@pytest.mark.parametrize(
    "family", ["llama", "opt", "bloom", "falcon: multi-query", "gpt2", "chatglm", *families.EXPERTS]
)
def test_a_pruned_model_is_saved_shard_by_shard(tmp_path, family):
    plain, model = saved(family, tmp_path / "dense"), opening.open_folder(tmp_path / "dense")
    for place, subject in (("plain", plain), ("disk", model)):
        pruners.prune(subject, pruners.Magnitude(0.5) if family in families.EXPERTS else pruners.MagnitudeSP(0.5))
        checkpoint.save(subject, None, tmp_path / place, max_shard_size="20KB")
    kept, alike = (
        {p.name for p in (tmp_path / place).iterdir() if "-of-" not in p.name} for place in ("plain", "disk")
    )
    assert kept == alike
    assert json.loads((tmp_path / "disk" / "config.json").read_text()) == json.loads(
        (tmp_path / "plain" / "config.json").read_text()
    )
    again, _ = checkpoint.load(tmp_path / "disk")
    assert same_weights(opening.open_folder(tmp_path / "disk"), again)
    expected, _ = checkpoint.load(tmp_path / "plain")
    assert same_weights(again, expected)


@pytest.mark.parametrize("kind", ["llama", "chatglm"])
@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_the_loss_in_pieces_gives_the_same_gradients(kind, norm, tmp_path, monkeypatch):
    plain, tokens = saved(kind, tmp_path), families.windows(kind)
    expected = pruners.gather(plain, pruners.Gradient(0.5, norm=norm), tokens)
    monkeypatch.setattr(loss, "LOGITS", 5 * plain.config.vocab_size)
    found = pruners.gather(opening.open_folder(tmp_path), pruners.Gradient(0.5, norm=norm), tokens)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
