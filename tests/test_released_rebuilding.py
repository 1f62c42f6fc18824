"""Reconstruction by PERP's released arithmetic, against formulas in plain torch, block after block."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close

import pruners
from pruners import anatomy
from pruners.retrain import LoRAPrune, MaskLoRA, Reconstruction, ScaleLoRA, Trainable

STEPS, RATE, BATCH, WARMUP = 9, 4e-3, 2, 0.3  # 2.7 steps of warm-up, and three batches of which each comes three times
TRAINED = {
    "MaskLoRA, biases, norms": Trainable(biases=True, norms=True, adapters=MaskLoRA(rank=3, alpha=5)),
    "ScaleLoRA": Trainable(adapters=ScaleLoRA(rank=2)),
    "LoRA-Prune, norms": Trainable(norms=True, adapters=LoRAPrune(rank=2, alpha=9)),
    "weights, norms": Trainable(norms=True, weights=True),
    "biases, norms": Trainable(biases=True, norms=True),
}
METHODS = {"magnitude": pruners.Magnitude(sparsity=0.6), "2:4": pruners.Magnitude(pattern="2:4")}


def still(kind: str) -> Any:
    model = tiny(kind)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", TRAINED)
def test_the_reconstruction_is_that_of_plain_torch(kind, what, method, windows):
    model, plain, trainable = still(kind), still(kind), TRAINED[what]
    wanted = Reconstruction(trainable, STEPS, RATE, BATCH, warmup=WARMUP, reference=True)
    report = pruners.prune(model, METHODS[method], windows, reconstruct=wanted)
    found = [(block["initial"], block["final"]) for block in report.reconstruction]
    assert found == [pytest.approx(errors, rel=1e-4) for errors in by_hand(plain, trainable, METHODS[method], windows)]
    for (name, mine), (_, expected) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        if "k_proj.bias" not in name:  # its gradient is rounding
            assert_close(mine, expected, atol=1e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def by_hand(model: Any, trainable: Trainable, method: Any, windows: Tensor) -> list[tuple[float, float]]:
    """Every block's error before and after; the model is rebuilt in place."""
    pruned, errors = copy.deepcopy(model), []
    pruners.prune(pruned, method)  # magnitude: masks do not hang on what earlier blocks pass on
    for block, goal in zip(anatomy.blocks(model), anatomy.blocks(pruned), strict=True):
        dense = copy.deepcopy(block.module)
        block.module.load_state_dict(goal.module.state_dict())
        errors.append(rebuilt(model, block, dense, trainable, windows))
    return errors


def rebuilt(model: Any, block: Any, dense: nn.Module, trainable: Trainable, windows: Tensor) -> tuple[float, float]:
    whole = dict(block.module.named_parameters())
    masks = {f"{name}.weight": (linear.weight != 0).float() for name, linear in block.linears().items()}
    attached = trainable.attach_to_block(block)
    leaves = {name.removeprefix(f"{block.name}."): p.detach().clone() for name, p in attached.tensors.items()}
    attached.detach()
    leaves = {name: nn.Parameter(p) for name, p in leaves.items()}

    def weights(merged: bool) -> dict[str, Tensor]:
        over = {name: p * masks.get(name, 1) for name, p in leaves.items() if name in whole}
        for name in [name[:-2] for name in leaves if name.endswith(".A")]:
            a, b, key = leaves[f"{name}.A"], leaves[f"{name}.B"], f"{name}.weight"
            if isinstance(trainable.adapters, ScaleLoRA):
                over[key] = whole[key] * (b @ a)
                continue
            kept = 1 if isinstance(trainable.adapters, LoRAPrune) and not merged else masks[key]
            over[key] = whole[key] + trainable.adapters.alpha / len(a) * (b @ a) * kept
        return over

    def error(rows: Tensor) -> Tensor:
        args, kwargs = asked(model, block.module, windows[rows])
        with torch.no_grad():
            goal = first(dense(*args, **kwargs))
        return (first(functional_call(block.module, weights(merged=False), args, kwargs)) - goal).square().mean()

    everything = torch.arange(len(windows))
    initial, warm = float(error(everything).detach()), math.floor(WARMUP * STEPS)
    optimizer = torch.optim.AdamW(leaves.values(), weight_decay=0.0)
    for step in range(STEPS):
        error(torch.arange(step * BATCH, (step + 1) * BATCH) % len(windows)).backward()
        optimizer.param_groups[0]["lr"] = RATE * (step / warm if step < warm else (STEPS - step) / (STEPS - warm))
        optimizer.step()
        optimizer.zero_grad()
    final = float(error(everything).detach())  # as trained: before what LoRA-Prune put on pruned weights is dropped
    with torch.no_grad():
        for name, weight in weights(merged=True).items():
            whole[name].copy_(weight)
    return initial, final


def asked(model: Any, module: nn.Module, windows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """With what the model calls a block."""
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        model(input_ids=windows, use_cache=False)
    handle.remove()
    return seen[0]


def first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[0]
