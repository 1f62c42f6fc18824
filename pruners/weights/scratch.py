"""A folder among the temporary files that does not outlive its process by much, however that ends.

It goes with the object that it was made for, and at the end of the process, of one that multiprocessing has started as
well, whose end `atexit` does not see.  What a killed process leaves is removed by the next one that makes such a
folder: its owner holds a lock on it, which the kernel lets go of when the owner dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import tempfile
from contextlib import suppress
from multiprocessing.util import Finalize
from pathlib import Path

from pruners.weights import storage

PREFIX = "pruned-weights-"
NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def folder_for(owner: object) -> Path:
    """A new folder that is there for as long as `owner` is."""
    place = Path(tempfile.gettempdir())
    for left in place.glob(f"{PREFIX}*"):
        if (lock := _locked(left)) is not None:
            storage.remove(left)
            os.close(lock)
    while True:
        made = Path(tempfile.mkdtemp(prefix=PREFIX, dir=place))
        lock = os.open(made, os.O_RDONLY)
        if _has_flock(lock, fcntl.LOCK_EX) and not made.exists():  # another has looked at it before it was locked
            os.close(lock)
            continue
        Finalize(owner, _end, (made, lock), exitpriority=0)
        return made


def _end(folder: Path, lock: int) -> None:
    storage.remove(folder)
    os.close(lock)


def _locked(folder: Path) -> int | None:
    """A descriptor of the folder with its lock; None where another holds that, or one cannot tell."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or another user's
        return None
    with suppress(BlockingIOError):
        if _has_flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB):
            return lock
    os.close(lock)
    return None


def _has_flock(lock: int, how: int) -> bool:
    """Lock it, where the file system can: where it cannot, what killed processes leave stays."""
    try:
        fcntl.flock(lock, how)
    except OSError as error:
        if error.errno in NO_FLOCK:
            return False
        raise
    return True
