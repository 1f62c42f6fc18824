"""Where a retraining stands, as one safetensors file: trained tensors, AdamW's moments, step and losses.

No pickle, so a checkpoint can be shared; nothing frozen, so it is small; written beside its place and renamed, so it
is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: nn.Module, *settings: object) -> str:
    """Of the settings' reprs and of every parameter's bits, summed up."""
    sums = [
        (name, list(p.shape), int(p.detach().contiguous().view(BITS[p.element_size()]).sum(dtype=torch.int64)))
        for name, p in model.named_parameters()
    ]
    return hashlib.sha256(repr((settings, sums)).encode()).hexdigest()


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Whole or not at all; `about` is plain JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")  # process ids repeat over hosts that share it
    try:
        save_file(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
            temporary,
            metadata={"about": json.dumps(about)},
        )
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: Path, mark: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Raises ValueError if the file is damaged or belongs to a run of another `fingerprint`."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to begin again.") from error
    if about.get("fingerprint") != mark:
        raise ValueError(
            f"{path} belongs to another run: its model, data or settings differ from this one's. Choose another "
            "folder, or delete it to begin again."
        )
    return tensors, about


def step_in(path: Path, mark: str) -> int:
    """The step that the state of this fingerprint has reached at `path`; 0 where there is none."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):  # `save` then replaces what lies there
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
