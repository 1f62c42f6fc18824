"""What a job requests, from the model's size and the work of its cells; rough, and on the safe side.

    cards    the fewest on which its cells fit; twice as many while it would need more time than the profile allows and
             so many save a quarter of it
    memory   for each card: the weights while they are read, dense statistics, Python and its libraries; and without an
             accelerator all that would be on one
    time     3 * (reading the weights, in every sweep where they are away, + 2 * parameters * tokens / sustained speed),
             or what records of such cells on that card tell (see `pace`)

A job that needs longer than the profile allows asks for the longest time and puts itself back into the queue.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from experiments.cells import OVERHEAD_TOKENS, Cell, method_name
from experiments.estimate import BYTES, makers, parameters_of, shared_statistics, sweeps, taken_over
from experiments.placement import needs, several, shapes
from experiments.recovery import Retraining
from experiments.spec import Run, ZeroShot
from pruners.retrain import Reconstruction
from slurm.profile import Profile

LIBRARIES_GB = 4.0
READING_GB_PER_SECOND = 0.5
BRINGING_GB_PER_SECOND = 10.0  # from CPU memory to the device
ADDING_UP = 0.25  # of calibration, which every card does whole: it adds up all statistics
WORTH = 0.25  # of the time, which twice as many cards, or cells in one job, must save
SAFETY = 3
SHORTEST_HOURS = 0.25
PATIENCE_DAYS = 30


class TooLargeError(ValueError):
    """A job that the profile does not allow."""


@dataclass(frozen=True)
class Request:
    """What one job asks for: `cards` processes, each with an accelerator of the `gpus` where there are some, of which
    it takes `gpu_memory_gb`; `hours` is capped at the profile's, `needed_hours` is not."""

    cards: int
    gpus: int
    gpu_memory_gb: float
    memory_gb: float
    needed_hours: float
    hours: float

    def memory(self, whole: bool) -> str:
        """In words; `whole` is all that a node has."""
        return "all memory of a node" if whole else f"{self.memory_gb:g} GB of memory"

    @property
    def minutes(self) -> int:
        return math.ceil(60 * self.hours)


def request(cells: Sequence[Cell], profile: Profile, memory_gb: float | None = None, cards: int = 1) -> Request:
    """Of a job that runs these cells of one model one after the other; `memory_gb` overrides the estimate.

    Raises TooLargeError where the profile's accelerators or memory limit are below that.
    """
    homes = [home_on(cell, profile, cards) for cell in cells]
    device = max(needed for _, needed in homes)
    host = LIBRARIES_GB + max(_host_gb(cell, profile, cards) for cell in cells)
    host += 0 if profile.gres else device
    asked = math.ceil(cards * host if memory_gb is None else memory_gb)
    needed = max(SHORTEST_HOURS, profile.least_hours, needed_hours(cells, profile, cards))
    _check(cells[0].run.model, device, asked, profile, cards)
    for cell in (cell for cell, (home, _) in zip(cells, homes, strict=True) if home is None):
        raise TooLargeError(
            f"{needs.needs_all_weights(cell.run)} needs all weights of {cell.run.model_name} on the device; leave out "
            f"--weights {profile.weights}."
        )
    gpus = cards if profile.gres else 0
    return Request(cards, gpus, round(device, 1), asked, needed, min(needed, profile.hours))


def card_gb(profile: Profile) -> float:
    """Of one accelerator; without any, or with one of unknown size, there is no bound."""
    return profile.gpu_memory_gb or math.inf if profile.gres else math.inf


def fewest(cell: Cell, profile: Profile) -> int:
    """The fewest cards of a node that take the cell; the most that may share it where none do."""
    return several.fewest(cell.run, card_gb(profile), profile.cards, profile.weights)


def home_on(cell: Cell, profile: Profile, cards: int) -> tuple[str | None, float]:
    """As `needs.home_on`, with the weights where the jobs are told to have them."""
    return needs.home_on(cell.run, card_gb(profile), cards, profile.weights)


def cards(cells: Sequence[Cell], profile: Profile, memory_gb: float | None = None) -> int:
    """How many a job of these cells asks for."""
    count = max(fewest(cell, profile) for cell in cells)
    able = set.intersection(*(set(several.counts(cell.run, profile.cards)) for cell in cells))
    while needed_hours(cells, profile, count) > profile.hours and 2 * count in able:
        try:
            request(cells, profile, memory_gb, 2 * count)
        except TooLargeError:
            break
        if seconds(cells, profile, 2 * count) > (1 - WORTH) * seconds(cells, profile, count):
            break
        count *= 2
    return count


