"""Files that are whole or absent: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ADVICE = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "your quota is used up; remove what you no longer need",
    errno.EFBIG: "the allowed file size is too small (ulimit -f)",
    errno.EACCES: "allow yourself to write there",
    errno.EPERM: "allow yourself to write there",
    errno.EROFS: "that file system is read-only",
}


class StorageError(OSError):
    """A file could not be written; the message says why and what to do."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes the place of `path` when the block ends without an error.

    Raises StorageError, and leaves nothing behind, where the folder cannot be written or the disk is full.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~_umask())
            _flush(temporary)
            temporary.replace(path)
            _flush(path.parent)
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()


def write(path: Path, text: str) -> None:
    """Put `text` at `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def check_writable(folder: Path) -> None:
    """Raises StorageError now rather than after the work is done."""
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turns an operating-system error into one sentence that names the file and the way out."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        way_out = ADVICE.get(error.errno or 0, "check that path")
        reason = (error.strerror or str(error)).lower()
        raise StorageError(
            f"Cannot write {path}: {reason}; {way_out}, or choose another folder with --results."
        ) from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
