"""Wanda-sp and magnitude-sp: FLAP's baselines, the scores of Wanda and magnitude for whole heads and channels.

    S[i] = mean_o |W[o, i]| * ||x_i||     Wanda-sp: over the inputs of the last projection of attention and of the MLP;
                                          block after block, each sees the outputs of the pruned ones before it
    S[i] = sqrt(sum_o W[o, i]^2)          magnitude-sp: no data

An et al. 2024, arXiv:2312.11983.  A head's score is the sum over its channels.  Every block loses the same share of its
heads and of its channels, rounded down, equal scores in order; the remaining weights are not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pruners import anatomy, apply, calibrate
from pruners.anatomy import Block
from pruners.apply import KINDS, Kept
from pruners.calibrate import PLAIN, Execution, InputNorm
from pruners.lazy import Float, Tensor, nn
from pruners.structured import Scores, Structured, by_unit, readers
from pruners.weights import homes


def wanda_score(weight: Float[Tensor, "out inp"], x: InputNorm) -> Float[Tensor, " inp"]:
    return (weight.float().abs() * x.norm).mean(0)


def magnitude_score(weight: Float[Tensor, "out inp"]) -> Float[Tensor, " inp"]:
    return weight.float().norm(dim=0)


@dataclass(frozen=True)
class MagnitudeSP(Structured):
    @property
    def needs_windows(self) -> bool:
        return False

    def choose(
        self, model: nn.Module, windows: Tensor | None, dense: Mapping[str, Tensor], how: Execution = PLAIN
    ) -> list[Kept]:
        kept = []
        for block, counts in zip(anatomy.blocks(model), self.even_counts(model), strict=True):
            with homes.held(block.module):
                scores = {kind: magnitude_score(block.linear(block.reader(kind).projection).weight) for kind in KINDS}
            kept.append(self.lowest(block, _summed(block, scores), counts))
        return kept


@dataclass(frozen=True)
class WandaSP(Structured):
    @property
    def walks(self) -> bool:
        return True

    def choose(
        self, model: nn.Module, windows: Tensor | None, dense: Mapping[str, Tensor], how: Execution = PLAIN
    ) -> list[Kept]:
        assert windows is not None  # pruners.prune has checked them
        kept, counts = [], self.even_counts(model)
        for block, seen in calibrate.walk(model, windows, InputNorm, how, groups=readers):
            names = {kind: block.reader(kind).projection for kind in KINDS}
            scores = {kind: wanda_score(block.linear(name).weight, seen[name]) for kind, name in names.items()}
            kept.append(self.lowest(block, _summed(block, scores), counts[block.index]))
            apply.zero(block, kept[-1])
            how.report(block, len(counts))
        return kept


def _summed(block: Block, scores: Scores) -> Scores:
    return {kind: by_unit(block, kind, score).sum(1) for kind, score in scores.items()}
