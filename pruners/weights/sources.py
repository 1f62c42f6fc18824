"""Storage of tensors by their names in a model: CPU memory, or a checkpoint's files and what was changed since."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from pruners.lazy import Tensor, nn, torch
from pruners.weights import joined, scratch, storage
from pruners.weights.joined import Join
from pruners.weights.shards import Shards, Tensors

TRIED = "tried"


class Source(ABC):
    """Keeps tensors by their names in the model."""

    kind: str

    @abstractmethod
    def read(self, name: str, device: torch.device | None = None) -> Tensor:
        """On the CPU or where it is kept; what has to be joined of parts on `device`, if there is one."""

    @abstractmethod
    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep what a part holds now; `part` is its name."""

    @abstractmethod
    def undone(self) -> AbstractContextManager[None]:
        """Within, what is written is read; afterwards what was there before is."""

    def enter(self, stage: str) -> None:  # noqa: B027  (what is kept in memory ends with the process)
        """What is written from now on belongs to a later stage of the work, which no earlier one takes over."""

    @property
    def bytes_read(self) -> int:
        return 0


class Memory(Source):
    """CPU memory: the tensors that the model came with."""

    kind = "host"

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: p.data for name, p in model.named_parameters()}

    def read(self, name: str, device: torch.device | None = None) -> Tensor:
        return self.tensors[name]

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            before = self.tensors.get(name)
            self.tensors[name] = tensor.to("cpu" if before is None else before.device)

    @contextmanager
    def undone(self) -> Iterator[None]:
        before = self.tensors
        self.tensors = {name: tensor.clone() for name, tensor in before.items()}  # on a CPU they are changed in place
        try:
            yield
        finally:
            self.tensors = before


class Disk(Source):
    """The files of a checkpoint, which stay as they are, and what was changed since, a file for each part in `folder`.

    `names` maps names in the model to those in the files, or to how several of them are joined.  `mark` says what the
    changes belong to: a part that another process left in `folder` is taken over by `restore` where that is the same.
    """

    kind = "disk"

    def __init__(
        self,
        shards: Tensors,
        names: Mapping[str, str | Join],
        folder: Path | None = None,
        mark: str = "",
        otherwise: str = "",
    ) -> None:
        self.shards, self.names, self.mark = shards, dict(names), mark
        self.folder = scratch.folder_for(self) if folder is None else Path(folder)
        self.otherwise = otherwise or storage.OTHERWISE
        self.stage = ""  # what later stages change lies apart, so that an earlier one finds what it had left
        self._changed: dict[str, Shards] = {}  # by name in the model
        self._read_before = 0

    def read(self, name: str, device: torch.device | None = None) -> Tensor:
        changed = self._changed.get(name)
        return changed[name] if changed is not None else joined.read(self.shards, self.names[name], device)

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        storage.write_tensors(
            self._path(part), tensors, {"mark": self.mark + self.stage}, self.otherwise, flushed=False
        )
        self._take(part)

    def restore(self, part: str) -> bool:
        """Whether a finished file of that part was there, verified by its checksum; it is read from now on."""
        try:
            if storage.read_tensors(self._path(part))[1].get("mark") != self.mark + self.stage:
                return False
        except (FileNotFoundError, storage.DamagedError):
            return False
        self._take(part)
        return True

    @contextmanager
    def undone(self) -> Iterator[None]:
        before, stage, place = dict(self._changed), self.stage, self.folder / self.stage / TRIED
        storage.remove(place)
        self.enter(TRIED)
        try:
            yield
        finally:
            self._changed, self.stage = before, stage
            storage.remove(place)

    def enter(self, stage: str) -> None:
        self.stage = f"{self.stage}/{stage}" if self.stage else stage

    def forget(self) -> None:
        self._changed.clear()

    def _take(self, part: str) -> None:
        found = Shards([self._path(part)])
        for name in found:
            if name in self._changed:
                self._read_before += self._changed[name].bytes_read
                self._changed[name].bytes_read = 0
            self._changed[name] = found

    def _path(self, part: str) -> Path:
        return self.folder / self.stage / f"{part}.safetensors"

    @property
    def bytes_read(self) -> int:
        changed = {id(shards): shards.bytes_read for shards in self._changed.values()}
        return self.shards.bytes_read + self._read_before + sum(changed.values())
