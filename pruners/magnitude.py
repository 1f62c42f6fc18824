"""Magnitude: remove the smallest weights.  Random: the baseline that every method should beat.

Magnitude    S[o, i] = |W[o, i]|    one threshold per matrix: the smallest weights matter least
Random       S[o, i] uniform        within rows: the baseline that every method should beat
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pruners import select
from pruners.interface.checks import Seed
from pruners.lazy import Bool, Float, Tensor, torch
from pruners.unstructured import Unstructured


def score(weight: Float[Tensor, "out inp"]) -> Float[Tensor, "out inp"]:
    return weight.float().abs()


@dataclass(frozen=True)
class Grouped(Unstructured):
    """`group` is the comparison group of a weight: its `matrix` (one threshold), its own output `row` or input
    `column`, or so many neighbouring ones, `rows:128`, `columns:128`, with one threshold."""

    group: str = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        select.check_group(self.group, self.pattern)

    def gone(self, score: Float[Tensor, "out inp"]) -> Bool[Tensor, "out inp"]:
        return super().gone(score) if self.pattern else select.among(score, self.group, self.asked)


@dataclass(frozen=True)
class Magnitude(Grouped):
    def score(self, name: str, weight: Tensor, x: Any, dense: Mapping[str, Tensor]) -> Tensor:
        return score(weight)


@dataclass(frozen=True)
class Random(Unstructured):
    """Uniform scores within rows, drawn from `seed` and the projection's name, the same on every device.

    PERP's released `random` has one threshold for each matrix instead.
    """

    seed: Seed = 0

    def score(self, name: str, weight: Tensor, x: Any, dense: Mapping[str, Tensor]) -> Tensor:
        mixed = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
        return torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
