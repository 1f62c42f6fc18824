"""How much device memory a cell takes, and whether a card of some size has it; what takes it is told in `stages`."""

from __future__ import annotations

from experiments import models
from experiments.placement import stages
from experiments.placement.stages import BYTES
from experiments.recovery import Retraining
from experiments.spec import Efficiency, Run

BATCH = 8  # windows at once, by default
CONTEXT_BYTES = 0.8e9  # of the accelerator's own libraries
SLACK = 1.05  # of an allocator


def device_bytes(run: Run, away: bool = False, batch: int = BATCH, cards: int = 1) -> stages.Items:
    """By item, at the stage where they take most together, on each of so many `cards` that share the cell.

    `away`: weights in CPU memory or on the disk.
    """
    home = "disk" if away else "device"
    there = [{k: v for k, v in items.items() if k != stages.HOME} for items in stages.of(run, home, batch, cards)]
    return max(there, key=lambda items: sum(items.values()))


def cpu_bytes(run: Run, home: str = "device", batch: int = BATCH) -> stages.Items:
    """The same where the CPU is the device, and what is kept at home lies in the same memory.

    Weights whose `home` is host are used where they lie.  Training keeps the activations of all blocks.
    """
    found = stages.of(run, home, batch, 1, on_gpu=False)
    if home == "host":
        found = [{**items, "weights": 1e9 * weights_gb(run)} for items in found]
    return max(found, key=lambda items: sum(items.values()))


def cpu_gb(run: Run, batch: int = BATCH) -> float:
    """What they are together with the weights in place, with an allocator's slack."""
    return 1e-9 * SLACK * sum(cpu_bytes(run, batch=batch).values())


def device_gb(run: Run, away: bool = False, batch: int = BATCH, cards: int = 1) -> float:
    """What they are together, with an allocator's slack and the accelerator's libraries."""
    return 1e-9 * (SLACK * sum(device_bytes(run, away, batch, cards).values()) + CONTEXT_BYTES)


def home_on(run: Run, card_gb: float, cards: int = 1, weights: str = "auto") -> tuple[str | None, float]:
    """Where weights are on so many cards of that size, and the memory of a card that the cell takes then in GB.

    `device`, or `away`, as far as `weights` leaves the choice; None, with what the nearest of the two takes, where
    neither fits.
    """
    whole = device_gb(run, cards=cards)
    if whole <= card_gb and weights in ("auto", "device"):
        return "device", whole
    if weights == "device" or needs_all_weights(run):
        return None, whole
    part = device_gb(run, away=True, cards=cards)
    if part > card_gb:  # then fewer windows go through a block at once
        part = max(card_gb, device_gb(run, away=True, batch=1, cards=cards))
    return ("away" if part <= card_gb else None), part


def too_large(run: Run, card_gb: float, cards: int = 1) -> str | None:
    """Why no home of the weights lets the cell run on a card of that size; None where one does."""
    home, needed = home_on(run, card_gb, cards)
    if home is not None:
        return None
    whole = needs_all_weights(run)
    why = f", as {whole} needs all weights on the device" if whole else ""
    where = "one GPU, which has" if cards == 1 else f"each of {cards} GPUs, which have"
    return f"{run.model_name} needs about {needed:.0f} GB on {where} {card_gb:g} GB{why}."


def weights_gb(run: Run) -> float:
    return 1e-9 * BYTES.get(run.dtype, 2) * (models.find(run.model).parameters or 0)


def trains_all_weights(run: Run) -> bool:
    return isinstance(run.recovery, Retraining) and run.recovery.trainable.weights


def all_weights_gb(run: Run) -> float:
    """What all weights take at the least where they must be in place; trained ones in float32, with gradient and
    moments."""
    return 16e-9 * (models.find(run.model).parameters or 0) if trains_all_weights(run) else weights_gb(run)


def needs_all_weights(run: Run) -> str | None:
    """What of a cell cannot be done with weights away from the device."""
    if trains_all_weights(run):
        return "training all weights"
    if run.method is not None and run.method.needs_all_weights:
        return "pruning channels of the residual stream"
    return "the speed of a model" if times_the_model(run) else None


def times_the_model(run: Run) -> bool:
    return any(isinstance(what, Efficiency) and what.batch_sizes and what.lengths for what in run.measures)
