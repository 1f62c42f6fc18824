"""Groups cells into jobs: what is expensive to share stays together, what only waits is parted, short ones meet.

Two cells share what the dense model's statistics or steps of retraining take.  They stay in one job where that
saves WORTH of what the second takes alone; else its result would wait for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from experiments.cells import Cell, ordered, sharing
from experiments.placement import needs
from slurm import estimate
from slurm.estimate import Request
from slurm.profile import Profile

LARGEST_ARRAY = 1000  # Slurm's own default limit, MaxArraySize
WORTH = 0.25


@dataclass(frozen=True)
class Job:
    """Cells that one process runs one after the other, all on the same model; `seconds` is what they take together."""

    cells: tuple[Cell, ...]
    seconds: float = 0.0

    @property
    def label(self) -> str:
        return ", ".join(cell.label for cell in self.cells)


@dataclass(frozen=True)
class Array:
    """Jobs that ask for the same: one submission."""

    jobs: tuple[Job, ...]
    request: Request

    @property
    def model(self) -> str:
        return self.jobs[0].cells[0].run.model_name


def assigned(
    cells: Sequence[Cell], profiles: Mapping[str, Profile], memory_gb: float | None = None
) -> tuple[dict[str, list[Cell]], dict[str, str]]:
    """By profile the cells that go there, and by id why the others go nowhere.

    A cell goes to the smallest card that holds all of it, or else to the smallest that takes it with its weights
    elsewhere; to a profile without accelerators where no card takes it.
    """
    by_size = sorted(profiles.items(), key=lambda item: estimate.card_gb(item[1]))
    found: dict[str, list[Cell]] = {name: [] for name in profiles}
    left: dict[str, str] = {}
    for cell in cells:
        takers = {}
        for name, profile in by_size:
            try:
                estimate.request([cell], profile, memory_gb)
            except estimate.TooLargeError as error:
                left[cell.id] = str(error)
            else:
                takers[name] = needs.home_on(cell.run, estimate.card_gb(profile))[0]
        if takers:
            left.pop(cell.id, None)
            whole = [name for name, home in takers.items() if home == "device" and profiles[name].gres]
            found[(whole or list(takers))[0]].append(cell)
    return {name: some for name, some in found.items() if some}, left


def arrays(
    cells: Sequence[Cell], profile: Profile, memory_gb: float | None = None, largest: int = LARGEST_ARRAY
) -> list[Array]:
    """One array per model and number format, each asking for what its largest job needs; TooLargeError as `request`."""
    found = []
    for _, of_model in groupby(ordered(cells), key=lambda cell: (cell.run.model, cell.run.dtype)):
        jobs = _jobs(list(of_model), profile)
        for start in range(0, len(jobs), largest):
            part = tuple(jobs[start : start + largest])
            requests = [estimate.request(job.cells, profile, memory_gb) for job in part]
            found.append(Array(part, _largest(requests)))
    return found


def _jobs(cells: list[Cell], profile: Profile) -> list[Job]:
    """In order; a job fills up to the profile's `packed_hours`, or as long as sharing is worth the waiting."""
    jobs: list[list[Cell]] = []
    taken = 0.0  # seconds of the last job
    for cell in cells:
        alone = estimate.seconds([cell], profile)
        together = estimate.seconds([*jobs[-1], cell], profile) if jobs else 0.0
        saved = taken + alone - together
        worth = saved >= WORTH * alone or together <= 3600 * estimate.SHORTEST_HOURS  # too short to wait for
        shares = bool(jobs) and sharing(jobs[-1][-1]) == sharing(cell) and worth
        if jobs and (together <= 3600 * profile.packed_hours or shares):
            jobs[-1].append(cell)
            taken = together
        else:
            jobs.append([cell])
            taken = alone
    return [Job(tuple(job), estimate.seconds(job, profile)) for job in jobs]


def _largest(requests: Sequence[Request]) -> Request:
    return Request(
        gpus=max(request.gpus for request in requests),
        gpu_memory_gb=max(request.gpu_memory_gb for request in requests),
        memory_gb=max(request.memory_gb for request in requests),
        needed_hours=max(request.needed_hours for request in requests),
        hours=max(request.hours for request in requests),
    )
