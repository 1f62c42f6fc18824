"""Finished blocks of a pruning that is still going on, so that a killed run goes on at the block after them.

They are written every half minute at most: a quick pruning writes nothing.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

from experiments import cache
from pruners.anatomy import Block
from pruners.calibrate import Keeper

SECONDS_BETWEEN = 30.0
logger = logging.getLogger(__name__)


class PrunedBlocks(Keeper):
    """The weights of one pruning's blocks, a file each in `folder`, verified by checksum when read.

    Once they exceed the cache's limit the later ones are not kept.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pending: list[Block] = []
        self.bytes, self.written = 0, time.monotonic()

    def restore(self, block: Block) -> bool:
        tensors = cache.read(self._path(block))
        if tensors is None:
            return False
        for name, linear in block.linears().items():
            linear.weight.data.copy_(tensors[name])
            self.bytes += linear.weight.nbytes
        return True

    def keep(self, block: Block) -> None:
        self.pending.append(block)
        if time.monotonic() - self.written >= SECONDS_BETWEEN:
            for finished in self.pending:
                self._write(finished)
            self.pending, self.written = [], time.monotonic()

    def _write(self, block: Block) -> None:
        tensors = {name: linear.weight.data.cpu().contiguous() for name, linear in block.linears().items()}
        before, limit = self.bytes, cache.limit_bytes()
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self.bytes <= limit:
            cache.write(self._path(block), tensors)
        elif before <= limit:
            logger.warning(
                "Pruned blocks beyond %.1f GB are not kept for a run that is killed; set %s to raise that.",
                limit / 1e9, cache.LIMIT_VARIABLE,
            )  # fmt: skip

    def _path(self, block: Block) -> Path:
        return self.folder / f"{block.index:03}.safetensors"