def needed_hours(cells: Sequence[Cell], profile: Profile, cards: int = 1) -> float:
    """On the safe side, of a job that may run that long."""
    work = sum(cell.work for cell in cells)
    times = sum(profile.times(kind(cell), SAFETY) * cell.work / work for cell in cells)
    return times * seconds(cells, profile, cards) / 3600


def kind(cell: Cell) -> str:
    """What cells have in common that stand in the same ratio to their estimates, in words."""
    run = cell.run
    recovery = {Retraining: "retraining", Reconstruction: "reconstruction"}.get(type(run.recovery))
    measured = "tasks" if any(isinstance(what, ZeroShot) for what in run.measures) else "no tasks"
    return ", ".join(filter(None, [method_name(run), recovery, measured]))


def slow(cells: Sequence[Cell], profile: Profile) -> dict[Cell, float]:
    """Those that would take more than PATIENCE_DAYS each, with their days."""
    days = {cell: needed_hours([cell], profile, cards([cell], profile)) / 24 for cell in cells}
    return {cell: needed for cell, needed in days.items() if needed > PATIENCE_DAYS}


def seconds(cells: Sequence[Cell], profile: Profile, cards: int = 1) -> float:
    """Of these cells on one machine, their shared statistics, steps of retraining and models made once.

    Every card reads the weights; training and measuring are shared evenly, calibration but for its sums.
    """
    run = cells[0].run
    made = makers(
        cells, lambda cell: home_on(cell, profile, cards)[0] != "away" or not _on_disk(cell.run, profile, cards)
    )
    statistics = shared_statistics(made).total()
    reading = sum(_reading_seconds(cell, profile, cards) for cell in made)
    loading = OVERHEAD_TOKENS * len(made)
    calibration = sum(cell.pruning_work for cell in made) - statistics
    everything = sum(cell.work for cell in cells) - statistics - taken_over(made).total()
    everything -= sum(cell.making_work for cell in cells) - sum(cell.making_work for cell in made)
    shared = (everything - loading - calibration) / cards
    tokens = loading + calibration * (ADDING_UP + (1 - ADDING_UP) / cards) + shared
    return reading + 2 * parameters_of(run.model) * tokens / (profile.teraflops * 1e12)


def _reading_seconds(cell: Cell, profile: Profile, cards: int) -> float:
    """Once from the disk, for all cards; of weights away from the device in every sweep, from CPU memory where they
    find room, else from the disk, where every card's own copy is."""
    once = _weights_gb(cell.run) / READING_GB_PER_SECOND
    if home_on(cell, profile, cards)[0] != "away":
        return once
    again = sweeps(cell.run) * _weights_gb(cell.run)
    if _on_disk(cell.run, profile, cards):
        return cards * again / READING_GB_PER_SECOND
    return once + again / BRINGING_GB_PER_SECOND


def _on_disk(run: Run, profile: Profile, cards: int) -> bool:
    """Whether weights that are not on the device find no room in CPU memory, where every process has its own."""
    if profile.weights in ("host", "disk"):
        return profile.weights == "disk"
    return bool(profile.memory_gb and 1.2 * _weights_gb(run) > profile.memory_gb / cards - LIBRARIES_GB)


def _host_gb(cell: Cell, profile: Profile, cards: int) -> float:
    """Of one process.  Weights away from the device are in CPU memory where the profile allows so much, else on the
    disk."""
    home, _ = home_on(cell, profile, cards)
    if home == "away" and _on_disk(cell.run, profile, cards):
        return 4 * _weights_gb(cell.run) / shapes.shape_of(cell.run.model).blocks
    key = cell.run.method.statistics_key if cell.run.method is not None else None
    gradients = 4e-9 * parameters_of(cell.run.model) if key and key["kind"] == "gradient_norms" else 0
    return 1.2 * _weights_gb(cell.run) + gradients


def _weights_gb(run: Run) -> float:
    return 1e-9 * BYTES.get(run.dtype, 2) * parameters_of(run.model)


def _check(model: str, device_gb: float, memory_gb: float, profile: Profile, cards: int) -> None:
    if profile.gpu_memory_gb and device_gb > profile.gpu_memory_gb:
        where = f"each of {cards} GPUs" if cards > 1 else "one GPU"
        otherwise = ", or leave out --weights device" if profile.weights == "device" else ""
        raise TooLargeError(
            f"{model} needs about {device_gb:.0f} GB on {where}, but this profile's GPUs have "
            f"{profile.gpu_memory_gb:g} GB; use a profile with larger ones, or one without gres{otherwise}."
        )
    if profile.memory_gb and memory_gb > profile.memory_gb:
        on = f"A job of {cards} processes" if cards > 1 else "A job"
        raise TooLargeError(
            f"{on} on {model} needs about {memory_gb:.0f} GB of memory, and this profile allows "
            f"{profile.memory_gb:g}; use another profile, or override the estimate with --memory-gb."
        )
