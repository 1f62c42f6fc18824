"""Base of the methods that remove whole heads and channels: how much to remove, and the removal.

`ratio` means what the method's paper means by it; `target_parameters` is unambiguous: the share of parameters that
goes, of the decoder blocks or of the whole model (`target_of`), met to the granularity of a unit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from pruners import anatomy, apply, select
from pruners.anatomy import Block
from pruners.apply import KINDS, Kept
from pruners.calibrate import PLAIN, Execution
from pruners.interface import checks, returned
from pruners.interface.checks import Count, Share
from pruners.interface.method import Method
from pruners.lazy import Float, Int, Tensor, nn, torch
from pruners.run.matrices import Matrix
from pruners.run.report import Report, Size, State, Structure, Widths
from pruners.unstructured import refuse_non_finite
from pruners.weights import homes

Scores = dict[str, Tensor]  # by kind of unit: one number (or whether it goes) per unit of a block


@dataclass(frozen=True)
class Structured(Method):
    """Removes KV heads with their query heads, and MLP channels; `ratio` is the share removed, in the method's terms.

    `round_to` keeps more channels, until their number in each block is a multiple of it.  ValueError where a share lies
    outside [0, 1), where `ratio` and `target_parameters` are both given, or where the units hold too few parameters.
    """

    ratio: Share | None = None
    target_parameters: Share | None = field(default=None, kw_only=True)
    target_of: str = field(default="decoder", kw_only=True)
    round_to: Count | None = field(default=None, kw_only=True)

    DEFAULT_RATIO: ClassVar[float] = 0.2

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.ratio is not None and self.target_parameters is not None:
            raise ValueError("ratio and target_parameters both say how much to remove; give one of the two.")
        if self.ratio is None and self.target_parameters is None:
            object.__setattr__(self, "ratio", self.DEFAULT_RATIO)
        select.check_share("ratio" if self.target_parameters is None else "target_parameters", self.asked)
        checks.choice("target_of", self.target_of, ("decoder", "model"))

    @property
    def needs_windows(self) -> bool:
        return True

    @property
    def asked(self) -> float:
        share = self.ratio if self.target_parameters is None else self.target_parameters
        assert share is not None  # __post_init__ has filled it in
        return share

    @property
    def setting(self) -> str:
        """The requested sparsity, in words."""
        if self.target_parameters is not None:
            return f"{self.asked:.2%} of the {'decoder blocks' if self.target_of == 'decoder' else 'model'}"
        return f"ratio {self.asked:g}"

    def choose(
        self, model: nn.Module, windows: Tensor | None, dense: Mapping[str, Tensor], how: Execution = PLAIN
    ) -> list[Kept]:
        """What is kept of each block; a method whose later blocks see pruned ones zeroes the earlier as it goes."""
        raise TypeError(f"{type(self).__name__} does not implement choose().")

    def repairs(
        self, block: Block, kept: Kept, dense: Mapping[str, Tensor]
    ) -> list[tuple[Matrix, Float[Tensor, " out"]]]:
        """Biases to add to a block, computed before anything is removed from it."""
        return []

    def prune(
        self,
        model: Any,
        windows: Int[Tensor, "count length"] | None,
        dense: Mapping[str, Tensor],
        how: Execution = PLAIN,
    ) -> Report:
        started = time.perf_counter()
        self.refuse(model)
        blocks, asked, before = anatomy.blocks(model), self.asked_parameters(model), State.of(model)
        kept = returned.kept(self, blocks, self.choose(model, windows, dense, how))
        rounding = sum(keep.rounding * block.unit_cost("mlp") for keep, block in zip(kept, blocks, strict=True))
        left = [_left(block, keep) for block, keep in zip(blocks, kept, strict=True)]
        gone = self._carry_out(model, kept, dense, how.cut)
        after = State(before.size.less(Size(gone, gone)), left, before.hidden_size)
        return self.reported(Structure(self.setting, Size(asked, asked), rounding, before, after), started)

    def reported(self, structure: Structure, started: float) -> Report:
        seconds = {"prune": time.perf_counter() - started}
        return Report(repr(self), self.asked, seconds=seconds, structure=structure)

    def check(self, model: nn.Module) -> None:
        """ValueError or TypeError for a model that the method cannot prune as asked; reads no value of a weight."""
        apply.check(model)

    def refuse(self, model: nn.Module) -> None:
        """As `check`, and ValueError for weights that are not finite."""
        self.check(model)
        for block in anatomy.blocks(model):
            with homes.held(block.module):
                refuse_non_finite(block)

    def open(self, block: Block, kind: str) -> bool:
        """Whether units of that kind may be removed from the block."""
        return True

    def asked_parameters(self, model: nn.Module) -> int:
        """How many parameters the model is to lose."""
        if self.target_parameters is not None:
            return round(self.asked * getattr(Size.of(model), self.target_of))
        return round(self.asked * self._removable(model))

    def added_parameters(self, block: Block, kind: str) -> int:
        """How many parameters the method's repairs add to a block that loses units of that kind."""
        return 0

    def refund(self, block: Block, kind: str) -> int:
        """What the first unit that goes costs less; a target counts what repairs add, the papers' ratios do not."""
        return 0 if self.target_parameters is None else self.added_parameters(block, kind)

    def in_order(self, block: Block, kind: str) -> Int[Tensor, " units"]:
        """What each unit of that kind takes along, in the order in which they go."""
        costs = torch.full((block.units(kind),), block.unit_cost(kind))
        costs[:1] -= self.refund(block, kind)
        costs[-1:] += block.last_cost(kind)
        return costs

    def budget(self, model: nn.Module) -> int:
        """How many parameters go, less what refunds give back; ValueError where all units hold less."""
        asked = self.asked_parameters(model)
        removable = sum(int(self.in_order(*place).sum()) for place in self._places(model))
        if asked > removable:
            raise ValueError(
                f"{self.setting} is {asked:,} parameters, and the removable heads and channels have "
                f"{removable:,}; remove less, or allow more blocks."
            )
        return asked

    def even_counts(self, model: nn.Module, stage: float = 1.0) -> list[dict[str, int]]:
        """How many units of each kind go from each block when all open ones lose the same share.

        `stage` is how much of what is asked goes now.
        """
        places = self._places(model)
        if self.target_parameters is None:
            counts = [self.share_of(block, kind, stage) for block, kind in places]
        else:
            counts = select.evenly([self.in_order(*place) for place in places], stage * self.budget(model))
        by_place = {(block.index, kind): count for (block, kind), count in zip(places, counts, strict=True)}
        return [{kind: by_place.get((b.index, kind), 0) for kind in KINDS} for b in anatomy.blocks(model)]

    def share_of(self, block: Block, kind: str, stage: float) -> int:
        """`ratio` of the block's units of that kind, rounded down as released."""
        return int(stage * self.asked * block.units(kind))

    def ranked_together(
        self, model: nn.Module, scores: Sequence[Scores], choose: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Kept]:
        """What stays when `choose(scores, costs)` says which go of all heads followed by all channels that may."""
        blocks, places = anatomy.blocks(model), self._places(model)
        every = [returned.unit_score(self, block, kind, scores[block.index][kind]) for block, kind in places]
        costs = [self._costs(block, kind, part) for part, (block, kind) in zip(every, places, strict=True)]
        gone = [{kind: torch.zeros(block.units(kind), dtype=torch.bool) for kind in KINDS} for block in blocks]
        parts = choose(torch.cat(every), torch.cat(costs)).split([len(part) for part in every])
        for (block, kind), part in zip(places, parts, strict=True):
            gone[block.index][kind] = part
        return [self.settled(*one) for one in zip(blocks, scores, gone, strict=True)]

    def _costs(self, block: Block, kind: str, score: Float[Tensor, " units"]) -> Int[Tensor, " units"]:
        """What each unit takes along if the lowest score goes first."""
        costs = self.in_order(block, kind)
        return torch.empty_like(costs).index_copy_(0, score.argsort(stable=True).to(costs.device), costs)

    def lowest(self, block: Block, scores: Scores, counts: Mapping[str, int]) -> Kept:
        """What stays of a block that loses so many units of each kind, and `round_to` obeyed."""
        for kind in KINDS:
            returned.unit_score(self, block, kind, scores[kind])
        return self.settled(block, scores, {kind: select.lowest(scores[kind], counts[kind]) for kind in KINDS})

    def settled(self, block: Block, scores: Scores, gone: Scores) -> Kept:
        """What stays of a block once `round_to` has given the best channels back."""
        mlp, asked = gone["mlp"], int(gone["mlp"].sum())
        count = self.rounded(block.channels, asked)
        if count != asked:
            mlp = select.lowest(scores["mlp"], count)
        return Kept(~gone["attention"], ~mlp, rounding=asked - count)

    def rounded(self, width: int, count: int) -> int:
        """How many of `count` channels go if what stays of `width` is to be a multiple of `round_to`."""
        multiple = self.round_to or 1
        return max(width - -(-(width - count) // multiple) * multiple, 0)

    def _removable(self, model: nn.Module) -> int:
        return sum(block.all_units_cost(kind) for block, kind in self._places(model))

    def _places(self, model: nn.Module) -> list[tuple[Block, str]]:
        return [(block, kind) for kind in KINDS for block in anatomy.blocks(model) if self.open(block, kind)]

    def _carry_out(self, model: nn.Module, kept: Sequence[Kept], dense: Mapping[str, Tensor], cut: bool) -> int:
        """Remove units and add biases; returns how many parameters fewer cutting leaves.

        ValueError for biases that do not fit.
        """
        pairs = list(zip(anatomy.blocks(model), kept, strict=True))
        gone = sum(block.lost(kind, keep[kind]) for block, keep in pairs for kind in KINDS)
        repaired = 0
        for block, keep in pairs:
            with homes.held(block.module, changes=True):
                repairs = returned.repairs(self, block, self.repairs(block, keep, dense))
                for linear, bias in repairs:
                    gone -= len(bias) if linear.bias is None else 0
                    apply.add_bias(linear, bias)
                (apply.cut if cut else apply.zero)(block, keep)
                repaired += len(repairs)
        if repaired or (cut and gone):
            apply.describe(model)
        return gone


def readers(block: Block) -> tuple[tuple[str, ...], ...]:
    """The projections that read what units put out, for `calibrate.walk`."""
    return tuple((block.reader(kind).projection,) for kind in KINDS)


def by_unit(block: Block, kind: str, scores: Float[Tensor, " inp"]) -> Float[Tensor, "units size"]:
    """Scores of the inputs of the projection that reads the units, on the CPU, a row for each unit."""
    return scores.cpu()[block.reader(kind).index]


def _left(block: Block, kept: Kept) -> Widths:
    left = apply.widths_left(block, kept)
    return Widths(left["heads"], left["kv_heads"], left["channels"])
