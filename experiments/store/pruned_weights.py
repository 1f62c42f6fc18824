"""Pruned weights that several recovery stages share, so that a table prunes a model once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.store import cache
from pruners import Report, anatomy
from pruners.report import Projection


def shared(root: Path, key: dict[str, Any], model: Any, method: Any, prune: Callable[[], Report]) -> Report:
    """What `prune` does to `model` and reports, from the cache where it was done before; `key` is all that moves it."""
    done: list[Report] = []
    linears = {f"{b.name}.{name}": linear for b in anatomy.blocks(model) for name, linear in b.linears().items()}

    def weights() -> dict[str, Any]:
        done.append(prune())
        return {name: linear.weight.data.contiguous() for name, linear in linears.items()}

    tensors = cache.statistics(root, key, weights)
    if done:
        return done[0]
    for name, linear in linears.items():
        linear.weight.data.copy_(tensors[name])
    projections = [Projection.of(name, linear, method.asked) for name, linear in linears.items()]
    return Report(repr(method), method.asked, projections)
