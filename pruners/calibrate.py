"""Input statistics and the one block-by-block loop: the only place with hooks.

The decoder is replayed one block at a time, cache off, each block with the arguments that the model calls it with; a
single buffer of hidden states [windows, tokens, width] is updated in place.  Projections that read the same input share
one statistic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pruners import anatomy
from pruners.anatomy import Block
from pruners.interface import checks
from pruners.interface.checks import Count, Flag
from pruners.lazy import Float, Int, Tensor, nn, no_grad, torch
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
    """One block's `inputs` on the calibration windows and what the dense block made of them, `targets`."""

    inputs: Float[Tensor, "windows tokens width"]
    targets: Float[Tensor, "windows tokens width"]
    batch_size: int
    run: Callable[[Block, Tensor], Tensor]  # the block's outputs for windows of these numbers

    @no_grad
    def error(self, block: Block) -> float:
        """Mean squared error of the block's outputs as it is now."""
        total = torch.zeros((), dtype=torch.float64)
        for here in torch.arange(len(self.inputs)).split(self.batch_size):
            made = self.run(block, here).float()
            difference = made - self.targets[span(here)].to(made.device).float()
            total = total.to(made.device) + difference.square().sum(dtype=torch.float64)
        return float(total) / self.targets.numel()


class Keeper:
    """Is told of every finished block; this one keeps nothing.

    One that keeps blocks lets a run that was killed go on at the next one.  One whose `rebuild_batch` is not 0 may also
    change a pruned block before later ones see its outputs, and runs it on so many windows at once.
    """

    rebuild_batch: int = 0

    def restore(self, block: Block) -> bool:
        """Whether the block was kept; it is as it was then, now."""
        return False

    def rebuild(self, block: Block, passage: Passage) -> None:
        """Bring a pruned block's outputs back towards the dense block's."""

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
        for block in blocks:
            with homes.held(block.module, changes=sequential):
                last = block is blocks[-1]
                if not keeper.restore(block):
                    outputs = torch.empty_like(stream.hidden) if keeper.rebuild_batch else None
                    if not sequential and not last:
                        outputs = stream.hidden
                    seen = stream.observe(block, groups(block), statistic, outputs)
                    _refuse_non_finite(block, seen)
                    yield block, seen
                    if keeper.rebuild_batch and outputs is not None:
                        keeper.rebuild(block, Passage(stream.hidden, outputs, stream.batch_size, stream.run))
                    keeper.keep(block)
                finished(block)
                if sequential and not last:
                    stream.advance(block)


def _refuse_non_finite(block: Block, seen: Mapping[str, Any]) -> None:
    for name, statistic in seen.items():
        if statistic is not None and not statistic.finite():
            raise ValueError(
                f"The inputs of {block.name}.{name} hold NaN or inf. Check the checkpoint, or use --dtype bfloat16 or "
                "float32: float16 overflows in some models."
            )
