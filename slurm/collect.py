"""A last job that collects the results of the others: tables, figures, claims and report."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import DelayedSubmission

from experiments.callbacks import Events
from experiments.store import records
from slurm import ledger, queue, state
from slurm.estimate import LIBRARIES_GB, Request
from slurm.jobs import Array, Job
from slurm.launch import SENDERS, asks
from slurm.ledger import Entry, Sent
from slurm.profile import Profile
from slurm.work import Work

NAME = state.COLLECT
WHAT = "tables, figures, claims and report"
HOURS = 1.0
NAMED = 4  # parts that are named in a sentence


@dataclass(frozen=True)
class Collect:
    """Runs `words` as a command of this interpreter and keeps how it ended in its log of events."""

    words: tuple[str, ...]
    events: str

    def __call__(self) -> None:
        log, unwritten = Events(Path(self.events)), Path(self.events).with_name("unwritten.json")
        log.write("job started")
        unwritten.unlink(missing_ok=True)  # of an earlier life of this job
        command = [sys.executable, "-m", *self.words, "--unwritten", str(unwritten)]
        status = subprocess.run(command, check=False).returncode
        log.write("job finished", status=status, message=_message(status, unwritten, _results(self.words)))

    def checkpoint(self) -> DelayedSubmission:
        return DelayedSubmission(self)


def _results(words: Sequence[str]) -> str:
    return words[words.index("--results") + 1]


def _message(status: int, unwritten: Path, results: str) -> str:
    """What was not written and why, in one sentence; empty where everything was."""
    logs = f"`python -m slurm logs collect --results {shlex.quote(results)}` shows the whole log"
    if not unwritten.exists():
        return f"not everything was written, as the command ended early (exit status {status}); {logs}"
    reasons: dict[str, str] = json.loads(unwritten.read_text(encoding="utf-8"))
    if not reasons:
        return ""
    parts = list(reasons)
    shown = [*parts[:NAMED], f"{len(parts) - NAMED} more"] if len(parts) > NAMED else parts
    named = " and ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
    return f"written, except {named} ({parts[-1]}: {reasons[parts[-1]].rstrip('.')}); {logs}"


def planned(profile: Profile) -> Array:
    """The one job, which needs no accelerator."""
    hours = max(HOURS, profile.least_hours)
    return Array((Job(()),), Request(1, 0, 0, LIBRARIES_GB, hours, min(hours, profile.hours)))


def send(plan: Work, cells: Collection[str], profile: Profile, executor: str) -> str:
    """Its id and what it does.  The job begins when all jobs that are alive by now with `cells`, the ids of those of
    its tables, have ended, well or not.  It takes the place of one that waits for some of them; one that waits for all
    is enough.
    """
    same = _same(plan)
    tables: dict[str, str] = plan.arguments["sources"]
    with ledger.launching(plan.root):
        known = state.jobs(plan.root)
        waiting = [
            job for job in known if job.waits and job.entry.same == same and set(tables) & set(job.entry.collected)
        ]
        for job in waiting:
            tables = {**job.entry.collected, **tables}
        before = {id for job in waiting for id in job.entry.after}
        alive = [
            job.sent.id for job in known if job.alive and (job.sent.id in before or set(cells) & set(job.sent.cells))
        ]
        for job in waiting:
            if set(tables) == set(job.entry.collected) and set(alive) <= set(job.entry.after):
                return f"{job.sent.id}: {WHAT}, submitted before"
        id = _send(plan, profile, executor, tables, same, alive)
        replaced = state.cancel(waiting)
    return ", replacing ".join([f"{id}: {WHAT}", *([" and ".join(replaced)] if replaced else [])])


def _send(
    plan: Work, profile: Profile, executor: str, tables: dict[str, str], same: list[str], alive: list[str]
) -> str:
    sent = (Sent("", {}),)
    array, waits = planned(profile), waiting(profile, alive)
    entry = Entry(
        f"{NAME}-{ledger.unique(sent)}", NAME, executor, str(plan.root), sent, LIBRARIES_GB, records.now(),
        asks=asks(array, waits), collected=tables, same=same, after=alive,
    )  # fmt: skip
    ledger.write(entry)
    work = Collect(("analysis", "everything", *tables.values(), *same), str(entry.events(0)))
    try:
        (id,) = SENDERS[executor](entry, [work], array, waits)
    except queue.SlurmError:
        ledger.remove(entry)
        raise
    ledger.write(entry.with_ids([id]))
    if executor == "debug":
        work()
    return id


def cancel(root: Path, tables: Collection[str], stopped: Collection[str]) -> list[str]:
    """Stop what would collect these tables, or after these jobs, where no other job is left that it waits for; returns
    the ids."""
    known = [job for job in state.jobs(root) if job.alive and job.sent.id not in stopped]
    left = {job.sent.id for job in known if not job.entry.collects}
    return state.cancel([job for job in known if job.entry.collects and _idle(job.entry, tables, stopped, left)])


def _idle(entry: Entry, tables: Collection[str], stopped: Collection[str], left: set[str]) -> bool:
    """Whether nothing is `left` for this one; one that was sent on an earlier day does not say what it waits for."""
    if not entry.collected:
        return bool(stopped) and not left
    concerned = set(entry.after) & set(stopped) or set(entry.collected) & set(tables)
    return bool(concerned) and not left & set(entry.after)


def waiting(profile: Profile, ids: Sequence[str]) -> Profile:
    """Without an accelerator, and after these jobs."""
    return profile.model_copy(update={"gres": None, "whole_memory": False}).after(ids)


def _same(plan: Work) -> list[str]:
    """What tells the cells of these tables from those of other models, formats and tasks."""
    told = plan.arguments
    named = {"--results": told["results"], "--model": told["model"], "--dtype": told["dtype"], "--limit": told["limit"],
             "--data-dir": told["data_dir"]}  # fmt: skip
    words = [word for name, value in named.items() if value for word in (name, str(value))]
    lists = {"--tasks": told["tasks"], "--plugin": told["plugin"]}
    words += ["--rehearse"] if told.get("rehearse") else []
    return [*words, *(word for name, values in lists.items() if values for word in (name, *values))]
