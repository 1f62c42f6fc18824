"""The loss whose logits are made of part of the tokens at a time: that of all at once, and its gradients."""

from __future__ import annotations

import pytest
import torch
from test_homes import at_home
from test_streamed_retraining import SETS, records_of, trained, weights_of
from transformers import HeliumConfig, HeliumForCausalLM

import pruners
from pruners.retrain import LoRA, MaskLoRA, Trainable, finetune, held_out_loss
from pruners.retrain.batches import Batches
from pruners.run import loss
from tests import families

TOKENS = 5  # of which logits are made at once


@pytest.fixture
def few(monkeypatch):
    return lambda model, rows=1: monkeypatch.setattr(loss, "LOGITS", rows * TOKENS * model.config.vocab_size)


def batch_of(kind):
    return Batches(records_of(kind), 4, 0, families.tiny(kind).config, shuffle=False).collated(
        range(4), torch.device("cpu")
    )


@pytest.mark.parametrize("divisor", [None, 17.0])
@pytest.mark.parametrize("kind", families.TINY)
def test_pieces_give_the_loss_and_the_gradients_of_all_at_once(kind, divisor, few):
    model, batch = families.tiny(kind), batch_of(kind)
    batch["labels"][0, 3:7] = -100
    whole = loss.of(model, batch, divisor, 2.0)
    expected = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    few(model, 4)
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda _module, _args, made: shapes.append(made.shape[:2]))
    found = loss.of(model, batch, divisor, 2.0)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    length = batch["labels"].shape[1] - 1
    assert shapes == [(4, min(TOKENS, length - start)) for start in range(0, length, TOKENS)]
    for name, p in model.named_parameters():
        if expected[name] is None:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_a_loss_without_a_scale_leaves_no_gradient_behind(few):
    model = families.tiny("llama")
    few(model)
    with_grad = loss.of(model, batch_of("llama"))
    assert not with_grad.requires_grad
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert loss.of(model, batch_of("llama")) == with_grad


@pytest.mark.parametrize("kind", families.EXPERTS)
def test_a_router_adds_nothing_to_the_loss(kind, few):
    model, batch = families.tiny(kind), batch_of(kind)
    expected = loss.of(model, batch)
    model.config.output_router_logits = True
    assert model(**batch).loss > expected
    assert loss.of(model, batch) == expected
    few(model, 4)
    torch.testing.assert_close(loss.of(model, batch), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("llama", "MaskLoRA, head, norms"),
        ("opt", "ScaleLoRA, embeddings"),
        ("gpt2", "embeddings"),
        ("chatglm", "norms, biases"),
        ("mixtral", "norms, biases"),
    ],
)
def test_retraining_in_pieces_is_the_same_from_every_home(kind, what, tmp_path, few):
    model = families.tiny(kind)
    model.save_pretrained(tmp_path)
    _, whole = trained("device", kind, tmp_path, SETS[what])
    few(model, 2)
    plain, expected = trained("device", kind, tmp_path, SETS[what])
    assert expected["losses"] == pytest.approx(whole["losses"], rel=1e-4)
    held_out = held_out_loss(plain, records_of(kind), batch_size=2)
    away, found = trained("disk", kind, tmp_path, SETS[what])
    assert found == expected
    one, other = weights_of(plain), weights_of(away)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert held_out_loss(away, records_of(kind), batch_size=2) == held_out


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["llama", "opt", "bloom", "gpt_neox", "phi", "starcoder2"])
def test_backward_in_a_half_precision_model_is_not_cast_a_second_time(kind, checkpointing, tmp_path):
    """Cast again, what A and B make was added up in bfloat16, where the weights were in place, and nowhere else.

    And layer norms that were computed in float32 are so again where backward recomputes them.
    """
    families.tiny(kind).to(torch.bfloat16).save_pretrained(tmp_path)
    found = []
    for home in ("device", "disk"):
        model = at_home(home, tmp_path)
        pruners.prune(model, pruners.Magnitude(sparsity=0.5))
        what = Trainable(norms=True, adapters=MaskLoRA(rank=2))
        finetune(model, what, families.windows(kind, 6), steps=3, learning_rate=1e-2, checkpointing=checkpointing)
        found.append(weights_of(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("importance", ["vector", "element1", "element2", "element_mix"])
@pytest.mark.parametrize("kind", ["llama", "opt"])  # the latter's head is its embeddings
def test_weights_around_the_blocks_are_scored_by_whole_gradients(kind, importance, few):
    method, tokens = pruners.LLMPruner(0.25, granularity="channel", importance=importance), families.windows(kind)
    model = families.tiny(kind)
    expected = pruners.gather(model, method, tokens)
    few(model, 4)
    found = pruners.gather(model, method, tokens)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-7)


def test_a_family_that_nobody_prunes_has_a_loss_on_held_out_text(few):
    config = HeliumConfig(**families.SIZES, head_dim=8, num_key_value_heads=2)
    model = HeliumForCausalLM(config).eval()
    expected = held_out_loss(model, families.windows("llama"), batch_size=2)
    few(model)
    assert held_out_loss(model, families.windows("llama"), batch_size=2) == expected


def test_where_pieces_would_differ_all_logits_are_made_at_once(few):
    model, batch = families.tiny("opt"), batch_of("opt")
    few(model, 4)
    model.config.layerdrop = 1.0  # all blocks are left out in training, the last one among them
    model.train()
    shapes = []
    model.lm_head.register_forward_hook(lambda _module, _args, made: shapes.append(made.shape[1]))
    assert loss.of(model, batch).isfinite()
    assert shapes == [batch["labels"].shape[1]]
    plain = families.tiny("llama")
    dropping = Trainable(adapters=LoRA(rank=2, dropout=0.3, merge=True), head=True)
    settings = {"steps": 4, "learning_rate": 1e-1, "batch_size": 4, "warmup": 0}
    losses = []
    for tokens in (64, TOKENS):
        few(plain, tokens)
        model = families.tiny("llama")
        losses.append(finetune(model, dropping, families.windows("llama", 6), **settings).losses)
    assert losses[0] == losses[1]


def test_the_loss_is_float32_whatever_new_tensors_are(few):
    model = families.tiny("llama")
    few(model)
    expected = loss.of(model, batch_of("llama"))
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = loss.of(model, batch_of("llama"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)
    assert found.dtype == torch.float32
