"""Atomic files under the results folder, and one sentence where writing to a disk fails."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pruners.weights import storage
from pruners.weights.storage import StorageError, remove

__all__ = ["StorageError", "check_writable", "explained", "read", "remove", "replacing", "write"]

OTHERWISE = "choose another folder with --results"
PROBE_BYTES = 2**20  # several records


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write a file to; it takes the place of `path` when the block ends without an error.

    Raises StorageError, and leaves nothing behind, where the folder cannot be written or the disk is full.
    """
    with storage.replacing(path, OTHERWISE) as temporary:
        yield temporary


def write(path: Path, text: str) -> None:
    """Put `text` at `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read(path: Path) -> str:
    """The text of a regular file; OSError for anything else, such as a pipe, at which reading would wait for ever, and
    ValueError for bytes that are no text."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is not a regular file")
    try:
        return path.read_bytes().decode()  # a carriage return stays what it is
    except UnicodeDecodeError as error:
        raise ValueError("it is not text, so it was damaged") from error


def check_writable(folder: Path, otherwise: str = OTHERWISE) -> None:
    """Raises StorageError now rather than after the work is done: a MiB is written there, flushed and removed.

    The bytes are random, for some file systems keep a MiB of zeros in no space at all.
    """
    with storage.explained(folder, otherwise):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(os.urandom(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an error of the system into one sentence that names the file and the way out."""
    with storage.explained(path, OTHERWISE):
        yield
