"""Locks between processes, of one machine or of several that share a file system.

Where the file system has flock, the kernel or the file server lets go of it when its holder dies.  Where it has not, a
lease: a marker file that the holder touches again and again, and that others may take once they have not seen it
touched for LEASE_SECONDS of their own clocks.  A holder that was merely asleep then does its work twice, which costs
time and no result: whatever is locked here is written whole, and equal work gives equal bits.
"""

from __future__ import annotations

import errno
import fcntl
import tempfile
from functools import lru_cache
from pathlib import Path

from filelock import BaseFileLock, FileLock, SoftFileLease

LEASE_SECONDS = 180.0
NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


def lock(path: Path, timeout: float = -1) -> BaseFileLock:
    """Not acquired yet; `timeout` in seconds, 0 not to wait and -1 for ever, after which filelock.Timeout is raised."""
    if _has_flock(path.parent):
        return FileLock(path, timeout=timeout)
    return SoftFileLease(f"{path}.lease", lease_duration=LEASE_SECONDS, timeout=timeout)


@lru_cache
def _has_flock(folder: Path) -> bool:
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_FLOCK:
                return False
            raise
    return True
