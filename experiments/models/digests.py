"""SHA-256 of whole files, each computed once and remembered: a model's weights are read once, not in every run.

A digest is remembered under the user's cache folder by the file's resolved path, size, times of change and inode, in a
small sealed file of its own, so that writers do not meet and damage is noticed.  What cannot be remembered, or was
damaged, is computed.  A file that changed within the last seconds is not remembered yet: a second change might carry
the same time.
"""

from __future__ import annotations

import hashlib
import logging
import stat
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from experiments.store import atomic, checksummed_json

BLOCK_BYTES = 2**22
SETTLED_NS = 2 * 10**9  # coarser than the clock of any file system in use
TOLD_BYTES = 2 * 10**9  # reading more than this is announced
logger = logging.getLogger(__name__)

_known: dict[str, dict[str, Any]] = {}  # of this process, by resolved path


def sha256(path: Path) -> str:
    """Of the file's content, as hexadecimal digits; OSError where it cannot be read."""
    path = Path(path).resolve()
    state = _state(path)
    for remembered in (_known.get(str(path)), _read(path)):
        if remembered is not None and remembered["state"] == state:
            _known[str(path)] = remembered
            return str(remembered["digest"])
    return _computed(path, state)


def all_of(paths: Iterable[Path]) -> list[str]:
    """The digests of these files in their order, several read at once."""
    paths = [Path(path).resolve() for path in paths]
    if all(str(path) in _known for path in paths):  # as a rule they have not changed since
        return [sha256(path) for path in paths]
    with ThreadPoolExecutor(max_workers=4) as pool:
        return list(pool.map(sha256, paths))


def folder() -> Path:
    return user_cache_path("pruning-tables") / "digests"


def _computed(path: Path, state: dict[str, Any]) -> str:
    if state["size"] > TOLD_BYTES:
        logger.warning("Reading %s once (%.1f GB) to identify the model.", path, state["size"] / 1e9)
    begun = time.time_ns()
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            total.update(block)
    digest = total.hexdigest()
    if state == _state(path) and begun - max(state["mtime_ns"], state["ctime_ns"]) > SETTLED_NS:
        _remember(path, {"state": state, "digest": digest})
    return digest


def _state(path: Path) -> dict[str, Any]:
    """What changes when the content does; the time of change also where the time of modification was put back.

    OSError for anything but a regular file: a pipe would be waited for.
    """
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is not a regular file")
    return {
        "path": str(path),
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
        "inode": found.st_ino,
        "device": found.st_dev,
    }


def _remember(path: Path, entry: dict[str, Any]) -> None:
    _known[str(path)] = entry
    with suppress(atomic.StorageError):  # then another process computes it again
        atomic.write(_place(path), checksummed_json.dumps(entry))


def _read(path: Path) -> dict[str, Any] | None:
    """None where nothing is remembered that can be trusted."""
    try:
        entry = checksummed_json.loads(_place(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return entry if {"state", "digest"} <= entry.keys() else None


def _place(path: Path) -> Path:
    return folder() / f"{hashlib.sha256(str(path).encode(errors='surrogateescape')).hexdigest()[:32]}.json"
