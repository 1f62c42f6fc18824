"""Dense statistics that several cells share, on disk: results/.cache/statistics/<digest>.safetensors.

Those of a model at home on the disk are a folder of that name, whose files are read when they are asked for.  All are
written atomically, verified by a checksum that covers their key when read, and removed least recently used first above
a size limit (20 GB, or PRUNING_CACHE_GB), which holds for whatever lies in the cache folder.  Two processes that find
nothing both compute, as waiting would hold a card for as long; the first that is done stores.  A disk that refuses
costs the next cell its time and this one nothing.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from experiments.store import atomic, locks, room
from experiments.store.described import digest
from experiments.store.room import DEFAULT_LIMIT_GB, LIMIT_VARIABLE, limit_bytes
from pruners.lazy import Tensor
from pruners.run import ranks
from pruners.weights import storage
from pruners.weights.shards import Shards

__all__ = ["DEFAULT_LIMIT_GB", "LIMIT_VARIABLE", "folder", "limit_bytes", "read", "statistics", "write"]
logger = logging.getLogger(__name__)

Statistics = dict[str, Tensor]
T = TypeVar("T")


def statistics(
    root: Path, key: dict[str, Any], compute: Callable[[], Mapping[str, Tensor]], on_disk: bool = False
) -> Mapping[str, Tensor]:
    """The tensors stored under `key`, or those of `compute()`, which are then stored.

    `key` names everything that can move them.  What cannot be stored is reported and used all the same; what another
    process has stored meanwhile, or is storing, is left as it is.  With `on_disk` what is found is read when it is
    asked for, one tensor at a time.  The ranks of a launch compute together; rank 0 stores.
    """
    path, limit, told = folder(root) / f"{digest(key)}.safetensors", limit_bytes(), json.dumps(key, sort_keys=True)
    together, before = ranks.here(), _written(path)
    found = _either(path, told, on_disk)
    if all(together.each(lambda: found is not None)):
        assert found is not None
        return found
    if found is not None:
        logger.warning("Computing again what %s holds: not every process of this launch can read it.", path)
    computed = compute()
    if not isinstance(computed, Shards):
        computed = _on_cpu(computed)
    moved: list[Shards] = []
    together.first(lambda: moved.extend(_store(root, path, computed, told, limit, before)))
    return moved[0] if moved else computed


def folder(root: Path) -> Path:
    return room.statistics(root)


def write(path: Path, tensors: Statistics, key: str) -> None:
    """Whole or not at all, with a checksum that covers `key`; StorageError where the disk refuses."""
    for leftover in storage.leftovers(path.parent, path.name):  # of a killed process: the lock is ours
        atomic.remove(leftover)
    storage.write_tensors(path, tensors, {"key": key}, atomic.OTHERWISE)


def read(path: Path, key: str) -> Statistics | None:
    """None where there is nothing, or nothing that can be trusted and was written under `key`, which is reported."""
    return _trusted(path, key, storage.read_tensors)


def _trusted(path: Path, key: str, look: Callable[[Path], tuple[T, dict[str, Any]]]) -> T | None:
    """The first of what `look` finds in the file and says about it."""
    try:
        found, about = look(path)
        if about.get("key") != key:
            raise storage.DamagedError("it was written for another file")
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # of another time it would be another file
    except FileNotFoundError:
        return None
    except storage.DamagedError as error:
        logger.warning("Computing again, as %s cannot be used: %s.", path, error)
        return None
    except OSError as error:  # of a disk that can only be read
        logger.debug("%s is not marked as used: %s", path, error)
    return found


def _written(path: Path) -> list[tuple[int, int]]:
    """Tells one writing of an entry from another; empty where there is none that could be read."""
    found = []
    for place in (path, _parts(path)):
        with suppress(OSError):
            about = place.stat()
            found.append((about.st_ino, about.st_mtime_ns))
    return found


def _either(path: Path, key: str, on_disk: bool) -> Mapping[str, Tensor] | None:
    """What the file holds, or the folder of that name; read now, or only verified where it is to be left `on_disk`."""
    files = [path] if path.exists() else sorted(_parts(path).glob("*.safetensors"))
    keys = [key] if path.exists() else _keys(key, len(files))
    look: Callable[[Path], Any] = storage.verified_tensors if on_disk else storage.read_tensors
    found = {}
    for file, own in zip(files, keys, strict=True):
        if (tensors := _trusted(file, own, look)) is None:
            return None
        found[file] = tensors
    if on_disk and files:
        try:
            return Shards(files)
        except FileNotFoundError:  # removed to make room
            return None
    return {name: tensor for tensors in found.values() for name, tensor in tensors.items()} or None


def _parts(path: Path) -> Path:
    return path.with_suffix("")


def _keys(key: str, count: int) -> list[str]:
    """Of so many files, none of which is to be missing."""
    return [f"{key} {number} of {count}" for number in range(count)]


def _store(
    root: Path, path: Path, computed: Mapping[str, Tensor], key: str, limit: int, before: list[tuple[int, int]]
) -> list[Shards]:
    """Keep what was computed, unless somebody else does; what lies in the cell's own folder is then read from here."""
    try:
        with locks.at_once(path.with_suffix(".lock")) as alone:
            if not alone or _written(path) != before:
                return []
            if isinstance(computed, Shards):  # on the disk, where the weights are at home
                return _move(root, path, computed, key, limit)
            _keep(root, path, dict(computed), key, limit)
    except atomic.StorageError as error:
        _not_kept(error)
    return []


def _move(root: Path, path: Path, computed: Shards, key: str, limit: int) -> list[Shards]:
    """From the cell's own folder to the cache's, file by file; nothing where there is no room."""
    if not _has_room(root, sum(storage.size(file) for file in computed.files), limit):
        return []
    atomic.remove(path)
    atomic.remove(_parts(path))
    with storage.filling(_parts(path), atomic.OTHERWISE) as folder:
        for number, own in enumerate(_keys(key, len(computed.files))):
            tensors, _ = storage.read_tensors(computed.files[number])
            storage.write_tensors(folder / f"{number:05}.safetensors", tensors, {"key": own}, atomic.OTHERWISE)
    for file in computed.files:
        storage.remove(file)
    return [Shards(sorted(_parts(path).iterdir()))]


def _on_cpu(computed: Mapping[str, Tensor]) -> Statistics:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in computed.items()}


def _keep(root: Path, path: Path, tensors: Statistics, key: str, limit: int) -> None:
    if _has_room(root, sum(tensor.nbytes for tensor in tensors.values()), limit):
        atomic.remove(_parts(path))
        write(path, tensors, key)


def _has_room(root: Path, size: int, limit: int) -> bool:
    """Whether the cache may hold so much more, for which it makes room then."""
    if size > limit:
        logger.warning(
            "Statistics of %.1f GB are not cached: the cache is limited to %.1f GB; set %s to raise the limit.",
            size / 1e9, limit / 1e9, LIMIT_VARIABLE,
        )  # fmt: skip
        return False
    room.make_room(root, size)
    return True


def _not_kept(error: atomic.StorageError) -> None:
    logger.warning(
        "%s Statistics are not cached, and every cell computes its own; %s=0 switches the cache off.",
        error,
        LIMIT_VARIABLE,
    )
