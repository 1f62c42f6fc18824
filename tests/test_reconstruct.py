"""Block-wise reconstruction: errors fall, sparsity stays, finished blocks are not done again."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch
from conftest import tiny
from torch.testing import assert_close

import pruners
from pruners import anatomy
from pruners.retrain import Diverged, LoRA, LoRAPrune, MaskLoRA, Reconstruction, ScaleLoRA, Trainable

METHODS = [pruners.Magnitude(sparsity=0.5), pruners.Wanda(pattern="2:4"), pruners.SparseGPT(sparsity=0.5)]
WHAT = {
    "biases and norms": Trainable(biases=True, norms=True),
    "MaskLoRA and norms": Trainable(norms=True, adapters=MaskLoRA(rank=4)),
    "ScaleLoRA": Trainable(adapters=ScaleLoRA(rank=4)),
    "LoRA-Prune": Trainable(adapters=LoRAPrune(rank=4)),
    "weights": Trainable(weights=True),
}


def bits(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("what", "method"), list(zip(WHAT, cycle(METHODS), strict=False)))
def test_no_block_error_rises_and_pruned_weights_stay_pruned(kind, method, what, windows):
    model, plain = tiny(kind), tiny(kind)
    wanted = Reconstruction(WHAT[what], steps=30, learning_rate=5e-3)
    report = pruners.prune(model, method, windows, reconstruct=wanted)
    assert all(block["final"] <= block["initial"] for block in report.reconstruction)
    assert any(block["lowered"] and block["final"] < block["initial"] for block in report.reconstruction)
    assert report.achieved == pruners.prune(plain, method, windows).achieved
    first, same = (anatomy.blocks(m)[0].linears() for m in (model, plain))  # the first block's mask is the plain one
    assert all(torch.equal(first[name].weight == 0, same[name].weight == 0) for name in first)


def test_the_error_is_that_against_the_dense_block_on_sparse_inputs(windows):
    model, dense = tiny("llama grouped-query"), tiny("llama grouped-query")
    wanted = Reconstruction(Trainable(norms=True), steps=5, learning_rate=1e-3)
    report = pruners.prune(model, pruners.Magnitude(sparsity=0.5), windows, reconstruct=wanted)
    with torch.no_grad():
        states = model(windows, output_hidden_states=True).hidden_states
        dense.model.layers[0] = model.model.layers[0]
        dense.model.norm = model.model.norm = torch.nn.Identity()
        error = (model.model(windows).last_hidden_state - dense.model(windows).last_hidden_state).square().mean()
    assert len(states) == 3
    assert report.reconstruction[1]["final"] == pytest.approx(float(error), rel=1e-4)


def test_a_step_that_does_not_help_is_taken_back(kind, windows):
    model, plain = tiny(kind), tiny(kind)
    wanted = Reconstruction(Trainable(norms=True), steps=3, learning_rate=100.0, warmup=0)
    report = pruners.prune(model, pruners.Wanda(sparsity=0.5), windows, reconstruct=wanted)
    pruners.prune(plain, pruners.Wanda(sparsity=0.5), windows)
    assert not any(block["lowered"] for block in report.reconstruction)
    assert all(torch.equal(a, b) for a, b in zip(bits(model), bits(plain), strict=True))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_killed_run_goes_on_with_the_next_block(kind, method, windows, tmp_path):
    whole, broken, again = tiny(kind), tiny(kind), tiny(kind)
    wanted = Reconstruction(Trainable(norms=True, adapters=MaskLoRA(rank=2)), steps=5, learning_rate=1e-3)
    report = pruners.prune(whole, method, windows, reconstruct=wanted)

    def kill(done: int, total: int) -> None:
        if done == total:  # the first block is rebuilt by then
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pruners.prune(broken, method, windows, reconstruct=wanted, folder=tmp_path, progress=kill)
    assert len(list(tmp_path.iterdir())) == 1
    resumed = pruners.prune(again, method, windows, reconstruct=wanted, folder=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(again), strict=True))
    assert resumed.projections == report.projections
    with pytest.raises(ValueError, match="belongs to another run"):
        pruners.prune(tiny(kind, seed=1), method, windows, reconstruct=wanted, folder=tmp_path)


def test_the_batch_size_of_the_walk_changes_no_result(windows):
    wanted = Reconstruction(Trainable(norms=True), steps=5, learning_rate=1e-3, batch_size=4)
    models = [tiny("opt"), tiny("opt")]
    for model, size in zip(models, (1, 5), strict=True):
        pruners.prune(model, pruners.Magnitude(sparsity=0.5), windows, reconstruct=wanted, batch_size=size)
    assert_close(bits(models[0]), bits(models[1]), atol=1e-5, rtol=1e-4)


def test_an_error_that_is_not_finite_stops(windows):
    wanted = Reconstruction(Trainable(weights=True), steps=9, learning_rate=1e30)
    with pytest.raises(Diverged, match=r"model\.layers\.0 diverged at step"):
        pruners.prune(tiny("llama multi-head"), pruners.Magnitude(sparsity=0.5), windows, reconstruct=wanted)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        (Trainable(head=True), "have no head"),
        (Trainable(adapters=LoRA()), "adapters that can be merged"),
        (Trainable(biases=True), "selects nothing"),
    ],
)
def test_what_a_block_cannot_train_is_refused(what, says, windows):
    with pytest.raises(ValueError, match=says):
        pruners.prune(tiny("llama multi-head"), pruners.Magnitude(sparsity=0.5), windows,
                      reconstruct=Reconstruction(what, steps=2))  # fmt: skip


def test_windows_are_needed_and_enough_of_them(windows):
    wanted = Reconstruction(Trainable(norms=True), steps=2, batch_size=7)
    with pytest.raises(ValueError, match="needs calibration windows"):
        pruners.prune(tiny("opt"), pruners.Magnitude(sparsity=0.5), reconstruct=wanted)
    with pytest.raises(ValueError, match="7 windows a step; there are 6"):
        pruners.prune(tiny("opt"), pruners.Magnitude(sparsity=0.5), windows, reconstruct=wanted)
