"""Where a retraining stands, as one safetensors file: trained tensors, AdamW's moments, step and losses.

No pickle, so a checkpoint can be shared; nothing frozen, so it is small; written beside its place and renamed, so it
is whole; under a checksum that covers all of it and its name, so a damaged one is begun anew.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pruners import storage
from pruners.lazy import Tensor, nn, torch
from pruners.weights import homes

MOMENTS = ("exp_avg", "exp_avg_sq")
BITS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}
CHUNK = 2**22  # numbers at a time
logger = logging.getLogger(__name__)


class OtherRunError(ValueError):
    """A state belongs to a run of another model, other data or settings."""


def fingerprint(model: nn.Module, *settings: object) -> str:
    """Of the settings' reprs and of every parameter's bits, summed up plainly and weighted by their places."""
    found = {name: (list(p.shape), _sums(p.detach())) for part in homes.each(model) for name, p in part.items()}
    sums = [(name, *found[name]) for name, _ in model.named_parameters()]
    return hashlib.sha256(repr((settings, sums)).encode()).hexdigest()


def _sums(tensor: Tensor) -> tuple[int, int]:
    """Modulo 2^64."""
    plain = weighted = 0
    for index, chunk in enumerate(tensor.contiguous().view(-1).split(CHUNK)):
        bits = chunk.view(getattr(torch, BITS[chunk.element_size()])).long()
        places = torch.arange(1, len(bits) + 1, device=bits.device) + index * CHUNK
        plain, weighted = plain + int(bits.sum()), weighted + int((bits * places).sum())
    return plain % 2**64, weighted % 2**64


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bool:
    """Whole or not at all; `about` is plain JSON.  False, and one warning, where the disk refuses: work can go on."""
    try:
        for leftover in storage.leftovers(path.parent, path.name):  # of a killed writer: a run has its folder to itself
            storage.remove(leftover)
        storage.write_tensors(path, tensors, {**about, "name": path.name})
    except storage.StorageError as error:
        logger.warning("%s What a killed run would go on from is not kept.", error)
        return False
    return True


def load(path: Path, mark: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """None where there is nothing, or nothing that can be trusted, which is reported.

    Raises OtherRunError if the file belongs to a run of another `fingerprint`.
    """
    try:
        tensors, about = storage.read_tensors(path)
        if about.get("name") != path.name:
            raise storage.DamagedError(f"it was written as {about.get('name')}")
    except FileNotFoundError:
        return None
    except (storage.DamagedError, OSError) as error:
        logger.warning("Beginning again what %s held: %s.", path, error)
        with suppress(OSError):  # what it says of its step would keep the new state from taking its place
            path.unlink(missing_ok=True)
        return None
    _refuse_other(path, about, mark)
    return tensors, about


def refuse_other_at(path: Path, mark: str) -> None:
    """As `load` refuses, from what the file says about itself; what cannot be read is left to `load`."""
    try:
        about = storage.read_about(path)
    except (storage.DamagedError, OSError):
        return
    _refuse_other(path, about, mark)


def _refuse_other(path: Path, about: Mapping[str, Any], mark: str) -> None:
    if about.get("fingerprint") != mark:
        raise OtherRunError(
            f"{path} belongs to another run: its model, data or settings differ from this one's. Choose another "
            "folder, or delete it to begin again."
        )


def step_in(path: Path, mark: str) -> int:
    """The step that the state of this fingerprint has reached at `path`; 0 where there is none."""
    try:
        about = storage.read_about(path)
    except (storage.DamagedError, OSError):  # `save` then replaces what lies there
        return 0
    return int(about["step"]) if about.get("fingerprint") == mark else 0


def of_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"{moment}/{name}": optimizer.state[p][moment]
        for name, p in tensors.items()
        if p in optimizer.state
        for moment in MOMENTS
    }


def restore(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor], step: int
) -> None:
    """Trained tensors and moments as they were after `step` steps."""
    for name, p in tensors.items():
        p.data.copy_(saved[name])
        if f"exp_avg/{name}" in saved:
            moments = {moment: saved[f"{moment}/{name}"].to(p.device) for moment in MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
