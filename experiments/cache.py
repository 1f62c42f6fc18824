"""Dense statistics that several cells share, on disk: results/.cache/statistics/<digest>.safetensors.

Written atomically, verified by checksum when read, computed once even by two processes, and removed least recently
used first above a size limit (20 GB, or PRUNING_CACHE_GB).
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from experiments import files
from experiments.locks import lock
from experiments.spec import digest

LIMIT_VARIABLE = "PRUNING_CACHE_GB"
DEFAULT_LIMIT_GB = 20.0
logger = logging.getLogger(__name__)

Statistics = dict[str, Tensor]


def statistics(root: Path, key: dict[str, Any], compute: Callable[[], Statistics]) -> Statistics:
    """The tensors stored under `key`, or those of `compute()`, which are then stored.

    `key` names everything that can move them.  A second process asking for the same key waits for the first.
    """
    path = folder(root) / f"{digest(key)}.safetensors"
    with files.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = lock(_lock(path))
        held.acquire()
    try:
        return read(path) or _computed(path, compute)
    finally:
        held.release()


def folder(root: Path) -> Path:
    return Path(root) / ".cache" / "statistics"


def limit_bytes() -> int:
    """Raises ValueError if the environment variable is not a number of gigabytes."""
    asked = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_GB))
    try:
        return int(float(asked) * 1e9)
    except ValueError:
        raise ValueError(f"{LIMIT_VARIABLE} is {asked!r}; give the cache's size in gigabytes, e.g. 20.") from None


def write(path: Path, tensors: Statistics) -> None:
    """Contiguous tensors on the CPU, whole or not at all, with their checksum; StorageError where the disk refuses."""
    with files.replacing(path) as temporary:
        _save(tensors, temporary, path)


def read(path: Path) -> Statistics | None:
    """None where there is nothing, or nothing that can be trusted, which is reported."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            expected = (file.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        logger.warning("Computing again what %s held: it cannot be read (%s).", path, error)
        return None
    if _checksum(tensors) != expected:
        logger.warning("Computing again what %s held: its checksum does not match.", path)
        return None
    os.utime(path)
    return tensors


def _computed(path: Path, compute: Callable[[], Statistics]) -> Statistics:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in compute().items()}
    size, limit = sum(tensor.nbytes for tensor in tensors.values()), limit_bytes()
    if size > limit:
        logger.warning(
            "Statistics of %.1f GB are not kept: the cache holds %.1f GB; set %s to raise that.",
            size / 1e9, limit / 1e9, LIMIT_VARIABLE,
        )  # fmt: skip
        return tensors
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):  # of a killed process: the lock is ours now
        leftover.unlink()
    _make_room(path.parent, limit - size)
    write(path, tensors)
    return tensors


def _save(tensors: Statistics, temporary: Path, path: Path) -> None:
    try:
        save_file(tensors, temporary, metadata={"sha256": _checksum(tensors)})
    except SafetensorError as error:  # how it reports a full disk
        raise files.StorageError(
            f"Cannot write {path}: {error}; free some space on that disk, choose another folder with --results, or "
            f"set {LIMIT_VARIABLE}=0 to keep no statistics."
        ) from error


def _make_room(place: Path, allowed_bytes: int) -> None:
    entries = {path: path.stat() for path in place.glob("*.safetensors")}
    held = sum(state.st_size for state in entries.values())
    for path in sorted(entries, key=lambda path: entries[path].st_mtime):
        if held <= allowed_bytes:
            return
        held -= _remove(path)


def _remove(path: Path) -> int:
    """Bytes freed: none while another process holds the entry."""
    try:
        with lock(_lock(path), timeout=0):
            size = path.stat().st_size
            path.unlink()
            return size
    except (Timeout, FileNotFoundError):
        return 0


def _checksum(tensors: Statistics) -> str:
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def _lock(path: Path) -> Path:
    return path.with_suffix(".lock")
