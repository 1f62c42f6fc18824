"""Temporary folders of weights go with their process, however it ends, and with no other one."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import tempfile
from pathlib import Path

import pytest

from pruners.weights import scratch


class Owner:
    pass


def worker(place: str, told, wait) -> None:
    """Ends in the way of multiprocessing, by os._exit, which no `atexit` sees."""
    tempfile.tempdir = place
    owner = Owner()
    folder = scratch.folder_for(owner)
    (folder / "block.safetensors").write_bytes(b"weights")
    told.put(str(folder))
    wait.wait()


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def started(place: Path):
    context = multiprocessing.get_context("spawn")
    told, wait = context.Queue(), context.Event()
    process = context.Process(target=worker, args=(str(place), told, wait))
    process.start()
    return process, Path(told.get(timeout=60)), wait


def test_a_worker_takes_its_folder_with_it_and_a_killed_ones_goes_with_the_next(place):
    ended, of_ended, wait = started(place)
    killed, of_killed, _ = started(place)
    assert sorted(place.iterdir()) == sorted([of_ended, of_killed])
    wait.set()
    ended.join()
    assert list(place.iterdir()) == [of_killed]
    alive = Owner()
    mine = scratch.folder_for(alive)  # of_killed's process is at work still
    assert sorted(place.iterdir()) == sorted([mine, of_killed])
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert of_killed.is_dir()
    other = Owner()
    others = scratch.folder_for(other)
    assert sorted(place.iterdir()) == sorted([mine, others])
    del alive
    assert list(place.iterdir()) == [others]


def test_where_nothing_can_be_locked_nothing_is_removed(place, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = Owner(), Owner()
    folders = [scratch.folder_for(first), scratch.folder_for(second)]
    assert all(folder.is_dir() for folder in folders)
    del first, second
    assert not list(place.iterdir())
