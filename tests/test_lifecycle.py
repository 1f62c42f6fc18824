"""What a caller has set moves no number, and is as it was afterwards."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import small_table as small
import torch
from families import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTConfig, OPTForCausalLM

import pruners
from eval.efficiency import macs
from eval.generation import generate, written
from eval.greedy import greedy
from eval.perplexity import perplexity
from pruners.retrain import Diverged, MaskLoRA, Reconstruction, Trainable, choose_rate, finetune, held_out_loss
from pruners.retrain.finetune import refuse_layerdrop
from pruners.weights.opening import open_folder

WINDOWS = torch.arange(3, 67).view(4, 16)
BFLOAT16 = {"device_type": "cpu", "dtype": torch.bfloat16}


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize(
    "method",
    [
        pruners.Wanda(0.5),
        pruners.SparseGPT(0.5),
        pruners.GBLM(0.5),
        pruners.Flap(ratio=0.3),
        pruners.LLMPruner(ratio=0.3, attention_blocks=(0, 3), mlp_blocks=(0, 3)),
    ],
    ids=lambda method: type(method).__name__,
)
def test_autocast_moves_no_weight(method):
    plain, within = tiny("llama"), tiny("llama")
    pruners.prune(plain, method, WINDOWS)
    with torch.autocast(**BFLOAT16):
        pruners.prune(within, method, WINDOWS)
        assert torch.is_autocast_enabled("cpu")
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), within.parameters(), strict=True))


def test_autocast_moves_no_loss_and_no_training():
    plain, within = tiny("llama"), tiny("llama")
    how = {"steps": 2, "learning_rate": 1e-2}
    expected = held_out_loss(plain, WINDOWS), perplexity(plain, WINDOWS, window=16).perplexity
    trained = finetune(plain, Trainable(adapters=MaskLoRA(rank=2)), WINDOWS, **how)
    with torch.autocast(**BFLOAT16):
        assert (held_out_loss(within, WINDOWS), perplexity(within, WINDOWS, window=16).perplexity) == expected
        again = finetune(within, Trainable(adapters=MaskLoRA(rank=2)), WINDOWS, **how)
    assert (again.losses, again.merging) == (trained.losses, trained.merging)


def test_a_part_that_a_caller_froze_stays_frozen():
    model = tiny("llama").train()
    model.model.layers[0].eval()
    before = modes(model)
    pruners.prune(model, pruners.Wanda(0.5), WINDOWS)
    perplexity(model, WINDOWS, window=16)
    held_out_loss(model, WINDOWS)
    finetune(model, Trainable(norms=True), WINDOWS, steps=1, learning_rate=1e-3, held_out=WINDOWS)
    assert modes(model) == before


@pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")
@pytest.mark.parametrize(
    "measure",
    [
        lambda model, tokenizer: greedy(model, tokenizer, ["Once upon a time"], 12),
        lambda model, tokenizer: generate(model, tokenizer, ["Once upon a time"], 12),
        lambda model, tokenizer: written(model, tokenizer, 2, 24).tolist(),
        lambda model, tokenizer: perplexity(model, torch.arange(3, 131), window=64).perplexity,
        lambda model, tokenizer: macs(model, 8),
    ],
    ids=["greedy", "generate", "written", "perplexity", "macs"],
)
@pytest.mark.parametrize("set_by", ["training", "autocast"])
def test_measures_are_of_the_model_as_it_predicts(measure: Callable[..., Any], set_by):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small.MODEL), AutoTokenizer.from_pretrained(small.MODEL)
    for block in model.model.layers:
        block.self_attn.attention_dropout = 0.9
    expected = measure(model.eval(), tokenizer)
    model.train(set_by == "training")
    before = modes(model)
    with torch.autocast(**BFLOAT16, enabled=set_by == "autocast"):
        assert measure(model, tokenizer) == expected
    assert modes(model) == before


def test_a_weight_too_large_for_its_dtype_is_no_infinity():
    model = tiny("llama")
    for block in model.model.layers:
        weight = block.mlp.down_proj.weight
        weight.data = 60_000 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).sign()
    with pytest.raises(ValueError, match=r"inf in model\.layers\.0\.mlp\.down_proj.*load the model in bf"):
        pruners.prune(model.half(), pruners.SparseGPT(0.5), WINDOWS)


def too_large(trainable: Trainable) -> tuple[Any, dict[str, Any]]:
    """A model and a training that ends beyond float16, with a loss that is finite."""
    model = tiny("llama").half()
    for block in model.model.layers:
        block.mlp.down_proj.weight.data.sign_().mul_(65_500)
        block.mlp.up_proj.weight.data *= 1e-5
    return model, {"steps": 2, "learning_rate": 1e5 if trainable.norms else 0.1, "clip": 1e9}


@pytest.mark.parametrize(
    ("trainable", "where"),
    [
        (Trainable(adapters=MaskLoRA(rank=2, targets=("down_proj",), alpha=1e6)), r"down_proj\.weight"),
        (Trainable(norms=True), r"norm\.weight"),
    ],
)
def test_what_was_trained_beyond_its_dtype_has_diverged(trainable, where):
    model, how = too_large(trainable)
    with pytest.raises(Diverged, match=rf"a number in model\.\S*{where} too large for torch\.float16"):
        finetune(model, trainable, WINDOWS, **how)
    assert not any("Lora" in type(module).__name__ for module in model.modules())


def test_a_rate_that_leads_beyond_float16_is_no_choice():
    model = tiny("llama").half()
    before = copy.deepcopy(model.state_dict())
    train = Trainable(norms=True)
    found = choose_rate(
        model,
        lambda rate: finetune(model, train, WINDOWS, steps=1, learning_rate=rate, warmup=0, clip=1e9),
        (1e-3, 1e5),
        WINDOWS,
    )
    assert (found.chosen, found.losses[1]) == (1e-3, None)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_reconstruction_beyond_float16_leaves_the_block_as_it_was_pruned():
    plain, model = (tiny("llama").half() for _ in range(2))
    rebuilding = Reconstruction(Trainable(adapters=MaskLoRA(rank=2)), steps=2, learning_rate=1e5)
    pruners.prune(plain, pruners.Magnitude(0.5))
    report = pruners.prune(model, pruners.Magnitude(0.5), WINDOWS, reconstruct=rebuilding)
    assert not any(block["lowered"] for block in report.reconstruction)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


def test_blocks_that_drop_out_whole_are_not_trained_one_by_one(tmp_path):
    sizes = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4}
    config = OPTConfig(**sizes, vocab_size=96, num_hidden_layers=2, max_position_embeddings=64, layerdrop=0.9)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    model = open_folder(tmp_path)
    with pytest.raises(ValueError, match=r"layerdrop is 0\.9"):
        finetune(model, Trainable(norms=True), WINDOWS, steps=2, learning_rate=1e-3)
    with pytest.raises(ValueError, match="shared by several ranks"):
        refuse_layerdrop(OPTForCausalLM(config), 2)


def test_a_model_that_returns_tuples_is_refused():
    model = tiny("llama")
    model.config.return_dict = False
    for work in (lambda: pruners.prune(model, pruners.GBLM(0.5), WINDOWS), lambda: perplexity(model, WINDOWS, 16)):
        with pytest.raises(ValueError, match=r"set model\.config\.return_dict = True"):
            work()
