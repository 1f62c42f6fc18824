"""Facts about LLM-Pruner: group scores against autograd in float64, the paper's sizes, steps, scopes, granularities."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaForCausalLM

import pruners
from pruners import anatomy, apply, checkpoint, llm_pruner
from pruners.apply import Kept
from pruners.interface import contract
from tests.conftest import tiny

BLOCKS = {"attention_blocks": (0, 2), "mlp_blocks": (0, 2)}
MODELS = {
    "LLaMA-7B": {},
    "Llama-3-8B": {"vocab_size": 128256, "intermediate_size": 14336, "num_key_value_heads": 8},
    "TinyLlama-1.1B": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_key_value_heads": 4,
    },
}


def on_meta(name):
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**MODELS[name]))


def gradients(kind, windows):
    """Per window, of the mean next-token loss, in float64."""
    model, found = tiny(kind).double(), []
    for window in windows:
        model.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(window[None]).logits[0, :-1], window[1:])
        loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters(remove_duplicate=False)})
    return model, {name: torch.stack([one[name] for one in found]) for name in found[0]}


def oracle(importance, weight, g):
    """Element by element; `g` [windows, out, inp]."""
    mean, square = g.mean(0), g.square().mean(0)
    return {
        "vector": weight * mean,
        "element1": (weight * mean).abs(),
        "element2": (weight**2 * square).abs(),
        "element_mix": (weight * mean - weight**2 * square / 2).abs(),
        "squared": (weight * mean) ** 2,
        "l1": weight.abs(),
        "l2": weight**2,
    }[importance]


@pytest.mark.parametrize(
    ("model", "fields", "size"),
    [
        ("LLaMA-7B", {"ratio": 0.25}, 5_422_977_024),
        ("LLaMA-7B", {"ratio": 0.6, "attention_blocks": (3, 31), "mlp_blocks": (3, 31)}, 3_350_188_032),
        ("Llama-3-8B", {"ratio": 0.25}, 6_612_586_496),
        ("TinyLlama-1.1B", {"ratio": 0.25, "attention_blocks": (4, 18), "mlp_blocks": (4, 18)}, 945_907_712),
    ],
)
def test_the_published_sizes_to_the_last_parameter(model, fields, size):
    dense = on_meta(model)
    report = pruners.prune(dense, pruners.LLMPruner(importance="random", **fields), None)
    assert dense.num_parameters() == report.structure.after.size.model == size


@pytest.mark.parametrize(("ratio", "billions"), [(0.2, 5.389), (0.5, 3.369)])
def test_channels_of_llama_7b_have_the_published_size(ratio, billions):
    model = on_meta("LLaMA-7B")
    pruners.prune(model, pruners.LLMPruner(importance="random", granularity="channel", ratio=ratio))
    assert round(model.num_parameters() / 1e9, 3) == billions


@pytest.mark.parametrize("importance", ["vector", "element1", "element2", "element_mix", "squared", "l1", "l2"])
def test_group_scores_equal_full_gradient_arithmetic(kind, windows, importance):
    method = pruners.LLMPruner(importance=importance, **BLOCKS)
    reference, grads = gradients(kind, windows)
    found = llm_pruner.index_scores(tiny(kind), windows, importance, method._dims(tiny(kind)))
    for name, dim in method._dims(tiny(kind)).items():
        element = oracle(importance, reference.get_parameter(name).detach(), grads[name])
        expected = element.sum(1 - dim).abs()
        assert_close(found[name].double(), expected, rtol=2e-3, atol=1e-7)


@pytest.mark.parametrize("importance", ["vector", "element1", "element_mix"])
def test_windows_that_go_through_in_parts_give_the_same_scores(kind, windows, importance, monkeypatch):
    dims = pruners.LLMPruner(importance=importance, **BLOCKS)._dims(tiny(kind))
    at_once = llm_pruner.index_scores(tiny(kind), windows, importance, dims)
    monkeypatch.setattr(llm_pruner, "TOKENS_AT_ONCE", {"cpu": 4 * windows.shape[1]})
    assert len(windows) % 4  # the last part is smaller
    in_parts = llm_pruner.index_scores(tiny(kind), windows, importance, dims)
    for name, whole in at_once.items():
        assert_close(in_parts[name], whole, rtol=2e-3, atol=1e-7)  # sums of both signs cancel


def test_the_product_over_all_blocks_has_an_order():
    """90 scores a channel, about 1e-8 each, have a product that no float64 holds."""
    draw = torch.Generator().manual_seed(0)
    scores = {str(index): 1e-8 * torch.rand(32, generator=draw) for index in range(90)}
    method = pruners.LLMPruner(granularity="channel", reduction="prod")
    found = method._channel_scores(tiny("llama multi-head"), scores)
    exact = [math.prod(Fraction(float(part[channel])) for part in scores.values()) for channel in range(32)]
    assert found.argsort().tolist() == sorted(range(32), key=exact.__getitem__)


@pytest.mark.parametrize("reduction", ["sum", "mean", "max", "prod", "first", "last"])
def test_reductions_combine_the_matrices_index_by_index(reduction):
    block = anatomy.blocks(tiny("llama multi-head"))[0]
    rows = {name: torch.rand(48, generator=torch.Generator().manual_seed(i)) for i, name in enumerate("qkvo")}
    scores = {f"{block.name}.self_attn.{name}_proj.weight": row for name, row in rows.items()}
    found = pruners.LLMPruner(reduction=reduction)._group_scores(block, "attention", scores, torch.Generator())
    q, k, v, o = (row.double() for row in rows.values())
    expected = {
        "sum": q + k + v + o,
        "mean": (q + k + v + o) / 4,
        "max": torch.stack([q, k, v, o]).amax(0),
        "prod": q * k * v * o,
        "first": q,
        "last": o,
    }[reduction]
    assert_close(found, expected.view(4, 12).sum(1))


def test_a_kv_head_is_scored_with_its_own_query_heads():
    block = anatomy.blocks(tiny("llama grouped-query"))[0]  # 6 query heads, 3 KV heads, 8 channels each
    scores = {f"{block.name}.self_attn.{name}_proj.weight": torch.zeros(48 if name in "qo" else 24) for name in "qkvo"}
    scores[f"{block.name}.self_attn.q_proj.weight"][2 * 8 : 4 * 8] = 1  # query heads 2 and 3 belong to KV head 1
    for reduction, expected in (("sum", 16), ("first", 0)):  # the group's first matrix is k here
        method = pruners.LLMPruner(reduction=reduction)
        found = method._group_scores(block, "attention", scores, torch.Generator())
        assert found.tolist() == [0, expected, 0]


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("importance", ["element1", "l2"])
def test_the_lowest_scored_groups_go(kind, windows, scope, importance):
    method = pruners.LLMPruner(ratio=0.5, importance=importance, scope=scope, **BLOCKS)
    model = tiny(kind)
    by_index = llm_pruner.index_scores(model, windows, importance, method._dims(model))
    scores = [method._scores(block, Kept.all(block), by_index, torch.Generator()) for block in anatomy.blocks(model)]
    kept = method.choose(model, windows, {})
    pools = [(score[unit], keep[unit]) for score, keep in zip(scores, kept, strict=True) for unit in apply.KINDS]
    if scope == "global":
        pools = [tuple(torch.cat(part) for part in zip(*pools, strict=True))]
        assert int((~pools[0][1]).sum()) == len(pools[0][1]) - int(len(pools[0][1]) * 0.5)
    for score, stay in pools:
        assert score[~stay].max() <= score[stay].min()


def test_blocks_outside_the_ranges_stay_whole(kind, windows):
    report = pruners.prune(
        tiny(kind), pruners.LLMPruner(ratio=0.5, attention_blocks=(1, 2), mlp_blocks=(0, 1)), windows
    )
    (first, second), (dense, _) = report.structure.after.blocks, report.structure.before.blocks
    assert first.heads == dense.heads > second.heads
    assert first.channels < dense.channels == second.channels
    assert "heads of blocks 1..1 and of the channels of blocks 0..0" in str(report)


@pytest.mark.parametrize("steps", [2, 3])
@pytest.mark.parametrize("scope", ["local", "global"])
def test_steps_reach_the_same_size_and_score_anew(kind, windows, steps, scope):
    fields = {"ratio": 0.5, "scope": scope, **BLOCKS}
    once, many = tiny(kind), tiny(kind)
    pruners.prune(once, pruners.LLMPruner(**fields), windows)
    pruners.prune(many, pruners.LLMPruner(steps=steps, **fields), windows, cut=False)
    cut = tiny(kind)
    report = pruners.prune(cut, pruners.LLMPruner(steps=steps, **fields), windows)
    assert_close(many(windows).logits, cut(windows).logits, rtol=1e-4, atol=1e-5)
    if scope == "local":
        assert report.structure.after.size.model == once.num_parameters()


def test_ranges_may_be_lists_and_are_the_same_method():
    lists = pruners.LLMPruner(attention_blocks=[4, 26], mlp_blocks=[4, 26])
    assert lists == pruners.LLMPruner(attention_blocks=(4, 26), mlp_blocks=(4, 26))
    assert hash(lists) == hash(pruners.LLMPruner(attention_blocks=(4, 26), mlp_blocks=(4, 26)))


def test_random_scores_come_from_the_seed(kind):
    def left(seed):
        model = tiny(kind)
        pruners.prune(model, pruners.LLMPruner(ratio=0.5, importance="random", seed=seed, **BLOCKS))
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(left(1), left(1))
    assert not torch.equal(left(1), left(2))


@pytest.mark.parametrize("importance", ["vector", "element1", "element2", "element_mix", "l2", "random"])
def test_channels_of_the_residual_stream_go_from_the_whole_model(kind, windows, importance):
    model = tiny(kind)
    method = pruners.LLMPruner(ratio=0.25, importance=importance, granularity="channel")
    report = pruners.prune(model, method, windows)
    assert model.config.hidden_size == report.structure.after.hidden_size == 36
    assert model.num_parameters() == report.structure.after.size.model
    assert model.get_input_embeddings().weight.shape == (96, 36)
    assert model(windows).logits.isfinite().all()


@pytest.mark.parametrize("kind", ["llama multi-head", "llama grouped-query"])
def test_masked_channels_of_the_residual_stream_equal_cut_ones(kind, windows):
    method = pruners.LLMPruner(ratio=0.3, granularity="channel")
    masked, cut = tiny(kind), tiny(kind)
    told, report = pruners.prune(masked, method, windows, cut=False), pruners.prune(cut, method, windows)
    assert told.structure == report.structure
    assert_close(masked(windows).logits, cut(windows).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reopened", [False, True], ids=["at once", "opened again"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "smollm3"])
def test_masked_channels_are_masked_again_and_cut_out(family, reopened, tmp_path):
    tokens, method = contract.windows(family), pruners.LLMPruner(ratio=0.5, granularity="channel", importance="l2")
    cut, masked = contract.tiny(family), contract.tiny(family)
    pruners.prune(cut, method)
    expected = cut(tokens).logits
    pruners.prune(masked, method, cut=False)
    if reopened:
        masked, _ = checkpoint.load(checkpoint.save(masked, None, tmp_path / "masked"))
    steps = ((method, False), (replace(method, ratio=0.25), True), (replace(method, ratio=0.3), True))
    for again, how in steps:  # a quarter of 32 channels, and 8 of the 24 that stay
        pruners.prune(masked, again, cut=how)
        assert_close(masked(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    assert masked.config.hidden_size == 16
    assert not hasattr(masked.config, "masked_channels")


@pytest.mark.parametrize("importance", ["vector", "element1", "l2"])
def test_channel_scores_equal_full_gradient_arithmetic(kind, windows, importance):
    method = pruners.LLMPruner(granularity="channel", importance=importance)
    reference, grads = gradients(kind, windows)
    expected = torch.zeros(48).double()
    for name, dim in apply.residual(reference).items():
        if name.endswith("bias"):
            continue
        element = oracle(importance, reference.get_parameter(name).detach(), grads[name]).movedim(dim, 0)
        whole = importance == "vector" and "embed" not in name
        expected += element.reshape(48, -1).sum(1).abs() if whole else element.abs().reshape(48, -1).sum(1)
    gathered = pruners.gather(tiny(kind), method, windows)
    assert_close(method._channel_scores(tiny(kind), gathered), expected, rtol=1e-3, atol=1e-6)


def test_a_tied_matrix_counts_as_embedding_and_as_head():
    model = tiny("opt")
    scores = llm_pruner.index_scores(model, None, "l2", pruners.LLMPruner(granularity="channel")._dims(model))
    assert torch.equal(scores["model.decoder.embed_tokens.weight"], scores["lm_head.weight"])


@pytest.mark.parametrize("cut", [True, False])
def test_the_first_blocks_stay(kind, windows, cut):
    model, one = tiny(kind), tiny(kind)
    report = pruners.prune(model, pruners.LLMPruner(ratio=0.5, granularity="layer"), cut=cut)
    apply.keep_first(one, 1)
    assert_close(model(windows).logits, one(windows).logits)
    assert report.structure.after.size.model == one.num_parameters()
    assert len(report.structure.after.blocks) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"importance": "element3"}, "Did you mean element"),
        ({"reduction": "median"}, "Unknown reduction"),
        ({"granularity": "head"}, "Unknown granularity"),
        ({"scope": "lokal"}, "Did you mean local"),
        ({"steps": 0}, "1 or more"),
        ({"mlp_blocks": (1, 2, 3)}, r"mlp_blocks is the first block .* got \(1, 2, 3\)"),
        ({"steps": 2, "granularity": "channel"}, "unless granularity is 'block'"),
    ],
)
def test_hyperparameters_out_of_range(fields, said):
    with pytest.raises(ValueError, match=said):
        pruners.LLMPruner(**fields)


@pytest.mark.parametrize("blocks", [(4, 30), (-1, 2), (2, 1), (0, 3)])
@pytest.mark.parametrize("name", ["attention_blocks", "mlp_blocks"])
def test_ranges_outside_the_model_are_refused(kind, windows, name, blocks):
    with pytest.raises(ValueError, match=rf"{name}=\({blocks[0]}, {blocks[1]}\) is not a half-open range .* 2 blocks"):
        pruners.prune(tiny(kind), pruners.LLMPruner(**{**BLOCKS, name: blocks}), windows)


@pytest.mark.parametrize("granularity", ["channel", "layer"])
def test_targets_hold_for_every_granularity(kind, windows, granularity):
    model = tiny(kind)
    method = pruners.LLMPruner(target_parameters=0.3, target_of="model", granularity=granularity)
    report = pruners.prune(model, method, windows)
    unit = {"channel": 1 / 48, "layer": 0.5}[granularity]
    assert report.structure.achieved_shares["model"] == pytest.approx(0.3, abs=unit / 2 + 1e-3)
    assert report.structure.after.size.model == model.num_parameters()
