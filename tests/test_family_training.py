"""Retraining, adapters and reconstruction on a tiny model of every family."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial

import pytest
import torch

import pruners
from pruners import anatomy
from pruners.retrain import LoRA, LoRAPrune, MaskLoRA, Reconstruction, ScaleLoRA, Trainable, finetune
from tests.families import DENSE, TINY, tiny, windows

FUSED = ("phi3", "gpt2", "falcon", "mixtral", "qwen3_moe")  # matrices that are no nn.Linear of their own


@pytest.mark.parametrize("kind", TINY)
def test_full_retraining_trains_every_parameter(kind):
    """Routers of experts and norms of more dimensions than one among them."""
    model = tiny(kind)
    with model_trained(model, Trainable.full()) as attached:
        assert set(attached.tensors) == {name for name, _ in model.named_parameters()}
        assert attached.share == 1


def test_norms_of_every_shape_are_norms():
    model = tiny("cohere: q/k norm")
    with model_trained(model, Trainable(norms=True)) as attached:
        assert set(attached.tensors) == {name for name, _ in model.named_parameters() if "norm" in name}


@contextmanager
def model_trained(model, trainable):
    attached = trainable.attach(model)
    try:
        yield attached
    finally:
        attached.detach()


@pytest.mark.parametrize("kind", FUSED)
def test_pruned_weights_stay_zero_in_retraining(kind):
    model = tiny(kind)
    pruners.prune(model, pruners.Magnitude(sparsity=0.5))
    held = {name: linear.weight == 0 for b in anatomy.blocks(model) for name, linear in named(b)}
    before = {name: linear.weight.clone() for b in anatomy.blocks(model) for name, linear in named(b)}
    finetune(model, Trainable.full(), windows(kind), steps=2, learning_rate=1e-2)
    for block in anatomy.blocks(model):
        for name, linear in named(block):
            assert torch.equal(linear.weight == 0, held[name])
            assert not torch.equal(linear.weight, before[name])


def named(block):
    return [(f"{block.name}.{name}", linear) for name, linear in block.linears().items()]


@pytest.mark.parametrize("adapters", [MaskLoRA, ScaleLoRA, LoRAPrune, partial(LoRA, merge=True)], ids=str)
@pytest.mark.parametrize("kind", [kind for kind in DENSE if kind != "gpt2"])  # whose layers take none
def test_adapters_train_in_every_family(kind, adapters):
    """Also where a projection has got a bias, to whose output Falcon adds in place."""
    model = tiny(kind)
    pruners.prune(model, pruners.Flap(ratio=0.3), windows(kind))
    report = finetune(
        model, Trainable(adapters=adapters(rank=2)), windows(kind), steps=8, learning_rate=1e-2, batch_size=4
    )
    assert report.losses[-1] < report.losses[0]


@pytest.mark.parametrize("kind", FUSED)
def test_blocks_are_rebuilt(kind):
    model, steps = tiny(kind), Reconstruction(Trainable(norms=True, biases=True), steps=20, learning_rate=1e-2)
    report = pruners.prune(model, pruners.Wanda(sparsity=0.5), windows(kind), reconstruct=steps)
    assert report.achieved == pytest.approx(0.5, abs=0.02)
    assert all(block["final"] < block["initial"] for block in report.reconstruction)


@pytest.mark.parametrize(("kind", "name"), [("gpt2", "attn.c_attn"), ("mixtral", "mlp.experts.0.gate")])
def test_adapters_beside_what_is_no_linear_layer_are_refused(kind, name):
    with pytest.raises(ValueError, match=rf"{name} is not a torch\.nn\.Linear, which adapters need; train biases"):
        Trainable(adapters=LoRA(2)).attach(tiny(kind))
