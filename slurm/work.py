"""What a job runs.  submitit carries it there as a pickle of this class by name and of plain values, nothing else.

Whatever takes seconds to import is imported once the job runs: until submitit has read the pickle, a warning that the
time limit is near would end the job for good.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission

from experiments import callbacks, cli
from experiments.callbacks import Events
from experiments.store import redaction

PATHS = ("results", "data_dir", "save_models")


@dataclass(frozen=True)
class Work:
    """These cells of a table, by id, with the `arguments` of `python -m experiments run` by name, paths as text.

    A job that is told to stop (its time limit is near, or it is preempted) puts itself back into the queue, unless it
    has done so `requeues` times without finishing a cell; what it had finished is kept, and it goes on from there.
    `finished` and `stalled` count cells that it finished and such returns so far.
    """

    arguments: dict[str, Any]
    cells: tuple[str, ...] = ()
    events: str = ""
    requeues: int = 0
    finished: int = 0
    stalled: int = 0

    def __call__(self) -> dict[str, list[str]]:
        """The labels of cells found, done and failed; records and failures are on disk."""
        self._tidy()
        self._events.write("job started", stalled=self.stalled)
        from experiments import batch

        asked = self.asked
        with redaction.quiet_logs():
            cli.resolve(asked)
            chosen = cli.chosen(asked)
            outcome = batch.run_table(
                asked.table,
                chosen,
                cli.settings(asked, chosen),
                [self._events, *cli.watchers(asked)],
            )
        self._events.write("job finished", found=outcome.found, done=outcome.done, failed=outcome.failed)
        return {"found": outcome.found, "done": outcome.done, "failed": outcome.failed}

    def checkpoint(self) -> DelayedSubmission:
        """What to go on with; leaves the process instead where going on has led nowhere too often."""
        finished = sum(event["event"] == "finished" for event in callbacks.read(Path(self.events)))
        stalled = 0 if finished > self.finished else self.stalled + 1
        if stalled > self.requeues:
            message = (
                f"{self.requeues + 1} times in a row the time limit came before a cell was finished; "
                "take a profile with more hours."
            )
            self._events.write("job gave up", message=message)
            raise SystemExit(message)
        self._events.write("job requeued", stalled=stalled)
        return DelayedSubmission(replace(self, finished=finished, stalled=stalled))

    @property
    def table(self) -> str:
        return str(self.arguments["table"])

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
    def asked(self) -> Namespace:
        """As a command line gives it, for these cells; options that are younger than the job are at their defaults."""
        parser = ArgumentParser()
        cli.add_selection(parser)
        cli.add_running(parser)
        cli.add_saving(parser)
        defaults = vars(parser.parse_args([self.table]))
        paths = {name: Path(value) for name in PATHS if (value := self.arguments.get(name))}
        return Namespace(**{**defaults, **self.arguments, **paths, "only": list(self.cells)})

    @property
    def _events(self) -> Events:
        return Events(Path(self.events), job=_job(), table=self.table)

    def _tidy(self) -> None:
        """Killed while it put itself back, a job leaves a half-written file on which submitit would stumble next."""
        folder = os.environ.get("SUBMITIT_FOLDER")
        for leftover in Path(folder).glob(f"{_job()}_submitted.pkl.save_tmp") if folder else ():
            leftover.unlink(missing_ok=True)


def _job() -> str:
    """The id of this job, `12_3` in an array; `debug` outside of one."""
    return JobEnvironment().job_id if "SUBMITIT_EXECUTOR" in os.environ else "debug"
