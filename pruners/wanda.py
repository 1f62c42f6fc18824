"""Wanda: a weight's importance is its magnitude times the norm of its input.

    S[o, i] = |W[o, i]| * ||x_i||        Sun et al. 2023, arXiv:2306.11695

||x_i|| runs over every calibration token.  Weights compete within their own row, so each output loses the same
share of inputs; one threshold per matrix (`group="matrix"`) is another, weaker method: PERP's variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pruners.calibrate import InputNorm
from pruners.lazy import Float, Tensor
from pruners.magnitude import Grouped


def score(weight: Float[Tensor, "out inp"], x: InputNorm) -> Float[Tensor, "out inp"]:
    return weight.float().abs() * x.norm


@dataclass(frozen=True)
class Wanda(Grouped):
    group: str = "row"

    NEEDS = InputNorm

    def score(self, name: str, weight: Tensor, x: InputNorm, dense: Mapping[str, Tensor]) -> Tensor:
        return score(weight, x)
