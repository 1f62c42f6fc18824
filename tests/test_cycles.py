"""Prune and retrain in cycles."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conftest import tiny
from test_finetune import bits

import pruners
from pruners import anatomy
from pruners.retrain import LoRA, MaskLoRA, Trainable
from pruners.retrain.cycles import iterate, magnitudes

PEFT = Trainable(biases=True, norms=True, adapters=MaskLoRA(rank=4))
TRAINING = {"steps": 6, "learning_rate": 2e-3}


def test_each_cycle_removes_the_same_share_of_what_is_left():
    kept = [1.0, *(1 - method.sparsity for method in magnitudes(0.784, 3))]
    assert [after / before for before, after in pairwise(kept)] == pytest.approx([0.6] * 3)


@pytest.mark.parametrize("trainable", [PEFT, Trainable.full(), Trainable(head=True)], ids=["PEFT", "full", "head"])
def test_masks_only_grow(kind, trainable, windows):
    model, zeros = tiny(kind), []
    for methods in ([method] for method in magnitudes(0.6, 3)):
        (cycle,) = iterate(model, methods, trainable, windows, **TRAINING)
        assert cycle.sparsity == pytest.approx(methods[0].sparsity, abs=2e-3)
        blocks = model.get_submodule(anatomy.family(model).blocks)
        zeros.append({name: p == 0 for name, p in blocks.named_parameters() if p.ndim == 2})
    for earlier, later in pairwise(zeros):
        assert all((later[name] >= earlier[name]).all() for name in earlier)


@pytest.mark.parametrize("trainable", [PEFT, Trainable(norms=True, head=True)], ids=["PEFT", "head"])
@pytest.mark.parametrize("killed_at", [3, 8])
def test_a_killed_run_goes_on_in_its_cycle(kind, trainable, killed_at, windows, tmp_path):
    whole, broken, again, calls = tiny(kind), tiny(kind), tiny(kind), []
    asked = {"save_every": 2, **TRAINING}
    cycles = iterate(whole, magnitudes(0.6, 2), trainable, windows, **asked)

    def kill(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == killed_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        iterate(broken, magnitudes(0.6, 2), trainable, windows, folder=tmp_path, progress=kill, **asked)
    resumed = iterate(again, magnitudes(0.6, 2), trainable, windows, folder=tmp_path, **asked)
    assert [cycle.retrained.losses for cycle in resumed] == [cycle.retrained.losses for cycle in cycles]
    assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(again), strict=True))


def test_what_would_shrink_a_mask_is_refused(windows):
    with pytest.raises(ValueError, match="would fill what was pruned"):
        iterate(tiny("opt"), magnitudes(0.5, 2), Trainable(adapters=LoRA(merge=True)), windows, **TRAINING)
    methods = [pruners.Magnitude(sparsity=0.6), pruners.SparseGPT(pattern="2:4")]
    with pytest.raises(ValueError, match="that an earlier cycle pruned"):
        iterate(tiny("opt"), methods, PEFT, windows, windows=windows, **TRAINING)
    with pytest.raises(ValueError, match="at least one cycle"):
        magnitudes(0.5, 0)
