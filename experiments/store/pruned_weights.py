"""Pruned weights that several recovery stages share, so that a table prunes a model once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.store import cache
from pruners import Report, anatomy
from pruners.run.report import Projection
from pruners.weights import homes


def shared(root: Path, key: dict[str, Any], model: Any, method: Any, prune: Callable[[], Report]) -> Report:
    """What `prune` does to `model` and reports, from the cache where it was done before; `key` is all that moves it.

    A model at home on the disk keeps its pruned blocks there for the cell alone.
    """
    if homes.on_disk(model) is not None:
        return prune()
    done: list[Report] = []

    def weights() -> dict[str, Any]:
        done.append(prune())
        kept: dict[str, Any] = {}
        for block in anatomy.blocks(model):
            with homes.held(block.module):
                kept |= {f"{block.name}.{name}": _copy(linear) for name, linear in block.linears().items()}
        return kept

    tensors = cache.statistics(root, key, weights)
    if done:
        return done[0]
    projections = []
    for block in anatomy.blocks(model):
        with homes.held(block.module, changes=True):
            for name, linear in block.linears().items():
                linear.weight.data.copy_(tensors[f"{block.name}.{name}"])
                projections.append(Projection.of(f"{block.name}.{name}", linear, method.asked))
    return Report(repr(method), method.asked, projections)


def _copy(linear: Any) -> Any:
    """On the CPU, which a model whose weights are away from its device needs."""
    return linear.weight.data.contiguous().cpu()
