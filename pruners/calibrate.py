"""Input statistics and the one block-by-block loop: the only place with hooks.

The decoder is replayed one block at a time, cache off, each block with the arguments that the model calls it with; a
single buffer of hidden states [windows, tokens, width] is updated in place.  Projections that read the same input share
one statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pruners import anatomy
from pruners.anatomy import Block
from pruners.interface import checks
from pruners.interface.checks import Count, Flag
from pruners.lazy import Float, Int, Tensor, nn, torch
from pruners.run import ranks
from pruners.run.ranks import Ranks
from pruners.run.statistic import Hessian, InputNorm, Moments, Statistic
from pruners.run.stream import Stream, evaluating, span
from pruners.weights import homes

__all__ = [
    "NOTHING",
    "PLAIN",
    "Execution",
    "Hessian",
    "InputNorm",
    "Keeper",
    "Moments",
    "Passage",
    "Progress",
    "Statistic",
    "evaluating",
    "walk",
]

Progress = Annotated[Callable[[int, int], None], checks.FUNCTION]


@dataclass(frozen=True)
class Passage:
    """`blocks` in a row, the `inputs` of the first on the calibration windows, and what the dense ones made of them.

    `run` gives a block's outputs for windows of these numbers, from hidden states on `device`.
    """

    blocks: Sequence[Block]
    inputs: Float[Tensor, "windows tokens width"]
    targets: Float[Tensor, "windows tokens width"]
    batch_size: int
    device: torch.device
    run: Callable[[Block, Tensor, Tensor], Tensor]

    def outputs(self, rows: Int[Tensor, " count"]) -> Float[Tensor, "count tokens width"]:
        """What the blocks make of windows of these numbers, as they are now."""
        states = self.inputs[span(rows)].to(self.device, copy=True)
        for block in self.blocks:
            states = self.run(block, rows, states)
        return states


class Keeper:
    """Is told of every finished block; this one keeps nothing.

    One that keeps blocks lets a run that was killed go on at the next one.  One whose `rebuild_batch` is not 0 may also
    change pruned blocks, `rebuilds_at_once` in a row, before later ones see their outputs, and runs them on so many
    windows at once.  With `dense_inputs` the inputs of what it rebuilds are those of the dense model.
    """

    rebuild_batch: int = 0
    rebuilds_at_once: int = 1
    dense_inputs: bool = False

    def restore(self, block: Block) -> bool:
        """Whether the block was kept; it is as it was then, now.  Blocks rebuilt at once are all kept or none."""
        return False

    def remember(self, block: Block) -> None:
        """A block that is to be rebuilt is about to be pruned."""

    def rebuild(self, passage: Passage) -> None:
        """Bring the outputs of pruned blocks back towards those of the dense ones."""

    def keep(self, block: Block) -> None:
        """The block is finished."""


NOTHING = Keeper()


@dataclass(frozen=True)
class Execution:
    """How a method does its work; none of it but `cut` and a rebuilding `keeper` changes what comes out.

    `batch_size` windows go through a block at once, on a GPU more where they are short.  `progress(done, total)` is
    called per block.  `keeper` is for unstructured methods that read inputs.  `cut` is whether structured methods take
    units out or zero them.
    Raises TypeError or ValueError for invalid values.
    """

    batch_size: Count = 8
    progress: Progress | None = None
    keeper: Keeper = NOTHING
    cut: Flag = True

    def __post_init__(self) -> None:
        checks.fields(self)
        if not isinstance(self.keeper, Keeper):
            raise TypeError(f"keeper is a pruners.calibrate.Keeper; got {checks.typed(self.keeper)}.")

    def report(self, block: Block, total: int) -> None:
        """Call `progress` once the block is done."""
        if self.progress:
            self.progress(block.index + 1, total)


PLAIN = Execution()


def walk(
    model: nn.Module,
    windows: Int[Tensor, "count length"],
    statistic: type[Statistic] | None,
    how: Execution = PLAIN,
    *,
    keeper: Keeper = NOTHING,
    sequential: bool = True,
    groups: Callable[[Block], tuple[tuple[str, ...], ...]] = lambda block: block.shared_inputs,
    finished: Callable[[Block], None] = lambda block: None,
) -> Iterator[tuple[Block, dict[str, Any]]]:
    """Yield each block with the statistics of its projections' inputs, by projection name.

    Whatever the caller does to the block before asking for the next one is seen by the later blocks when
    `sequential`; else later blocks get dense outputs and one pass serves both.  `keeper` is told when the caller is
    done with a block; blocks that it restores are not yielded.  `finished` sees every block once it is as it stays.
    The ranks of a launch share the windows and see the same statistics, to the bit those of one process.
    Raises ValueError, naming block and projection, for inputs that are not finite.  An expert that no token was routed
    to has None for a statistic.
    """
    blocks = anatomy.blocks(model)
    with evaluating(model):
        together = Ranks() if keeper.rebuild_batch else ranks.here(next(model.parameters()).device)
        stream = Stream(model, windows, how.batch_size, also=keeper.rebuild_batch, together=together)
        if keeper.rebuild_batch:
            yield from _rebuilding(blocks, stream, statistic, keeper, groups, finished)
            return
        for block in blocks:
            with homes.held(block.module, changes=sequential):
                last = block is blocks[-1]
                if not keeper.restore(block):
                    outputs = None if sequential or last else stream.hidden
                    seen = stream.observe(block, groups(block), statistic, outputs)
                    _refuse_non_finite(block, seen)
                    yield block, seen
                    keeper.keep(block)
                finished(block)
                if sequential and not last:
                    stream.advance(block)


def _rebuilding(
    blocks: Sequence[Block],
    stream: Stream,
    statistic: type[Statistic] | None,
    keeper: Keeper,
    groups: Callable[[Block], tuple[tuple[str, ...], ...]],
    finished: Callable[[Block], None],
) -> Iterator[tuple[Block, dict[str, Any]]]:
    """The sequential walk of a keeper that rebuilds.  Blocks rebuilt at once are pruned first, one after the other.

    Beside the pruned model's hidden states go those of the dense blocks: of the whole dense model with `dense_inputs`,
    else of what reaches the first block that is rebuilt at once with others.
    """
    dense = stream.hidden
    for first in range(0, len(blocks), keeper.rebuilds_at_once):
        some = blocks[first : first + keeper.rebuilds_at_once]
        came, kept = stream.hidden, False
        inputs = made = dense if keeper.dense_inputs else came
        with homes.held(*(block.module for block in some), changes=True):
            for block in some:
                states, outputs, at_start = made, None, made is inputs
                if keeper.dense_inputs:
                    made = stream.through(block, states, None if at_start else states)
                kept = keeper.restore(block)
                if kept:
                    continue
                if not keeper.dense_inputs and at_start:
                    made = outputs = torch.empty_like(came)  # the pass that looks at the inputs fills it
                elif not keeper.dense_inputs:
                    made = stream.through(block, states, states)
                seen = (
                    stream.observe(block, groups(block), statistic, outputs) if statistic or outputs is not None else {}
                )
                _refuse_non_finite(block, seen)
                keeper.remember(block)
                yield block, seen
                if statistic and block is not some[-1]:
                    stream.hidden = stream.through(
                        block, stream.hidden, None if stream.hidden is came else stream.hidden
                    )
            if not kept:
                keeper.rebuild(Passage(some, inputs, made, stream.batch_size, stream.device, stream.run))
            stream.hidden = came
            for block in some:
                if not kept:
                    keeper.keep(block)
                finished(block)
                if block is not blocks[-1]:
                    stream.advance(block)
        dense = made


def _refuse_non_finite(block: Block, seen: Mapping[str, Any]) -> None:
    for name, statistic in seen.items():
        if statistic is not None and not statistic.finite():
            raise ValueError(
                f"The inputs of {block.name}.{name} hold NaN or inf. Check the checkpoint, or use --dtype bfloat16 or "
                "float32: float16 overflows in some models."
            )
