"""The choice of a learning rate by text that was kept back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conftest import tiny

import pruners
from pruners import checkpoint
from pruners.retrain import (
    Diverged,
    LoRA,
    LoRAPrune,
    MaskLoRA,
    RateChoice,
    Reconstruction,
    Trainable,
    choose_rate,
    finetune,
    held_out_loss,
)
from pruners.weights import opening

RATES = (1e-2, 1e-4, 1e-3)


def pruned(kind: str):
    model = tiny(kind)
    pruners.prune(model, pruners.Magnitude(sparsity=0.5))
    return model


def described(model) -> list[Any]:
    """What a restored model must have as before: parameters by name, their bits and flags, modes and the tie."""
    named = [(name, p.detach().clone(), p.requires_grad, p.dtype) for name, p in model.named_parameters()]
    return [named, [(name, type(m), m.training) for name, m in model.named_modules()], model.config.to_dict()]


def same(one: list[Any], other: list[Any]) -> bool:
    tensors = zip(one[0], other[0], strict=True)
    return one[1:] == other[1:] and all(a[0] == b[0] and torch.equal(a[1], b[1]) and a[2:] == b[2:] for a, b in tensors)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("llama grouped-query", Trainable(norms=True, adapters=MaskLoRA(rank=2))),
        ("opt", Trainable(adapters=LoRA(rank=2))),
        ("llama grouped-query", Trainable(adapters=LoRAPrune(rank=2))),
        ("opt", Trainable(head=True)),
        ("opt", Trainable.full()),
    ],
    ids=["MaskLoRA", "LoRA that stays", "LoRA-Prune", "head", "full"],
)
def test_the_choice_is_that_of_trying_each_by_hand(kind, what, windows):
    text, kept = windows[:4], windows[4:]
    asked = {"steps": 3, "micro_batch_size": 1}

    def by_hand(rate: float) -> float:
        model = pruned(kind)
        finetune(model, what, text, learning_rate=rate, **asked)
        return held_out_loss(model, kept)[0]

    model = pruned(kind)
    before, loss = described(model), held_out_loss(model, kept)[0]
    choice = choose_rate(model, lambda rate: finetune(model, what, text, learning_rate=rate, **asked), RATES, kept)
    assert choice.rates == tuple(sorted(RATES))
    assert choice.losses == tuple(by_hand(rate) for rate in sorted(RATES))
    assert (choice.before, choice.chosen) == (loss, min(choice.rates, key=by_hand))
    assert same(described(model), before)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == (kind == "opt")
    again = pruned(kind)
    for trained in (model, again):
        finetune(trained, what, text, learning_rate=1e-3, **asked)
    assert same(described(model), described(again))


def test_a_reconstruction_is_tried_from_the_dense_model(windows):
    model = tiny("opt").train()
    before, kept = described(model), windows[4:]

    def attempt(rate: float) -> None:
        wanted = Reconstruction(Trainable(norms=True), steps=4, learning_rate=rate)
        pruners.prune(model, pruners.Wanda(sparsity=0.5), windows[:4], reconstruct=wanted)

    choice = choose_rate(model, attempt, RATES, kept)
    assert same(described(model), before)
    assert len(set(choice.losses)) == 3


@pytest.mark.parametrize("home", ["device", "disk"])
def test_attempts_that_cut_are_tried_from_the_dense_model(home, windows, tmp_path):
    tiny("llama grouped-query").save_pretrained(tmp_path)

    def opened() -> Any:
        return opening.open_folder(tmp_path) if home == "disk" else checkpoint.load(tmp_path)[0]

    def attempt(rate: float, model: Any) -> None:
        pruners.prune(model, pruners.Flap(ratio=0.4), windows[:4])
        finetune(model, Trainable(norms=True, biases=True), windows[:4], steps=2, learning_rate=rate)

    def by_hand(rate: float) -> float:
        attempt(rate, model := opened())
        return held_out_loss(model, windows[4:])[0]

    model = opened()
    expected = model(windows).logits
    kind, before = type(model), described(model)
    choice = choose_rate(model, lambda rate: attempt(rate, model), RATES, windows[4:])
    assert choice.losses == tuple(by_hand(rate) for rate in sorted(RATES))
    assert type(model) is kind
    assert torch.equal(model(windows).logits, expected)
    if home == "device":
        assert same(described(model), before)


def test_a_rate_that_diverges_is_no_choice(windows):
    model, told = pruned("opt"), []
    before = described(model)

    def attempt(rate: float) -> None:
        if rate == 2.0:
            model.lm_head.weight.data.fill_(math.inf)
        finetune(model, Trainable.full(), windows[:4], steps=60, learning_rate=50.0 * rate)

    rates, kept = (1.0, 1e-5, 2.0), windows[4:]
    choice = choose_rate(model, attempt, rates, kept, progress=lambda *at: told.append(at))
    assert choice.losses[1:] == (None, None)
    assert (choice.chosen, choice.at_edge) == (1e-5, True)
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert same(described(model), before)
    with pytest.raises(Diverged, match=r"every rate of the grid, \(1\.0, 2\.0\); try lower ones"):
        choose_rate(model, attempt, (2.0, 1.0), kept)
    assert same(described(model), before)


def test_an_attempt_that_fails_leaves_the_model_as_it_was(windows):
    model = pruned("opt")
    before = described(model)

    def attempt(rate: float) -> None:
        finetune(model, Trainable(head=True), windows, steps=2, learning_rate=rate)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        choose_rate(model, attempt, RATES, windows)
    assert same(described(model), before)


@pytest.mark.parametrize(
    ("rates", "error", "says"),
    [
        ((), ValueError, "at least one rate, and none twice"),
        ((1e-3, 1e-3), ValueError, "at least one rate, and none twice"),
        ((1e-3, -1.0), ValueError, "a tuple of learning rates, each positive and finite"),
        (1e-3, TypeError, "a tuple of learning rates, each positive and finite"),
        ((math.nan,), ValueError, "a tuple of learning rates"),
    ],
)
def test_what_is_no_grid_is_refused_before_anything_is_tried(rates, error, says, windows):
    with pytest.raises(error, match=says):
        choose_rate(tiny("opt"), lambda rate: pytest.fail("tried"), rates, windows)


def test_text_that_is_none_is_refused_before_anything_is_tried():
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        choose_rate(tiny("opt"), lambda rate: pytest.fail("tried"), RATES, torch.full((1, 8), 96))


def test_edges_and_help_are_told():
    inner = RateChoice((1e-4, 1e-3, 1e-2), (3.0, 2.0, None), before=2.5, chosen=1e-3)
    assert (inner.at_edge, inner.helps) == (False, True)
    useless = RateChoice((1e-4, 1e-3), (3.0, 4.0), before=2.5, chosen=1e-4)
    assert useless.to_dict() == {
        "rates": (1e-4, 1e-3), "losses": (3.0, 4.0), "before": 2.5, "chosen": 1e-4, "at_edge": True, "helps": False,
    }  # fmt: skip
