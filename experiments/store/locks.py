"""Locks between processes, of one machine or of several that share a file system.

Where the file system has flock, the kernel or the file server lets go of it when its holder dies.  Where it has not, or
where an NFS mount keeps it from other machines, a lease: a marker file that the holder touches again and again, and
that others may take once they have not seen it touched for LEASE_SECONDS of their own clocks.  A holder that was merely
asleep then does its work twice, which costs time and no result: whatever is locked here is written whole, and equal
work gives equal bits.

Nobody waits with a card in hand for what another process computes: shared statistics, pruned weights and dense values
are computed by each that finds none, and locked only while they are stored (`at_once`).  What is waited for is work
that two processes would go on with from the same unfinished files, hours of it: a cell (`experiments.batch`) and the
choice of a learning rate (`experiments.rates.settle`); and the embedded model's conversion, 20 seconds once.  Slurm
jobs hardly meet that: a cell that a living job has is not sent again, and jobs that need a choice wait in the queue.
"""

from __future__ import annotations

import errno
import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import lru_cache
from pathlib import Path

import psutil
from filelock import BaseFileLock, FileLock, SoftFileLease, Timeout

from experiments.store import atomic
from pruners.run import ranks
from pruners.weights import storage

LEASE_SECONDS = 180.0
AT_ONCE_SECONDS = 60.0  # that ranks wait before they tell each other that they do
OWN_LOCKS = {"nolock", "local_lock=flock", "local_lock=all"}
NO_FLOCK = {errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK}


@contextmanager
def held(path: Path, timeout: float = -1, otherwise: str = atomic.OTHERWISE) -> Iterator[None]:
    """The lock is held within the block; its folder is made where it is not there.

    Raises filelock.Timeout after `timeout` seconds (0: at once, -1: never), StorageError where no lock can be made,
    which names `otherwise` as a way out.
    """
    with storage.explained(path, otherwise):
        path.parent.mkdir(parents=True, exist_ok=True)
        taken = lock(path, timeout)
        with suppress(Timeout):  # an OSError, and no fault of the disk
            taken.acquire()
    if not taken.is_locked:
        raise Timeout(str(path))
    try:
        yield
    finally:
        taken.release()


@contextmanager
def at_once(path: Path) -> Iterator[bool]:
    """As `held` without waiting; False where another process has it."""
    with ExitStack() as stack:
        yield _entered(stack, path, 0)


@contextmanager
def shared(path: Path) -> Iterator[None]:
    """As `held`, which waits, for all ranks of a launch: rank 0 has the lock; the others are within the block, too."""
    together = ranks.here()
    timeout = AT_ONCE_SECONDS if together.count > 1 else -1
    with ExitStack() as stack:
        while not together.first(lambda: _entered(stack, path, timeout)):
            pass
        yield


def _entered(stack: ExitStack, path: Path, timeout: float) -> bool:
    try:
        stack.enter_context(held(path, timeout))
    except Timeout:
        return False
    return True


def lock(path: Path, timeout: float = -1) -> BaseFileLock:
    """Not acquired yet; `timeout` in seconds, 0 not to wait and -1 for ever, after which filelock.Timeout is raised."""
    if _has_flock(path.parent):
        return FileLock(path, timeout=timeout)
    return SoftFileLease(f"{path}.lease", lease_duration=LEASE_SECONDS, timeout=timeout)


@lru_cache
def _has_flock(folder: Path) -> bool:
    if _is_local(folder):
        return False
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in NO_FLOCK:
                return False
            raise
    return True


def _is_local(folder: Path) -> bool:
    """Whether the folder is shared by NFS, and locks on it hold on this machine alone."""
    place = folder.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if place.is_relative_to(mount.mountpoint)]
    nearest = max(mounts, key=lambda mount: len(mount.mountpoint), default=None)
    if nearest is None or not nearest.fstype.startswith("nfs"):
        return False
    return bool(OWN_LOCKS & set(nearest.opts.split(",")))
