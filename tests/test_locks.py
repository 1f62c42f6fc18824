"""Locks between processes, where the file system knows flock and where it does not."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import Timeout

from experiments.store import locks


def hold(path: Path, held, flock: bool) -> None:
    """Take the lock, say so and stay; importable, so that other processes can."""
    locks._has_flock = lambda folder: flock
    locks.LEASE_SECONDS = 1.0
    with locks.lock(path):
        held.set()
        signal.pause()


@pytest.fixture(params=[True, False], ids=["flock", "lease"])
def flock(request, monkeypatch) -> bool:
    monkeypatch.setattr(locks, "_has_flock", lambda folder: request.param)
    monkeypatch.setattr(locks, "LEASE_SECONDS", 1.0)
    return request.param


def test_one_process_holds_it_and_a_killed_one_no_longer(tmp_path, flock):
    context = multiprocessing.get_context("spawn")
    held, path = context.Event(), tmp_path / "cell.lock"
    holder = context.Process(target=hold, args=(path, held, flock))
    holder.start()
    assert held.wait(60)
    with pytest.raises(Timeout), locks.lock(path, timeout=2):  # twice as long as an untouched lease lasts
        pass
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with locks.lock(path, timeout=30):
        pass


def test_a_lease_of_a_machine_that_is_gone_is_taken_over(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_has_flock", lambda folder: False)
    monkeypatch.setattr(locks, "LEASE_SECONDS", 2.0)
    path, marker = tmp_path / "cell.lock", tmp_path / "cell.lock.lease"
    with locks.lock(path):
        text = marker.read_text()
    marker.write_text(text.replace(f"host={socket.gethostname()}", "host=elsewhere"))
    with pytest.raises(Timeout), locks.lock(path, timeout=0.5):  # not at once: it could be alive there
        pass
    with locks.lock(path, timeout=30):
        pass


def test_flock_is_there_unless_the_file_system_says_no(tmp_path, monkeypatch):
    assert locks._has_flock.__wrapped__(tmp_path)

    def refuse(number: int):
        def flock(*_):
            raise OSError(number, os.strerror(number))

        return flock

    monkeypatch.setattr(locks.fcntl, "flock", refuse(errno.ENOSYS))
    assert not locks._has_flock.__wrapped__(tmp_path)
    monkeypatch.setattr(locks.fcntl, "flock", refuse(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        locks._has_flock.__wrapped__(tmp_path)


@pytest.mark.parametrize(
    ("kind", "options", "flock"),
    [
        ("nfs4", "rw,vers=4.2,local_lock=none", True),
        ("nfs", "rw,vers=3,local_lock=posix", True),
        ("nfs", "rw,vers=3,nolock,local_lock=all", False),
        ("nfs", "rw,vers=3,local_lock=flock", False),
        ("nfs4", "rw,nolock", False),
        ("ext4", "rw,nolock", True),
    ],
)
def test_where_locks_of_a_shared_folder_are_this_machines_alone_a_lease_is_taken(
    tmp_path, monkeypatch, kind, options, flock
):
    mounts = [("/", "ext4", "rw"), (str(tmp_path), kind, options), (str(tmp_path / "other"), "nfs", "nolock")]
    asked = [SimpleNamespace(mountpoint=place, fstype=kind, opts=opts) for place, kind, opts in mounts]
    monkeypatch.setattr(locks.psutil, "disk_partitions", lambda all: asked)
    (folder := tmp_path / "results").mkdir()
    assert locks._has_flock.__wrapped__(folder) is flock
