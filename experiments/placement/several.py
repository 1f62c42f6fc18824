"""How many GPUs of a node share a cell: 1, 2, 4 or 8."""

from __future__ import annotations

from experiments.placement import needs
from experiments.recovery import Retraining
from experiments.spec import Run
from pruners.retrain import Reconstruction

COUNTS = (1, 2, 4, 8)


def shared_by(run: Run, processes: int) -> bool:
    """Whether so many processes can run the cell together: blocks are reconstructed by one alone, and a batch of
    training must divide the processes or be divided by them."""
    if processes == 1:
        return True
    if isinstance(run.recovery, Retraining):
        return not (run.recovery.shared % processes and processes % run.recovery.shared)
    return not isinstance(run.recovery, Reconstruction)


def counts(run: Run, most: int) -> list[int]:
    """The numbers of cards up to `most` that may share the cell, from 1 on; the speed of a model is that on one."""
    if needs.times_the_model(run):
        return [1]
    return [count for count in COUNTS if count <= max(1, most) and shared_by(run, count)]


def fewest(run: Run, card_gb: float, most: int = 1, weights: str = "auto") -> int:
    """The fewest cards of that size, up to `most`, that take the cell; the most that may share it where none do."""
    able = counts(run, most)
    return next((count for count in able if needs.home_on(run, card_gb, count, weights)[0] is not None), able[-1])
