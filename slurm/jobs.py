"""Groups cells into jobs: what is expensive to share stays together, what only waits is parted, short ones meet.

Two cells share what the dense model's statistics or steps of retraining take, or all of the making where they differ
in measures alone.  They stay in one job where that
saves WORTH of what the second takes alone; else its result would wait for nothing.  All cells of a job take the same
number of cards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from experiments.cells import Cell, ordered, sharing
from experiments.labels import beside_model
from slurm import estimate
from slurm.estimate import WORTH, Request
from slurm.profile import Profile

LARGEST_ARRAY = 1000  # Slurm's own default limit, MaxArraySize


@dataclass(frozen=True)
class Job:
    """Cells that one process, or one on each of several cards, runs one after the other, all on the same model;
    `seconds` is what they take together, `choices` the ids of the learning rates to be chosen that they need."""

    cells: tuple[Cell, ...]
    seconds: float = 0.0
    cards: int = 1
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """Tells it from the other jobs of a submission, each cell being in one of them."""
        return self.cells[0].id

    @property
    def label(self) -> str:
        return "; ".join(beside_model(cell.label, cell.run.model_name) for cell in self.cells)


@dataclass(frozen=True)
class Array:
    """Jobs that ask for the same: one submission.  They begin once those `after` which they come have ended, keys of
    jobs of this submission or ids of others."""

    jobs: tuple[Job, ...]
    request: Request
    after: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        return self.jobs[0].cells[0].run.model_name


def assigned(
    cells: Sequence[Cell], profiles: Mapping[str, Profile], memory_gb: float | None = None
) -> tuple[dict[str, list[Cell]], dict[str, str]]:
    """By profile the cells that go there, and by id why the others go nowhere.

    A cell goes where its cards are smallest together among those that hold all of it, or else that take it with its
    weights elsewhere; to a profile without accelerators where no card takes it.
    """
    found: dict[str, list[Cell]] = {name: [] for name in profiles}
    left: dict[str, str] = {}
    for cell in cells:
        takers: dict[str, tuple[bool, float]] = {}
        for name, profile in profiles.items():
            cards, size = estimate.fewest(cell, profile), estimate.card_gb(profile)
            try:
                estimate.request([cell], profile, memory_gb, cards)
            except estimate.TooLargeError as error:
                left[cell.id] = str(error)
            else:
                home, _ = estimate.home_on(cell, profile, cards)
                takers[name] = (not profile.gres or home != "device", cards * size)
        if takers:
            left.pop(cell.id, None)
            found[min(takers, key=lambda name: takers[name])].append(cell)
    return {name: some for name, some in found.items() if some}, left


def arrays(
    cells: Sequence[Cell], profile: Profile, memory_gb: float | None = None, largest: int = LARGEST_ARRAY
) -> list[Array]:
    """One array per model, number format and number of cards, each asking for what its largest job needs;
    TooLargeError as `request`."""
    alike: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in ordered(cells):
        alike.setdefault((cell.run.model, cell.run.dtype, estimate.fewest(cell, profile)), []).append(cell)
    of_cards: dict[tuple[str, str, int], list[Job]] = {}
    for (model, dtype, fewest), some in alike.items():
        for job in _jobs(some, profile, fewest):
            cards = estimate.cards(job.cells, profile, memory_gb)
            seconds = estimate.seconds(job.cells, profile, cards)
            of_cards.setdefault((model, dtype, cards), []).append(Job(job.cells, seconds, cards))
    return [
        Array(part, _largest([estimate.request(job.cells, profile, memory_gb, job.cards) for job in part]))
        for jobs in of_cards.values()
        for part in (tuple(jobs[start : start + largest]) for start in range(0, len(jobs), largest))
    ]


def _jobs(cells: list[Cell], profile: Profile, cards: int) -> list[Job]:
    """In order; a job fills up to the profile's `packed_hours`, or as long as sharing is worth the waiting."""
    jobs: list[list[Cell]] = []
    taken = 0.0  # seconds of the last job
    for cell in cells:
        alone = estimate.seconds([cell], profile, cards)
        together = estimate.seconds([*jobs[-1], cell], profile, cards) if jobs else 0.0
        saved = taken + alone - together
        worth = saved >= WORTH * alone or together <= 3600 * estimate.SHORTEST_HOURS  # too short to wait for
        shares = bool(jobs) and sharing(jobs[-1][-1]) == sharing(cell) and worth
        if jobs and (together <= 3600 * profile.packed_hours or shares):
            jobs[-1].append(cell)
            taken = together
        else:
            jobs.append([cell])
            taken = alone
    return [Job(tuple(job)) for job in jobs]


def _largest(requests: Sequence[Request]) -> Request:
    return Request(
        cards=max(request.cards for request in requests),
        gpus=max(request.gpus for request in requests),
        gpu_memory_gb=max(request.gpu_memory_gb for request in requests),
        memory_gb=max(request.memory_gb for request in requests),
        needed_hours=max(request.needed_hours for request in requests),
        hours=max(request.hours for request in requests),
    )
