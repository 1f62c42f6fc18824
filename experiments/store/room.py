"""Cleans up results/.cache: what nobody needs any more, and what is evicted above the size limit.

Nothing goes while a process holds its lock.  Statistics and pruned weights have a lock beside them, what a cell resumes
from has the cell's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from filelock import Timeout

from experiments.store import atomic, locks
from pruners.weights import storage

LIMIT_VARIABLE = "PRUNING_CACHE_GB"
DEFAULT_LIMIT_GB = 20.0
UNNAMED = ".tmp??????"  # of safetensors, whose temporary files an earlier version let lie beside their place
logger = logging.getLogger(__name__)


def limit_bytes() -> int:
    """Raises ValueError if the environment variable is not a number of gigabytes."""
    asked = os.environ.get(LIMIT_VARIABLE, str(DEFAULT_LIMIT_GB))
    try:
        limit = int(float(asked) * 1e9)
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise ValueError(f"{LIMIT_VARIABLE} is {asked!r}; give the cache's size in gigabytes, e.g. 20.")
    return limit


def statistics(root: Path) -> Path:
    return Path(root) / ".cache" / "statistics"


def unfinished(root: Path) -> Path:
    return Path(root) / ".cache" / "unfinished"


def cell_lock(root: Path, table: str, id: str) -> Path:
    """Held by the process that is at this cell."""
    return Path(root) / ".cache" / "started" / table / f"{id}.lock"


def make_room(root: Path, needed: int = 0) -> None:
    """Remove what killed writers left, then what was used least recently, until `needed` bytes fit under the limit."""
    for leftover in [*storage.leftovers(statistics(root)), *storage.leftovers(Path(root) / ".cache" / "dense")]:
        _remove(leftover, [_beside(leftover, _named(leftover))])
    for leftover in statistics(root).glob(UNNAMED):
        atomic.remove(leftover)
    entries = list(_entries(root))
    kept = sum(entry.bytes for entry in entries)
    for entry in sorted(entries, key=lambda entry: entry.used):
        if kept + needed <= limit_bytes():
            return
        if _remove(entry.path, entry.locks):
            kept -= entry.bytes


def sweep(root: Path, table: str, finished: Iterable[str]) -> None:
    """Remove what is left of cells that are finished, given by id, and of writers of this table that were killed."""
    started = cell_lock(root, table, "").parent
    for id in finished:
        for path in (unfinished(root) / table / id, started / id):
            if path.exists():
                _remove(path, [cell_lock(root, table, id)])
    for place in (Path(root) / "runs" / table, started):
        for leftover in storage.leftovers(place):
            _remove(leftover, [cell_lock(root, table, _named(leftover))])


@dataclass(frozen=True)
class _Entry:
    path: Path
    bytes: int
    used: float
    locks: list[Path]


def _entries(root: Path) -> Iterator[_Entry]:
    for path in statistics(root).glob("*.safetensors"):
        yield _entry(path, [_beside(path, path.stem)])
    for path in statistics(root).glob("*/"):
        if not path.name.startswith("."):
            yield _entry(path, [_beside(path, path.name)])
    for path in storage.leftovers(statistics(root)):  # of a writer that is at it
        yield _entry(path, [_beside(path, _named(path))])
    for path in unfinished(root).glob("*/*"):
        yield _entry(path, _locks_of_cell(root, path))


def _entry(path: Path, locks: list[Path]) -> _Entry:
    return _Entry(path, storage.size(path), _last_used(path), locks)


def _last_used(path: Path) -> float:
    inside = path.rglob("*") if path.is_dir() else ()
    times = []
    for file in (path, *inside):
        try:
            found = file.lstat()
            looked_at = 0.0 if file.is_dir() else found.st_atime
            times.append(max(found.st_mtime, looked_at))
        except FileNotFoundError:
            continue
    return max(times, default=0.0)


def _locks_of_cell(root: Path, path: Path) -> list[Path]:
    """Of the cell, or of all cells of the table that were ever started where several share what lies there."""
    table, name = path.parent.name, path.name
    if " " not in name:
        return [cell_lock(root, table, name)]
    return sorted(cell_lock(root, table, "").parent.glob("*.lock"))


def _named(leftover: Path) -> str:
    """The name, up to its first dot, of what the writer of a temporary file was at."""
    return leftover.name[1:].partition(".")[0]


def _beside(path: Path, name: str) -> Path:
    return path.with_name(f"{name}.lock")


def _remove(path: Path, held: Iterable[Path]) -> bool:
    """False where another process holds one of the locks, or none can be made."""
    try:
        with ExitStack() as stack:
            for lock in held:
                stack.enter_context(locks.held(lock, timeout=0))
            atomic.remove(path)
    except (Timeout, atomic.StorageError):
        return False
    return not path.exists()
