"""Pruned weights that several recovery stages share, so that a table prunes a model once for all of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.store import blocks, cache
from pruners import Report, anatomy
from pruners.lazy import torch
from pruners.run.report import Projection
from pruners.weights import homes

WITHOUT_TOKENS = "without_tokens"  # of the report, which nothing can be taken from but the pruning itself


def shared(root: Path, key: dict[str, Any], model: Any, method: Any, prune: Callable[[], Report]) -> Report:
    """What `prune` does to `model` and reports, from the cache where it was done before; `key` is all that moves it.

    A model at home on the disk keeps its pruned blocks there for the cell alone; a method that prunes in its own way
    may change what lies outside the blocks, and does so for every cell.
    """
    if homes.on_disk(model) is not None or not blocks.change_alone(method):
        return prune()
    done: list[Report] = []

    def weights() -> dict[str, Any]:
        done.append(prune())
        kept: dict[str, Any] = {}
        for block in anatomy.blocks(model):
            with homes.held(block.module):
                kept |= {name: _copy(weights) for name, weights in blocks.weights(block).items()}
        return kept | {WITHOUT_TOKENS: _as_tensor(done[0].without_tokens)}

    tensors = cache.statistics(root, {**key, "of": "whole blocks and experts without tokens"}, weights)
    if done:
        return done[0]
    projections = []
    for block in anatomy.blocks(model):
        with homes.held(block.module, changes=True):
            for name, weights_here in blocks.weights(block).items():
                weights_here.copy_(tensors[name])
            projections += [
                Projection.of(f"{block.name}.{name}", linear, method.asked) for name, linear in block.linears().items()
            ]
    return Report(repr(method), method.asked, projections, without_tokens=_as_names(tensors[WITHOUT_TOKENS]))


def _as_tensor(names: list[str]) -> torch.Tensor:
    """The cache holds tensors alone."""
    return torch.tensor(list(json.dumps(names).encode()), dtype=torch.uint8)


def _as_names(kept: torch.Tensor) -> list[str]:
    names: list[str] = json.loads(bytes(kept.tolist()))
    return names


def _copy(weights: Any) -> Any:
    """On the CPU, which a model whose weights are away from its device needs."""
    return weights.contiguous().cpu()
