"""Finished blocks of a pruning in progress, so that an interrupted run resumes at the next block.

They are written every half minute at most: a quick pruning writes nothing.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

from experiments.store import atomic, cache, room
from pruners.anatomy import Block
from pruners.calibrate import NOTHING, Keeper
from pruners.run import ranks
from pruners.run.ranks import Ranks
from pruners.unstructured import Unstructured
from pruners.weights import homes, sources

SECONDS_BETWEEN = 30.0
logger = logging.getLogger(__name__)


def weights(block: Block) -> dict[str, Any]:
    """By full name everything of a block that a method may change with its matrices: biases and norms, too."""
    return {name: parameter.data for name, parameter in block.module.named_parameters(block.name)}


def change_alone(method: Any) -> bool:
    """Whether nothing but blocks, each once, is changed by a method: it has the loop over them of its base."""
    return isinstance(method, Unstructured) and type(method).prune is Unstructured.prune


class WrittenBlocks(Keeper):
    """The finished blocks of a model at home on the disk, as a process that was killed has left them there."""

    def __init__(self, disk: sources.Disk) -> None:
        self.disk = disk

    def restore(self, block: Block) -> bool:
        if not self.disk.restore(block.name):
            return False
        for name, parameter in block.module.named_parameters(block.name):
            parameter.data.copy_(self.disk.read(name))
        return True


class PrunedBlocks(Keeper):
    """The weights of one pruning's blocks, a file each in `folder`, verified by checksum when read.

    `root` is the results folder whose cache makes room for them.  Once they exceed its limit, or the disk refuses, the
    later ones are not kept.
    """

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        self.folder, self.root = folder, root
        self.pending: list[Block] = []
        self.bytes, self.written, self.refused = 0, time.monotonic(), False

    def restore(self, block: Block) -> bool:
        tensors = cache.read(self._path(block), self._key(block))
        if tensors is None:
            return False
        for name, here in weights(block).items():
            here.copy_(tensors[name])
            self.bytes += here.nbytes
        return True

    def keep(self, block: Block) -> None:
        self.pending.append(block)
        if time.monotonic() - self.written >= SECONDS_BETWEEN:
            for finished in self.pending:
                self._write(finished)
            self.pending, self.written = [], time.monotonic()

    def _write(self, block: Block) -> None:
        if self.refused:
            return
        tensors = {name: tensor.contiguous() for name, tensor in weights(block).items()}
        size, limit = sum(tensor.nbytes for tensor in tensors.values()), cache.limit_bytes()
        self.bytes += size
        if self.bytes > limit:
            self._refuse(f"Finished blocks beyond {limit / 1e9:.1f} GB", f"set {cache.LIMIT_VARIABLE} to raise that.")
            return
        if self.root:
            room.make_room(self.root, size)
        try:
            cache.write(self._path(block), tensors, self._key(block))
        except atomic.StorageError as error:
            self._refuse("Further finished blocks", str(error))

    def _refuse(self, what: str, why: str) -> None:
        self.refused = True
        logger.warning("%s are not saved for resuming; %s", what, why)

    def _path(self, block: Block) -> Path:
        return self.folder / f"{block.index:03}.safetensors"

    def _key(self, block: Block) -> str:
        """Cell, origin and block: a file of another place is noticed, wherever the results folder lies."""
        return "/".join(("whole", *self._path(block).absolute().parts[-4:]))


class Together(Keeper):
    """What rank 0 keeps and finds, for all ranks, which read it there."""

    def __init__(self, kept: Keeper, together: Ranks) -> None:
        self.kept, self.together = kept, together

    def restore(self, block: Block) -> bool:
        found = self.together.first(lambda: self.kept.restore(block))
        return found and all(self.together.each(lambda: self._read_along(block)))

    def keep(self, block: Block) -> None:
        if self.together.rank == 0:
            self.kept.keep(block)

    def _read_along(self, block: Block) -> bool:
        if self.together.rank and not self.kept.restore(block):
            raise ValueError(
                f"{block.name} of an interrupted run is readable by rank 0 only; all ranks need the same "
                "results folder."
            )
        return True


def keeper(model: Any, method: Any, folder: Path, root: Path | None = None) -> Keeper:
    """For this model: one at home on the disk has its finished blocks there anyhow, but of several ranks each its own,
    which are begun anew together.  A method that prunes in its own way begins anew."""
    if not change_alone(method):
        return NOTHING
    disk, together = homes.on_disk(model), ranks.here()
    if together.count > 1:
        return Together(PrunedBlocks(folder, root), together) if disk is None else NOTHING
    return PrunedBlocks(folder, root) if disk is None else WrittenBlocks(disk)
