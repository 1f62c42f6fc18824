"""What a caller has set moves no number, and is as it was afterwards."""

from __future__ import annotations

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
from pruners.retrain import MaskLoRA, Trainable, finetune, held_out_loss
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
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.down_proj.* is too large for torch\.float16"):
        pruners.prune(model.half(), pruners.SparseGPT(0.5), WINDOWS)


@pytest.mark.parametrize(
    ("trainable", "said"),
    [
        (Trainable(adapters=MaskLoRA(rank=2, targets=("down_proj",), alpha=1e6)), "with its adapter is too large"),
        (Trainable(norms=True), "A trained parameter is too large for torch.float16"),
    ],
)
def test_what_was_trained_beyond_its_dtype_is_said(trainable, said):
    model = tiny("llama").half()
    for block in model.model.layers:
        block.mlp.down_proj.weight.data.sign_().mul_(65_500)
        block.mlp.up_proj.weight.data *= 1e-5
    with pytest.raises(ValueError, match=said):
        finetune(model, trainable, WINDOWS, steps=2, learning_rate=1e5 if trainable.norms else 0.1, clip=1e9)
    assert all("adapter" not in type(module).__name__.lower() for module in model.modules())


def test_blocks_that_drop_out_whole_are_not_trained_one_by_one(tmp_path):
    sizes = {"hidden_size": 32, "ffn_dim": 48, "word_embed_proj_dim": 32, "num_attention_heads": 4}
    config = OPTConfig(**sizes, vocab_size=96, num_hidden_layers=2, max_position_embeddings=64, layerdrop=0.9)
    OPTForCausalLM(config).save_pretrained(tmp_path)
    model = open_folder(tmp_path)
    with pytest.raises(ValueError, match=r"layerdrop is 0\.9"):
        finetune(model, Trainable(norms=True), WINDOWS, steps=2, learning_rate=1e-3)


def test_a_model_that_returns_tuples_is_refused():
    model = tiny("llama")
    model.config.return_dict = False
    for work in (lambda: pruners.prune(model, pruners.GBLM(0.5), WINDOWS), lambda: perplexity(model, WINDOWS, 16)):
        with pytest.raises(ValueError, match=r"set model\.config\.return_dict = True"):
            work()
