"""A last job that writes down what the others have made: tables, figures, claims and report."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from experiments.callbacks import Events
from experiments.store import records
from slurm import ledger, queue, state
from slurm.estimate import LIBRARIES_GB, Request
from slurm.jobs import Array, Job
from slurm.launch import SENDERS
from slurm.ledger import Entry, Sent
from slurm.profile import Profile
from slurm.work import Work

NAME = "collect"
HOURS = 1.0


@dataclass(frozen=True)
class Collect:
    """Runs `words` as a command of this interpreter and keeps how it ended in its log of events."""

    words: tuple[str, ...]
    events: str

    def __call__(self) -> None:
        log = Events(Path(self.events))
        log.write("job started")
        status = subprocess.run([sys.executable, "-m", *self.words], check=False).returncode
        log.write("job finished", message="" if status == 0 else "Not all could be written; its log says what and why.")

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)


def send(plan: Work, profile: Profile, executor: str) -> str:
    """The id of a job that begins when all jobs of these tables that are alive by now have ended, well or not."""
    tables: dict[str, str] = plan.arguments["sources"]
    with ledger.launching(plan.root):
        alive = [job.sent.id for job in state.jobs(plan.root) if job.alive and set(tables) & _tables(job)]
        sent = (Sent("", {}),)
        name = f"{NAME}-{ledger.unique(sent)}"
        entry = Entry(name, NAME, executor, str(plan.root), sent, LIBRARIES_GB, records.now())
        ledger.write(entry)
        words = ("analysis", "everything", *tables.values(), *_same(plan))
        array = Array((Job(()),), Request(1, 0, 0, LIBRARIES_GB, HOURS, min(HOURS, profile.hours)))
        work = Collect(words, str(entry.events(0)))
        try:
            (id,) = SENDERS[executor](entry, [work], array, _after(profile, alive))
        except queue.SlurmError:
            ledger.remove(entry)
            raise
        ledger.write(entry.with_ids([id]))
    if executor == "debug":
        work()
    return id


def _tables(job: state.Job) -> set[str]:
    return {table for id in job.sent.cells for table in job.entry.asking(id)}


def _after(profile: Profile, ids: Sequence[str]) -> Profile:
    """Without an accelerator, and after these jobs."""
    return profile.model_copy(update={"gres": None, "whole_memory": False}).after(ids)


def _same(plan: Work) -> list[str]:
    """What tells the cells of these tables from those of other models, formats and tasks."""
    told = plan.arguments
    named = {"--results": told["results"], "--model": told["model"], "--dtype": told["dtype"], "--limit": told["limit"],
             "--data-dir": told["data_dir"]}  # fmt: skip
    words = [word for name, value in named.items() if value for word in (name, str(value))]
    lists = {"--tasks": told["tasks"], "--plugin": told["plugin"]}
    return [*words, *(word for name, values in lists.items() if values for word in (name, *values))]
