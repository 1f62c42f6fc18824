"""What a job needs, from the model's size and the work of its cells; rough, and on the safe side.

    accelerator   weights + dense statistics (4 bytes a weight) + activations + Hessians and their factorisation
    memory        weights while they are read, dense statistics, and what Python and its libraries take
    time          3 * (reading the weights + 2 * parameters * tokens / sustained speed); a backward pass counts twice

A job that needs longer than the profile allows asks for the longest time and puts itself back into the queue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from safetensors import safe_open

from experiments import models
from experiments.cells import Cell
from experiments.spec import Run, needs_windows
from slurm.profile import Profile

BYTES = {"float32": 4, "float64": 8}
LIBRARIES_GB = 4.0
READING_GB_PER_SECOND = 0.5
SAFETY = 3
SHORTEST_HOURS = 0.25


class TooLargeError(ValueError):
    """A job that the profile does not allow."""


@dataclass(frozen=True)
class Request:
    """What one job asks for; `hours` is capped at the profile's, `needed_hours` is not."""

    gpus: int
    gpu_memory_gb: float
    memory_gb: float
    needed_hours: float
    hours: float

    @property
    def minutes(self) -> int:
        return math.ceil(60 * self.hours)


def request(cells: Sequence[Cell], profile: Profile, memory_gb: float | None = None) -> Request:
    """Of a job that runs these cells of one model one after the other; `memory_gb` overrides the estimate.

    Raises TooLargeError where the profile's accelerator or memory limit is below that.
    """
    device = max(map(_device_gb, cells))
    host = LIBRARIES_GB + max(map(_host_gb, cells)) + (0 if profile.gres else device)
    asked = math.ceil(host if memory_gb is None else memory_gb)
    needed = max(SHORTEST_HOURS, SAFETY * seconds(cells, profile) / 3600)
    _check(cells[0].run.model, device, asked, profile)
    return Request(1 if profile.gres else 0, round(device, 1), asked, needed, min(needed, profile.hours))


def seconds(cells: Sequence[Cell], profile: Profile) -> float:
    """Of these cells on one machine, their shared statistics computed once."""
    run = cells[0].run
    reading = len(cells) * _weights_gb(run) / READING_GB_PER_SECOND
    tokens = sum(cell.work for cell in cells) - _saved_tokens(cells)
    return reading + 2 * parameters(run.model) * tokens / (profile.teraflops * 1e12)


@lru_cache
def parameters(model: str) -> int:
    """Of the catalogue, or counted in the headers of a folder's weight files."""
    found = models.find(model)
    if found.parameters or not found.folder:
        return found.parameters or 0
    total = 0
    for path in sorted(found.folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            total += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return total


def _saved_tokens(cells: Sequence[Cell]) -> int:
    """Work that `Cell.work` counts for every cell and that cells of the same statistics do once."""
    shared: dict[str, int] = {}
    every = 0
    for cell in cells:
        if _has_statistics(cell.run):
            tokens = 3 * _calibration_tokens(cell.run)
            shared[repr(cell.run.method.statistics_key)] = tokens
            every += tokens
    return every - sum(shared.values())


def _device_gb(cell: Cell) -> float:
    run, width = cell.run, _width(cell.run)
    statistics = 4e-9 * parameters(run.model) if _has_statistics(run) else 0
    hidden = 4e-9 * width * _calibration_tokens(run)
    factorisation = 30e-9 * (2.7 * width) ** 2 if needs_windows(run.method) else 0
    return 1.1 * (_weights_gb(run) + statistics + hidden + factorisation) + 1


def _host_gb(cell: Cell) -> float:
    statistics = 4e-9 * parameters(cell.run.model) if _has_statistics(cell.run) else 0
    return 1.2 * _weights_gb(cell.run) + statistics


def _weights_gb(run: Run) -> float:
    return 1e-9 * BYTES.get(run.dtype, 2) * parameters(run.model)


def _width(run: Run) -> float:
    """Of the hidden states: decoders have about 12 width^2 parameters a block, and a block per 128 channels."""
    return (128 * parameters(run.model) / 12) ** (1 / 3)


def _has_statistics(run: Run) -> bool:
    return run.method is not None and run.method.statistics_key is not None


def _calibration_tokens(run: Run) -> int:
    return run.windows.count * run.windows.length if run.windows and needs_windows(run.method) else 0


def _check(model: str, device_gb: float, memory_gb: float, profile: Profile) -> None:
    if profile.gpu_memory_gb and device_gb > profile.gpu_memory_gb:
        raise TooLargeError(
            f"{model} needs about {device_gb:.0f} GB on one accelerator and this profile's hold "
            f"{profile.gpu_memory_gb:g} GB; take a profile with larger ones, --dtype bfloat16, or one without gres."
        )
    if profile.memory_gb and memory_gb > profile.memory_gb:
        raise TooLargeError(
            f"A job on {model} needs about {memory_gb:.0f} GB of memory and this profile allows {profile.memory_gb:g}; "
            "take another profile, or say --memory-gb if you know better."
        )
