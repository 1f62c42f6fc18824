"""Dense statistics that several cells share, on disk: results/.cache/statistics/<digest>.safetensors.

Written atomically, verified by a checksum that covers their key when read, computed once even by two processes, and
removed least recently used first above a size limit (20 GB, or PRUNING_CACHE_GB), which holds for whatever lies in the
cache folder.  A disk that refuses costs the next cell its time and this one nothing.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from experiments.spec import digest
from experiments.store import atomic, locks, room
from experiments.store.room import DEFAULT_LIMIT_GB, LIMIT_VARIABLE, limit_bytes
from pruners import ranks, storage
from pruners.lazy import Tensor

__all__ = ["DEFAULT_LIMIT_GB", "LIMIT_VARIABLE", "folder", "limit_bytes", "read", "statistics", "write"]
logger = logging.getLogger(__name__)

Statistics = dict[str, Tensor]


def statistics(root: Path, key: dict[str, Any], compute: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The tensors stored under `key`, or those of `compute()`, which are then stored.

    `key` names everything that can move them.  A second process asking for the same key waits for the first.  What
    cannot be stored is reported and used all the same; what is no dictionary, but read from a disk when it is asked
    for, stays there for the cell alone.  The ranks of a launch compute together; rank 0 stores.
    """
    path, limit, told = folder(root) / f"{digest(key)}.safetensors", limit_bytes(), json.dumps(key, sort_keys=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.shared(path.with_suffix(".lock")))
        except atomic.StorageError as error:
            _not_kept(error)
            computed = compute()
            return _on_cpu(computed) if isinstance(computed, dict) else computed
        together = ranks.here()
        held: list[Statistics] = []
        if together.first(lambda: _found(path, told, held)):
            return held[0] if held else _read_along(path, told)
        computed = compute()
        if not isinstance(computed, dict):  # on the disk, where the weights are at home
            return computed
        found = _on_cpu(computed)
        together.first(lambda: _keep(root, path, found, told, limit))
        return found


def folder(root: Path) -> Path:
    return room.statistics(root)


def write(path: Path, tensors: Statistics, key: str) -> None:
    """Whole or not at all, with a checksum that covers `key`; StorageError where the disk refuses."""
    for leftover in storage.leftovers(path.parent, path.name):  # of a killed process: the lock is ours
        atomic.remove(leftover)
    storage.write_tensors(path, tensors, {"key": key}, atomic.OTHERWISE)


def read(path: Path, key: str) -> Statistics | None:
    """None where there is nothing, or nothing that can be trusted and was written under `key`, which is reported."""
    try:
        tensors, about = storage.read_tensors(path)
        if about.get("key") != key:
            raise storage.DamagedError("it belongs to another place")
        os.utime(path)
    except FileNotFoundError:
        return None
    except storage.DamagedError as error:
        logger.warning("Computing again what %s held: %s.", path, error)
        return None
    except OSError as error:  # of a disk that can only be read
        logger.debug("%s is not marked as used: %s", path, error)
    return tensors


def _found(path: Path, key: str, held: list[Statistics]) -> bool:
    held += [found for found in (read(path, key),) if found is not None]
    return bool(held)


def _read_along(path: Path, key: str) -> Statistics:
    """Of the other ranks, while rank 0 holds the lock."""
    found = read(path, key)
    if found is None:
        raise ValueError(f"Rank 0 has read {path} and another rank cannot; all ranks need the same results folder.")
    return found


def _on_cpu(computed: Statistics) -> Statistics:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in computed.items()}


def _keep(root: Path, path: Path, tensors: Statistics, key: str, limit: int) -> None:
    size = sum(tensor.nbytes for tensor in tensors.values())
    if size > limit:
        logger.warning(
            "Statistics of %.1f GB are not kept: the cache holds %.1f GB; set %s to raise that.",
            size / 1e9, limit / 1e9, LIMIT_VARIABLE,
        )  # fmt: skip
        return
    room.make_room(root, size)
    try:
        write(path, tensors, key)
    except atomic.StorageError as error:
        _not_kept(error)


def _not_kept(error: atomic.StorageError) -> None:
    logger.warning("%s Statistics are not kept and cells compute their own; %s=0 keeps none.", error, LIMIT_VARIABLE)
