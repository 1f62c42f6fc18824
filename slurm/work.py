"""What a job runs.

Whatever takes seconds to import is imported once the job runs: until submitit has read the pickle, a warning that the
time limit is near would end the job for good.
"""

from __future__ import annotations

import os
import signal
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission

from experiments import callbacks, cli, selection
from experiments.callbacks import Events
from experiments.store import redaction
from pruners.run import ranks
from slurm import launched

if TYPE_CHECKING:
    from experiments.cells import Cell
    from experiments.settings import Settings
    from slurm.ledger import Entry

PATHS = ("results", "data_dir", "save_models")
CHANGED = "The model or the table was changed after this cell was submitted; submit it again."


@dataclass(frozen=True)
class Work:
    """Cells by id with the tables that ask for each, and the `arguments` of `python -m experiments run` by name, paths
    as text; `sources` says by table what it was asked for by, and `limits` by table the `limit` of its tasks.

    The first table of a cell runs it and the others take its record over, those too that ask for it later.
    On several `cards` a process for each runs all cells together with the others (`launched`).
    A job that is told to stop (its time limit is near, or it is preempted) puts itself back into the queue, unless it
    has done so `requeues` times without finishing a cell; what it had finished is kept, and it goes on from there.
    `finished` and `stalled` count cells that it finished and such returns so far.
    """

    arguments: dict[str, Any]
    cells: dict[str, tuple[str, ...]] = field(default_factory=dict)
    events: str = ""
    requeues: int = 0
    cards: int = 1
    finished: int = 0
    stalled: int = 0

    def __call__(self) -> None:
        """Records and failures are on disk; the log of events has the labels of cells found, done and failed."""
        self._tidy()
        self.log().write("job started", stalled=self.stalled)
        if self.cards == 1:
            self.here()
        else:
            launched.run(self.cards, asdict(self), self.log(), _said())

    def here(self) -> None:
        """The cells in this process, along with the other ranks of a launch where it is one of them."""
        from experiments.models import kept

        total: dict[str, list[str]] = {"found": [], "done": [], "failed": []}
        failed: dict[str, str] = {}  # by cell the table where it failed
        message = ""
        with redaction.quiet_logs(), kept.lasting():
            self._load()
            for table, ids in self._parts():
                outcome = self._run(table, [id for id in ids if id not in failed])
                for name, labels in total.items():
                    labels += outcome[name]
                failed |= dict.fromkeys(outcome["failed ids"], table)
                message = CHANGED if outcome["gone"] else message
                self._share_failures(table, [id for id in ids if failed.get(id, table) != table], failed)
        if ranks.rank() == 0:
            self._hand_on(failed)
            self.log().write("job finished", **total, **({"message": message} if message else {}))

    def checkpoint(self) -> DelayedSubmission:
        """What to go on with; leaves the process instead where going on has led nowhere too often."""
        finished = sum(event["event"] == "finished" for event in callbacks.read(Path(self.events)))
        stalled = 0 if finished > self.finished else self.stalled + 1
        if stalled > self.requeues:
            message = (
                f"{self.requeues + 1} times in a row the time limit was reached before a cell was finished; "
                "use a profile with more hours."
            )
            self.log().write("job gave up", message=message)
            raise SystemExit(message)
        self.log().write("job requeued", stalled=stalled)
        if "SUBMITIT_EXECUTOR" in os.environ:  # `scontrol requeue` inherits that, for a late warning comes with the end
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return DelayedSubmission(replace(self, finished=finished, stalled=stalled))

    @property
    def root(self) -> Path:
        return Path(self.arguments["results"])

    @property
    def data_dir(self) -> Path | None:
        folder = self.arguments["data_dir"]
        return Path(folder) if folder else None

    @property
    def again(self) -> bool:
        return bool(self.arguments.get("again"))

    @property
    def saves(self) -> bool:
        return bool(self.arguments.get("save_models"))

    def settings(self, table: str, cells: Sequence[Cell]) -> Settings:
        """By which a record stands, and its model is where it was asked for."""
        from experiments.own import saved
        from experiments.settings import Settings

        folder = self.arguments.get("save_models")
        save = saved.places(list(cells), Path(folder), table) if folder else {}
        return Settings(self.root, data_dir=self.data_dir, again=self.again, save=save)

    def asked(self, table: str) -> Namespace:
        """As a command line gives it, for one table; options that are younger than the job are at their defaults."""
        parser = ArgumentParser()
        selection.add(parser)
        cli.add_running(parser)
        cli.add_saving(parser)
        source = self.arguments["sources"][table]
        defaults = vars(parser.parse_args([source]))
        told = {name: value for name, value in self.arguments.items() if name not in ("tables", "all")}
        limits = self.arguments.get("limits", {})
        told["limit"] = limits.get(table, self.arguments.get("limit"))
        paths = {name: Path(value) for name in PATHS if (value := self.arguments.get(name))}
        asked = Namespace(**{**defaults, **told, **paths, "method": [], "only": [], "all": False})
        cli.resolve(asked)
        (one,) = selection.each(asked)
        return one

    def _parts(self) -> Iterator[tuple[str, list[str]]]:
        """Tables with their cells: each cell for its first table, in the order of sharing, then for the others."""
        first = groupby(self.cells.items(), key=lambda item: item[1][0])
        yield from ((table, [id for id, _ in items]) for table, items in first)
        others = dict.fromkeys(table for tables in self.cells.values() for table in tables[1:])
        yield from ((table, [id for id, tables in self.cells.items() if table in tables[1:]]) for table in others)

    def _load(self) -> None:
        """Of every table, before the first of them is run; a table that cannot be read is told in its turn."""
        from experiments.store import code
        from pruners.interface.suggest import UsageError

        for table, ids in self._parts():
            with suppress(UsageError):
                code.load(cell.run for cell in cli.declared(self.asked(table)) if cell.id in ids)

    def _run(self, table: str, ids: list[str]) -> dict[str, list[str]]:
        from experiments import batch

        asked = self.asked(table)
        declared = cli.declared(asked)
        chosen = [cell for cell in declared if cell.id in ids]
        gone = self._gone(table, set(ids), declared)
        watchers = [self.log(table), *cli.watchers(asked, table)] if ranks.rank() == 0 else []
        outcome = batch.run_table(asked.table, chosen, cli.settings(asked, chosen), watchers)
        failed = [cell.id for cell in chosen if cell.label in outcome.failed]
        return {
            "found": outcome.found, "done": outcome.done, "failed": [*outcome.failed, *gone], "failed ids": failed,
            "gone": gone,
        }  # fmt: skip

    def _gone(self, table: str, ids: set[str], declared: Sequence[Cell]) -> list[str]:
        """The labels of cells that no longer are what was submitted; one of the same label in its place has failed."""
        gone = ids - {cell.id for cell in declared}
        if not gone:
            return []
        from experiments import models
        from experiments.store import records
        from experiments.store.records import Failure

        entry = self._entry()
        sent = entry.of(table) if entry else {}
        labels = [sent.get(id, id) for id in gone]
        if ranks.rank() == 0:
            known = records.load(self.root, table)
            for cell in declared:
                if cell.label in labels and cell.id not in known:
                    spec = cell.run.spec(models.identity(cell.run.model))
                    records.write_failure(
                        Failure(id=cell.id, table=table, spec=spec, message=CHANGED, traceback=[], at=records.now()),
                        self.root,
                    )
        return sorted(labels)

    def _hand_on(self, failed: Mapping[str, str]) -> None:
        """What became of its cells, to tables that submissions after its own have asked for them."""
        from experiments.store import elsewhere

        if (entry := self._entry()) is None:
            return
        late = {id: [table for table in entry.asking(id) if table not in self.cells[id]] for id in self.cells}
        for first in {self.cells[id][0] for id, tables in late.items() if tables}:
            for cell in cli.declared(self.asked(first)):
                for table in late.get(cell.id, ()):
                    if cell.id in failed:
                        self._share_failures(table, [cell.id], failed)
                    else:
                        elsewhere.adopt(self.root, table, cell, self.data_dir)

    def _entry(self) -> Entry | None:
        """The submission that this job belongs to."""
        from slurm import ledger

        place = Path(self.events).with_name("entry.json")
        return ledger.read(place, self.root) if place.is_file() else None

    def _share_failures(self, table: str, ids: list[str], failed: Mapping[str, str]) -> None:
        """A cell that failed for one table is not tried again for the next."""
        from experiments.store import records

        for id in ids:
            failure = records.load_failures(self.root, failed[id]).get(id)
            if failure is None:  # its record stands there, and only its model could not be kept
                continue
            records.write_failure(failure.model_copy(update={"table": table, "sha256": ""}), self.root)

    def log(self, table: str = "") -> Events:
        """Of the job's events, those of that table where one is named."""
        return Events(Path(self.events), job=_job(), table=table)

    def _tidy(self) -> None:
        """Killed while it put itself back, a job leaves a half-written file on which submitit would stumble next."""
        folder = os.environ.get("SUBMITIT_FOLDER")
        for leftover in Path(folder).glob(f"{_job()}_submitted.pkl.save_tmp") if folder else ():
            leftover.unlink(missing_ok=True)


def _said() -> str:
    """The file with what this job's processes say; empty outside of one."""
    return str(JobEnvironment().paths.stderr) if "SUBMITIT_EXECUTOR" in os.environ else ""


def _job() -> str:
    """The id of this job, `12_3` in an array; `debug` outside of one."""
    return JobEnvironment().job_id if "SUBMITIT_EXECUTOR" in os.environ else "debug"
