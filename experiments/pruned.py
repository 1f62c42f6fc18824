"""Pruned weights that several recovery stages share, so that a table prunes a model once for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments import cache
from pruners import Report, anatomy
from pruners.report import Projection


def shared(root: Path, key: dict[str, Any], model: Any, method: Any, prune: Callable[[], Report]) -> Report:
    """What `prune` does to `model` and reports, from the cache where it was done before; `key` is all that moves it."""
    done: list[Report] = []

    def weights() -> dict[str, Any]:
        done.append(prune())
        return {f"{b.name}.{name}": lin.weight.data for b in anatomy.blocks(model) for name, lin in b.linears().items()}

    tensors = cache.statistics(root, key, weights)
    if done:
        return done[0]
    report = Report(repr(method), method.asked)
    for name, tensor in tensors.items():
        linear = model.get_submodule(name)
        linear.weight.data.copy_(tensor)
        report.projections.append(Projection.of(name, linear, method.asked))
    return report
