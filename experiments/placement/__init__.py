"""Where a cell's weights are kept: on the device, in CPU memory or on disk, chosen by the free memory.

No choice moves a number.  What must have all weights in place (training all of them, speed, channels of the residual
stream) is told before any work where it is asked elsewhere.
"""

from __future__ import annotations

from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.placement import needs
from experiments.recovery import Retraining
from experiments.spec import Run
from pruners.run.ranks import Ranks
from pruners.weights import homes, memory, storage

if TYPE_CHECKING:
    from experiments.settings import Settings

HOMES = ("device", "host", "disk")
ROOM = 0.9  # of the free memory that an estimate may fill
SPARE_BYTES = 2**30  # on a disk, beside the pruned copy


@dataclass(frozen=True)
class Placement:
    """`home` is device, host or disk; `reason` completes the sentence "weights on the disk: ..."."""

    home: str
    reason: str

    def __str__(self) -> str:
        where = {"device": "on the device", "host": "in CPU memory", "disk": "on the disk"}[self.home]
        return f"Weights {where}: {self.reason}."


def agreed(run: Run, settings: Settings, together: Ranks) -> Placement:
    """What `choose` says on rank 0, for all ranks, each of which has its weights there."""
    home, reason = together.first(lambda: astuple(choose(run, settings, together.count)))
    return Placement(home, reason)


def choose(run: Run, settings: Settings, copies: int = 1) -> Placement:
    """As asked, or by the room, of which so many copies of the weights take their part in CPU memory; ValueError where
    the cell cannot run with its weights there."""
    whole = needs.needs_all_weights(run)
    if settings.weights == "auto":
        return _by_room(run, settings.place, settings.batch_size, whole, copies)
    if settings.weights != "device" and whole:
        raise ValueError(
            f"{whole} needs all weights of {run.model_name} on the device, {needs.all_weights_gb(run):.1f} GB; leave "
            f"out --weights {settings.weights}."
        )
    return Placement(settings.weights, "asked for")


def too_large(run: Run, settings: Settings, card_gb: float | None = None, cards: int = 1) -> str | None:
    """Why so many cards of that size (by default the device at hand) cannot take the cell, wherever its weights are;
    None for one that they take, and where the weights' place was asked for."""
    if settings.weights != "auto":
        return None
    device = settings.place
    if card_gb is None and device.startswith("cuda"):
        card_gb = memory.total_bytes(device) / 1e9
    if card_gb is not None:
        return needs.too_large(run, card_gb, cards)
    try:
        choose(run, settings, cards)
    except ValueError as error:
        return str(error)
    return None


def check_disk(run: Run, folder: Path, copies: int = 1) -> None:
    """StorageError where the disk of `folder` has no room for pruned copies of a model at home on the disk."""
    import shutil

    place = next(path for path in (folder, *folder.parents) if path.exists())
    merges = isinstance(run.recovery, Retraining) and run.recovery.trainable.adapters is not None
    needed, free = 1e9 * needs.weights_gb(run) * (1 + merges) * copies + SPARE_BYTES, shutil.disk_usage(place).free
    if free < needed:
        raise storage.StorageError(
            f"The pruned copy of {run.model_name} takes {needed / 1e9:.1f} GB and the disk of {place} has "
            f"{free / 1e9:.1f} GB left; free some space, or choose another folder with --results."
        )


def told(placement: Placement, model: Any) -> dict[str, Any]:
    """For the record: the choice, and of weights away from home how often and how much of them was read."""
    home = homes.of(model)
    if home is None:
        return asdict(placement)
    return {**asdict(placement), "sweeps": home.sweeps, "bytes_read": home.source.bytes_read}


def _by_room(run: Run, device: str, batch: int, whole: str | None, copies: int) -> Placement:
    kind, free = device.partition(":")[0], memory.free_bytes(device) / 1e9
    free /= copies if kind == "cpu" else 1
    needed = needs.cpu_gb(run, batch) if kind == "cpu" else needs.device_gb(run, batch=batch, cards=copies)
    there = f"about {needed:.1f} GB needed, {free:.1f} GB free on {kind}"
    if needed <= ROOM * free:
        return Placement("device", there)
    if whole:
        least = max(needs.weights_gb(run), needs.all_weights_gb(run) / copies)
        if least > free:
            raise ValueError(
                f"{whole} needs all weights of {run.model_name} on the device, {least:.1f} GB, and "
                f"{device} has {free:.1f} GB free; use a larger one."
            )
        return Placement("device", f"{there}, and {whole} needs all weights there")
    host = memory.free_bytes() / 1e9 / copies
    if kind != "cpu" and needs.weights_gb(run) <= ROOM * host:
        return Placement(
            "host", f"{there}; the weights are {needs.weights_gb(run):.1f} GB, {host:.1f} GB of CPU memory free"
        )
    return Placement(
        "disk", f"{there}; the weights are {needs.weights_gb(run):.1f} GB, {host:.1f} GB of CPU memory free"
    )
