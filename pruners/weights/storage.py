"""Atomic files, tensors with a checksum, and one sentence where writing to a disk fails.

Whatever is written goes into a hidden folder beside its place, is flushed to the disk and then renamed.  The folder
carries the name of what it is for, so that what a killed writer leaves behind, temporary files of its libraries
included, can be told and removed by the next one.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pruners.lazy import Tensor, torch

OTHERWISE = "choose another folder"
ADVICE = {
    errno.ENOSPC: "free some space on that disk",
    errno.EDQUOT: "your quota is used up; remove what you no longer need",
    errno.EFBIG: "the allowed file size is too small (ulimit -f)",
    errno.EACCES: "allow yourself to write there",
    errno.EPERM: "allow yourself to write there",
    errno.EROFS: "that file system is read-only",
}


class StorageError(OSError):
    """A file could not be written; the message says why and what to do, `errno` is the system's where there is one."""

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


class DamagedError(ValueError):
    """A file does not hold what was written there; the message is the reason, without the path."""


@contextmanager
def explained(path: Path, otherwise: str = OTHERWISE) -> Iterator[None]:
    """Turns an error of the system into a StorageError: one sentence that names `path` and the way out.

    Libraries written in Rust (safetensors, tokenizers) raise classes of their own, whose text ends with the number of
    the system's error; these count as well.  Other errors pass.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else _told_number(error)
        if number is None and not isinstance(error, OSError) and "null byte" not in str(error):
            raise
        said = (os.strerror(number) if number else str(error)).lower()
        way_out = ADVICE.get(number or 0, "check that path")
        raise StorageError(f"Cannot write {_shown(path)}: {said}; {way_out}, or {otherwise}.", number) from error


@contextmanager
def replacing(path: Path, otherwise: str = OTHERWISE, flushed: bool = True) -> Iterator[Path]:
    """A temporary name to write a file to; it takes the place of `path` when the block ends without an error.

    What is not `flushed` outlives the process, not the machine.  Raises StorageError, and leaves nothing behind, where
    the folder cannot be written or the disk is full.
    """
    with explained(path, otherwise):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
        try:
            temporary = beside / path.name
            yield temporary
            temporary.chmod(0o666 & ~UMASK)
            if flushed:
                flush(temporary)
            temporary.replace(path)
            if flushed:
                flush(path.parent)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def filling(folder: Path, otherwise: str = OTHERWISE) -> Iterator[Path]:
    """A place to write files to, which become those of `folder`, new or empty, when the block ends without an error.

    Raises FileExistsError for a folder that holds something, StorageError, and leaves nothing behind, where it cannot
    be written.  What killed processes of this machine have left of the same folder is removed.
    """
    above = [path for path in folder.parents if not os.path.exists(path)]
    place = folder if os.path.isdir(folder) else folder.parent  # one that is there may be a mount or a working folder
    mine = f".{folder.name}.{platform.node()}-"
    try:
        with explained(folder, otherwise):
            place.mkdir(parents=True, exist_ok=True)
            for path in leftovers(place, folder.name):
                process = path.name.removeprefix(mine).removesuffix(".tmp")
                if process.isdecimal() and not _runs(int(process)):
                    remove(path)
            used = os.path.exists(folder) and (place is not folder or any(folder.iterdir()))
        if used:
            raise FileExistsError(f"{folder} already exists and is not empty; choose another folder or empty this one.")
        with explained(folder, otherwise):
            beside = place / f"{mine}{os.getpid()}.tmp"
            beside.mkdir()
            try:
                yield beside
                for path in beside.rglob("*"):  # some libraries write files that nobody else may read
                    if path.is_file():
                        path.chmod(0o666 & ~UMASK)
                _take_place(beside, folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
    except BaseException:
        for path in above:
            with suppress(OSError):
                path.rmdir()
        raise


def _take_place(beside: Path, folder: Path) -> None:
    files = sorted(beside.iterdir(), key=lambda path: path.name == "config.json")  # last: with it the folder is a model
    for path in files:
        flush(path)
    if not folder.exists():
        beside.replace(folder)
    else:
        moved: list[Path] = []
        try:
            for path in files:
                moved.append(path.replace(folder / path.name))
        except BaseException:
            for path in moved:
                path.unlink()
            raise
    flush(folder.parent)


def _runs(process: int) -> bool:
    """Whether another process of that number does."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return process != os.getpid()


def leftovers(folder: Path, name: str = "*") -> list[Path]:
    """What writers of the file `name` in `folder` have left there, or are writing now."""
    return sorted(folder.glob(f".{name if name == '*' else glob.escape(name)}.*.tmp"))


def remove(path: Path) -> None:
    """A file or a folder with all it holds, if it is there and may be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        try:
            path.unlink(missing_ok=True)
        except OSError:
            return


def size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; 0 for what is gone."""
    try:
        inside = path.rglob("*") if path.is_dir() else [path]
        return sum(file.lstat().st_size for file in inside if not file.is_dir())
    except FileNotFoundError:
        return 0


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    otherwise: str = OTHERWISE,
    flushed: bool = True,
) -> None:
    """A safetensors file, whole or not at all; `about` is plain JSON.  A checksum covers every tensor and `about`."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(about)
    with replacing(path, otherwise, flushed) as temporary:
        from safetensors.torch import save_file

        save_file(ready, temporary, metadata={"about": text, "sha256": _checksum(ready, text)})


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_tensors` was given; DamagedError unless it is that to the bit, FileNotFoundError without a file."""
    about, text, expected = _header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # a damaged header can name types and shapes that torch cannot make
        raise DamagedError(f"it cannot be read ({error})") from error
    if _checksum(tensors, text) != expected:
        raise DamagedError("its checksum does not match")
    return tensors, about


def verified_tensors(path: Path) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The same with tensors that are read, one by one, when they are asked for, as they were to be verified."""
    from pruners.weights.shards import Shards

    about, text, expected = _header(path)
    try:
        tensors = Shards([path])
        found = _checksum(tensors, text)
    except ValueError as error:
        raise DamagedError(f"it cannot be read ({error})") from error
    if found != expected:
        raise DamagedError("its checksum does not match")
    return tensors, about


def read_about(path: Path) -> dict[str, Any]:
    """The `about` of a file whose tensors are not looked at, and are not verified; raises as `read_tensors` does."""
    return _header(path)[0]


def _header(path: Path) -> tuple[dict[str, Any], str, str | None]:
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not path.is_file():  # a pipe would be waited at for ever
        raise DamagedError("it is not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
        about = json.loads(told["about"])
    except (SafetensorError, OSError, KeyError, ValueError, RecursionError) as error:
        raise DamagedError(f"it cannot be read ({error})") from error
    if not isinstance(about, dict):
        raise DamagedError("it has no description of its contents")
    return about, told["about"], told.get("sha256")


def _checksum(tensors: Mapping[str, Tensor], about: str) -> str:
    total = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return total.hexdigest()


def flush(path: Path) -> None:
    """A file's content, or a folder's names, onto the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _told_number(error: Exception) -> int | None:
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None


def _shown(path: Path) -> str:
    return repr(str(path)) if "\0" in str(path) else str(path)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


UMASK = _umask()  # once: asking is no safe thing where threads write
