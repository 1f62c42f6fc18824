"""Several processes at one table, as `torchrun` starts them.

Rank 0 runs the cells as if it were alone, but for retraining: it leaves the pruned model on disk and calls the
others, who load it, take their share of every batch and wait again.  They wait by asking the launcher's key-value
store, which has no time limit: rank 0 may measure for hours.  Rank 0 keeps that store where there is no launcher
to keep it, so it leaves last.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import models, recover
from experiments.data.tokens import Tokenizer
from experiments.errors import sentence
from experiments.models.gguf import quiet
from experiments.processes import WAY_OUT, count
from experiments.recovery import Retraining
from experiments.spec import digest
from pruners import checkpoint
from pruners.lazy import torch
from pruners.ranks import RankLostError

if TYPE_CHECKING:
    from experiments.cells import Cell
    from experiments.settings import Settings

POLL_SECONDS = 0.2
PATIENCE_SECONDS = 30.0  # for the others to meet an error that one process has met, or to leave
LOADING_SECONDS = 1800.0
STARTED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun says beside WORLD_SIZE


@dataclass
class Group:
    """The processes of one launch; `broken` once they no longer stand at the same place."""

    rank: int
    count: int
    store: Any
    calls: int = 0
    broken: bool = False

    @contextmanager
    def training(self, cell: str, model: Any, tokenizer: Any, begun: Path, learning_rate: float) -> Iterator[None]:
        """Of rank 0: the others retrain the cell of that id with it, at that rate, from `model` as it is now.

        Raises ConnectionError where one of them cannot load it.
        """
        pruned = begun.with_name(f"to_train_{cell}")
        shutil.rmtree(pruned, ignore_errors=True)
        with quiet():
            model.save_pretrained(pruned)  # checkpoint.save may turn it into an equal model of another class
            tokenizer.save_pretrained(pruned)
        self.calls += 1
        call = {"cell": cell, "pruned": str(pruned), "begun": str(begun), "learning_rate": learning_rate}
        self.store.set(f"call/{self.calls}", json.dumps(call))
        try:
            self._wait_until_loaded()
            yield
        except BaseException as error:
            self.broken = not isinstance(error, Exception) or self._lost(error)
            raise
        finally:
            if not self.broken:
                shutil.rmtree(pruned)

    def follow(self, chosen: Callable[[], Sequence[Cell]], settings: Settings) -> None:
        """Of the other ranks: train along whenever rank 0 calls, until it lets them go."""
        while call := self._next():
            try:
                _train_along(call, chosen(), settings, lambda: self._reach(f"loaded/{self.calls}"))
            except Exception as error:
                self.broken = self._lost(error)
                if self.broken:
                    raise

    def refuse_uneven(self, chosen: Sequence[Cell]) -> None:
        """ValueError for cells whose batches these processes cannot share, before any of them is pruned."""
        trained = [(cell, cell.run.recovery) for cell in chosen if isinstance(cell.run.recovery, Retraining)]
        if uneven := [(cell, recovery) for cell, recovery in trained if recovery.shared % self.count]:
            (cell, recovery), *others = uneven
            more = f" and {len(others)} more cells" if others else ""
            parts = f" in micro-batches of {recovery.batch_size // recovery.shared}" if recovery.reference else ""
            raise ValueError(
                f"{self.count} processes cannot share a batch of {recovery.batch_size}{parts} evenly, as "
                f"{cell.label}{more} would need; launch a number that divides the batch, or choose cells with --only."
            )

    def end(self) -> None:
        if self.broken:
            return
        if self.rank == 0:
            self.store.set(f"call/{self.calls + 1}", json.dumps(None))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        self._reach("gone")
        if self.rank == 0:
            self._all_reached("gone")

    def _next(self) -> dict[str, Any] | None:
        self.calls += 1
        while not self.store.check([f"call/{self.calls}"]):
            time.sleep(POLL_SECONDS)
        called: dict[str, Any] | None = json.loads(self.store.get(f"call/{self.calls}"))
        return called

    def _wait_until_loaded(self) -> None:
        deadline = time.monotonic() + LOADING_SECONDS
        for rank in range(1, self.count):
            while not self.store.check([f"loaded/{self.calls}/{rank}"]):
                if self.store.check([failed := f"failed/{self.calls}/{rank}"]):
                    raise ConnectionError(f"Process {rank} cannot train along. {self.store.get(failed).decode()}")
                if time.monotonic() > deadline:
                    raise RankLostError(f"Process {rank} is not ready to train along after {LOADING_SECONDS:.0f} s.")
                time.sleep(POLL_SECONDS)

    def _reach(self, place: str, said: str = "") -> None:
        self.store.set(f"{place}/{self.rank}", said)

    def _all_reached(self, place: str) -> bool:
        """Whether every process has come to that place before patience ends."""
        keys = [f"{place}/{rank}" for rank in range(self.count)]
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.store.check(keys) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return bool(self.store.check(keys))

    def _lost(self, error: BaseException) -> bool:
        """Whether this error keeps somebody waiting: it does not where every process met one in this call."""
        self._reach(f"failed/{self.calls}", sentence(error))
        return isinstance(error, RankLostError) or not self._all_reached(f"failed/{self.calls}")


@contextmanager
def joined() -> Iterator[Group | None]:
    """The processes of this launch, None for a process that was started alone; rank 0 lets the others go.

    Raises ValueError where the environment speaks of others but not of how to meet them.
    """
    if count() == 1:
        yield None
        return
    if absent := [name for name in STARTED if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is {count()} but {', '.join(absent)} is not set; {WAY_OUT}.")
    try:
        store, rank, size = next(torch.distributed.rendezvous("env://"))
    except (RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ConnectionError(f"The {count()} processes of WORLD_SIZE do not meet ({first}); {WAY_OUT}.") from error
    group = Group(rank, size, torch.distributed.PrefixStore("experiments", store))
    try:
        yield group
    finally:
        group.end()


def _train_along(call: dict[str, Any], chosen: Sequence[Cell], settings: Settings, loaded: Callable[[], None]) -> None:
    run = next(cell.run for cell in chosen if cell.id == call["cell"])
    with quiet():
        model, inner = checkpoint.load(call["pruned"], device_map={"": settings.device})
    tokenizer = Tokenizer(digest(models.identity(run.model)), inner)
    examples = recover.examples(run.recovery.text, tokenizer, settings.data_dir)
    loaded()
    recovery = replace(run.recovery, learning_rate=call["learning_rate"])  # which may have been chosen
    recover.retrained(model, recovery, examples, Path(call["begun"]))
