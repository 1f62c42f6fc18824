"""Tensors by name in safetensors files, each read from disk only when requested."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open

from pruners.lazy import Tensor, torch

DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class Tensors(Protocol):
    """Tensors by name, on the CPU, read when they are requested; `empty` describes one, on the meta device, unread."""

    @property
    def bytes_read(self) -> int: ...

    def __getitem__(self, name: str, /) -> Tensor: ...

    def __iter__(self) -> Iterator[str]: ...

    def __contains__(self, name: object, /) -> bool: ...

    def empty(self, name: str) -> Tensor: ...


class Shards(Mapping[str, Tensor]):
    """The tensors of these files, on the CPU; `bytes_read` counts what was read so far.

    Raises ValueError for a file that is damaged or not the one that it was at first, FileNotFoundError for one that is
    gone; each in one sentence that names it.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.bytes_read = 0
        self._places: dict[str, Path] = {}
        self._states: dict[Path, tuple[int, ...]] = {}
        self._open: dict[Path, Any] = {}
        self._lock = Lock()  # a thread may read ahead
        for path in map(Path, files):
            self._states[path] = _state(path)
            with _explained(path):
                self._open[path] = safe_open(path, framework="pt", backend="pread")
                self._places |= dict.fromkeys(self._open[path].keys(), path)

    @property
    def files(self) -> list[Path]:
        return list(self._states)

    def __getitem__(self, name: str) -> Tensor:
        path = self._places[name]
        if _state(path) != self._states[path]:
            raise ValueError(
                f"{path} changed while its weights were being read; restore the original file, and run again."
            )
        with _explained(path), self._lock:
            tensor: Tensor = self._open[path].get_tensor(name)
        self.bytes_read += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def empty(self, name: str) -> Tensor:
        """A tensor of that shape and type on the meta device; nothing but its description is read."""
        told = self._open[self._places[name]].get_slice(name)
        kind = told.get_dtype()
        return torch.empty(told.get_shape(), dtype=getattr(torch, DTYPES.get(kind, "uint8")), device="meta")


def _state(path: Path) -> tuple[int, ...]:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise FileNotFoundError(
            errno.ENOENT,
            f"{os.strerror(errno.ENOENT)}: a weight file is missing; restore it, and run again",
            str(path),
        ) from None
    return found.st_size, found.st_mtime_ns, found.st_ino


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The weights in {path} are damaged ({error}); save or fetch that file again.") from error
