"""Groups cells into jobs: those that share a model and statistics belong together, short ones keep company."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from experiments.cells import Cell, ordered, sharing
from slurm import estimate
from slurm.estimate import Request
from slurm.profile import Profile

LARGEST_ARRAY = 1000  # Slurm's own default limit, MaxArraySize


@dataclass(frozen=True)
class Job:
    """Cells that one process runs one after the other, all on the same model."""

    cells: tuple[Cell, ...]

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


def arrays(cells: Sequence[Cell], profile: Profile, memory_gb: float | None = None) -> list[Array]:
    """One array per model and number format, each asking for what its largest job needs; TooLargeError as `request`."""
    found = []
    for _, of_model in groupby(ordered(cells), key=lambda cell: (cell.run.model, cell.run.dtype)):
        jobs = _jobs(list(of_model), profile)
        for start in range(0, len(jobs), LARGEST_ARRAY):
            part = tuple(jobs[start : start + LARGEST_ARRAY])
            requests = [estimate.request(job.cells, profile, memory_gb) for job in part]
            found.append(Array(part, _largest(requests)))
    return found


def _jobs(cells: list[Cell], profile: Profile) -> list[Job]:
    """Cells of the same statistics are never parted; around them a job fills up to the profile's `packed_hours`."""
    jobs: list[list[Cell]] = []
    for _, group in groupby(cells, key=sharing):
        together = list(group)
        if jobs and estimate.seconds(jobs[-1] + together, profile) <= 3600 * profile.packed_hours:
            jobs[-1] += together
        else:
            jobs.append(together)
    return [Job(tuple(job)) for job in jobs]


def _largest(requests: Sequence[Request]) -> Request:
    return Request(
        gpus=max(request.gpus for request in requests),
        gpu_memory_gb=max(request.gpu_memory_gb for request in requests),
        memory_gb=max(request.memory_gb for request in requests),
        needed_hours=max(request.needed_hours for request in requests),
        hours=max(request.hours for request in requests),
    )
