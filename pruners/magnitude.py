"""Magnitude: the smallest weights matter least.

    S[o, i] = |W[o, i]|        no data; one threshold per matrix

The papers' baseline.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pruners import checks, select
from pruners.lazy import Bool, Float, Tensor
from pruners.unstructured import Unstructured


def score(weight: Float[Tensor, "out inp"]) -> Float[Tensor, "out inp"]:
    return weight.float().abs()


@dataclass(frozen=True)
class Grouped(Unstructured):
    """`group` says among whom weights compete: their `matrix` (one threshold) or their own output `row`."""

    group: str = "matrix"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group not in ("matrix", "row"):
            raise ValueError(f"group is 'matrix' or 'row'; got {checks.shown(self.group)}.")

    def gone(self, score: Float[Tensor, "out inp"]) -> Bool[Tensor, "out inp"]:
        if self.group == "matrix" and not self.pattern:
            return select.per_matrix(score, self.asked)
        return super().gone(score)


@dataclass(frozen=True)
class Magnitude(Grouped):
    def score(self, name: str, weight: Tensor, x: Any, dense: Mapping[str, Tensor]) -> Tensor:
        return score(weight)
