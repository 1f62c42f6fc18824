"""The loss whose logits are made of part of the tokens at a time: that of all at once, and its gradients."""

from __future__ import annotations

import pytest
import torch
from test_homes import at_home
from test_streamed_retraining import SETS, records_of, trained, weights_of

import pruners
from pruners.retrain import MaskLoRA, Trainable, finetune, held_out_loss
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
def test_backward_in_a_half_precision_model_is_not_cast_a_second_time(checkpointing, tmp_path):
    """Cast again, what A and B make was added up in bfloat16, where the weights were in place, and nowhere else."""
    families.tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    found = []
    for home in ("device", "disk"):
        model = at_home(home, tmp_path)
        pruners.prune(model, pruners.Magnitude(sparsity=0.5))
        what = Trainable(norms=True, adapters=MaskLoRA(rank=2))
        finetune(model, what, families.windows("llama", 6), steps=3, learning_rate=1e-2, checkpointing=checkpointing)
        found.append(weights_of(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
