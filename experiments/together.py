"""Several processes at one table, as `torchrun` or `accelerate launch` start them.

Process 0 runs the cells as if it were alone, but for retraining: it leaves the pruned model on disk and calls the
others, who load it, take their share of every batch and wait again.  They wait by asking the launcher's key-value
store, which has no time limit: process 0 may measure for hours.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed

from experiments import models, retraining
from experiments.conversion import quiet
from experiments.spec import digest
from experiments.tokens import Tokenizer
from pruners import checkpoint
from pruners.retrain.peers import PeerLostError

if TYPE_CHECKING:
    from experiments.cells import Cell
    from experiments.run import Settings

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 30.0  # for the others to meet an error that one process has met


@dataclass
class Group:
    """The processes of one launch; `broken` once they no longer stand at the same place."""

    rank: int
    count: int
    store: Any
    calls: int = 0
    broken: bool = False

    @contextmanager
    def training(self, cell: str, model: Any, tokenizer: Any, begun: Path) -> Iterator[None]:
        """Of process 0: the others retrain the cell of that id with it, from `model` as it is now."""
        pruned = begun.with_name(f"to_train_{cell}")
        shutil.rmtree(pruned, ignore_errors=True)
        with quiet():
            model.save_pretrained(pruned)  # checkpoint.save may turn it into an equal model of another class
            tokenizer.save_pretrained(pruned)
        self.calls += 1
        self.store.set(f"call/{self.calls}", json.dumps({"cell": cell, "pruned": str(pruned), "begun": str(begun)}))
        try:
            yield
        except BaseException as error:
            self.broken = not isinstance(error, Exception) or self._lost(error)
            raise
        finally:
            if not self.broken:
                shutil.rmtree(pruned)

    def follow(self, chosen: Callable[[], Sequence[Cell]], settings: Settings) -> None:
        """Of the other processes: train along whenever process 0 calls, until it lets them go."""
        while call := self._next():
            try:
                _train_along(call, chosen(), settings)
            except Exception as error:
                self.broken = self._lost(error)
                if self.broken:
                    raise

    def end(self) -> None:
        if self.rank == 0 and not self.broken:
            self.store.set(f"call/{self.calls + 1}", json.dumps(None))
        if distributed.is_initialized() and not self.broken:
            distributed.destroy_process_group()

    def _next(self) -> dict[str, str] | None:
        self.calls += 1
        while not self.store.check([f"call/{self.calls}"]):
            time.sleep(POLL_SECONDS)
        called: dict[str, str] | None = json.loads(self.store.get(f"call/{self.calls}"))
        return called

    def _lost(self, error: Exception) -> bool:
        """Whether this error keeps somebody waiting: it does not where every process met one in this call."""
        self.store.set(f"failed/{self.calls}/{self.rank}", "")
        keys = [f"failed/{self.calls}/{rank}" for rank in range(self.count)]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return isinstance(error, PeerLostError) or not self.store.check(keys)


@contextmanager
def joined() -> Iterator[Group | None]:
    """The processes of this launch, None for a process that was started alone; process 0 lets the others go."""
    if count() == 1:
        yield None
        return
    store, rank, processes = next(distributed.rendezvous("env://"))
    group = Group(rank, processes, distributed.PrefixStore("experiments", store))
    try:
        yield group
    finally:
        group.end()


def count() -> int:
    """How many processes were launched together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """Which of the processes of this machine this is, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _train_along(call: dict[str, str], chosen: Sequence[Cell], settings: Settings) -> None:
    run = next(cell.run for cell in chosen if cell.id == call["cell"])
    with quiet():
        model, inner = checkpoint.load(call["pruned"], device_map={"": settings.device})
    tokenizer = Tokenizer(digest(models.identity(run.model)), inner)
    retraining.retrained(model, run.recovery, tokenizer, settings.data_dir, Path(call["begun"]))
