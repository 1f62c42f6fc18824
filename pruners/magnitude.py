"""Magnitude: the smallest weights matter least.

    S[o, i] = |W[o, i]|        no data; one threshold per matrix

The papers' baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pruners import select
from pruners.lazy import Bool, Float, Tensor
from pruners.unstructured import Unstructured


def score(weight: Float[Tensor, "out inp"]) -> Float[Tensor, "out inp"]:
    return weight.float().abs()


@dataclass(frozen=True)
class Grouped(Unstructured):
    """`group` says among whom weights compete: their `matrix` (one threshold), their own output `row` or input
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
