"""State of a table: the jobs of its submissions, and its cells."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from submitit.core.utils import JobPaths

from experiments import callbacks, measures
from experiments.store import records
from experiments.store.records import Failure, Record
from experiments.store.redaction import redacted
from pruners.interface.suggest import UsageError
from slurm import ledger, queue, reasons
from slurm.ledger import Entry, Sent
from slurm.queue import Queued

LAST_LINES = 8
CANCELLED = "Cancelled; submit again to continue."
ALL_MEMORY = (
    "Probably out of memory, although all memory of a node was requested: use nodes with more, or a smaller "
    "--batch-size."
)
CHOSEN_FIRST = "waits for the job that chooses its learning rate"
COLLECT = "collect"  # what jobs that write everything down are called
NEVER_BEGUN = "It left the queue before it started, as a cancelled job does; submit again."
DEATHS = {
    r"exceeded (job )?memory limit|oom.?kill|out of memory|out_of_memory|MemoryError": (
        "Out of memory in a job of {memory_gb:.0f} GB: submit again with --memory-gb {more_gb:.0f}, or a smaller "
        "--batch-size."
    ),
    r"DUE TO TIME LIMIT|TIMEOUT": (
        "Stopped at its time limit before it could requeue itself; increase warning_seconds in the profile."
    ),
    r"DUE TO NODE FAILURE|NODE_FAIL": "Its node failed; submit again.",
    r"CANCELLED(?!.*DUE TO JOB REQUEUE)|KeyboardInterrupt": CANCELLED,
    r"User defined signal": "Stopped before it had started; submit again.",
    r"task 0: Killed|exit code 137": (
        "Killed from outside, usually for running out of memory ({memory_gb:.0f} GB were requested); submit "
        "again, with --memory-gb {more_gb:.0f} if so."
    ),
}


@dataclass(frozen=True)
class Job:
    """One job of a submission; `queued` is what the queue says of it, None where it knows nothing (any more)."""

    entry: Entry
    index: int
    queued: Queued | None

    @property
    def sent(self) -> Sent:
        return self.entry.jobs[self.index]

    @property
    def alive(self) -> bool:
        return self.queued is not None and not self.queued.over

    @property
    def waits(self) -> bool:
        return self.alive and self.queued is not None and self.queued.state == "PENDING"

    @property
    def reason(self) -> str:
        """Why it waits; empty where nothing is known."""
        return reasons.meaning(self.queued.reason, self.entry.asks) if self.queued else ""

    @property
    def logs(self) -> tuple[Path, Path]:
        paths = JobPaths(self.entry.folder, self.sent.id, 0)
        return paths.stdout, paths.stderr

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        return callbacks.read(self.entry.events(self.index))

    @property
    def current(self) -> str:
        """The id of the cell that it is at, or was at in the end."""
        told = [event for event in self.events if event["cell"]]
        return told[-1]["cell"] if told and told[-1]["event"] not in ("finished", "failed") else ""

    @property
    def pace(self) -> dict[str, Any]:
        """The stage that it is at, with its share done and the expected end where they are known."""
        told: dict[str, Any] = {}
        for event in self.events:
            if event["event"] in ("started", "stage"):
                told = {"stage": event.get("name", ""), **{k: v for k, v in told.items() if k == "end"}}
            elif event["event"] == "progress":
                told |= {"share": event["share"], "end": _later(event["at"], event["left"])}
        return told

    @property
    def is_cancelled(self) -> bool:
        """Whether it was told to stop, running or not begun."""
        return not self.alive and (self.death == CANCELLED or self.death == NEVER_BEGUN)

    @property
    def died(self) -> bool:
        """Whether it ended with an error, or before its end; one that could write all but a few things down did not."""
        last = [event for event in self.events if event["event"].startswith("job ")][-1:]
        if last and last[0]["event"] == "job finished":
            return bool(last[0].get("status"))
        return not self.alive and bool(self.death)

    @property
    def last_lines(self) -> list[str]:
        error = self.logs[1]
        text = error.read_text(encoding="utf-8", errors="replace") if error.exists() else ""
        return [line for line in redacted(text).splitlines() if line.strip()][-LAST_LINES:]

    @property
    def death(self) -> str:
        """One sentence on why it ended before its cells were finished; empty if it did not."""
        of_job = [event for event in self.events if event["event"].startswith("job ")]
        if of_job and of_job[-1]["event"] in ("job finished", "job gave up", "job failed"):
            return str(of_job[-1].get("message", ""))
        state = self.queued.state if self.queued else ""
        if not of_job and not self.logs[1].exists() and self.entry.executor == "slurm":
            return CANCELLED if state == "CANCELLED" else NEVER_BEGUN
        told = "\n".join([*self.last_lines, state])
        for pattern, sentence in DEATHS.items():
            if re.search(pattern, told, re.IGNORECASE):
                if not self.entry.memory_gb and "memory_gb" in sentence:
                    return ALL_MEMORY
                return sentence.format(memory_gb=self.entry.memory_gb, more_gb=2 * self.entry.memory_gb)
        return f"The job ended early{state and f' ({state})'}; see `logs` for its output."


@dataclass(frozen=True)
class CellState:
    """`state` is done, incomplete (without a task), running, queued, failed, cancelled or missing; `note` one sentence
    where something is to be said, `stage` and `share` (0 to 1) how far a running cell is, `end` when its job's cells of
    this table will be done (UTC), by its own pace; `cards` are its job's."""

    id: str
    label: str
    state: str
    job: str = ""
    note: str = ""
    lines: tuple[str, ...] = ()
    stage: str = ""
    share: float | None = None
    end: str = ""
    cards: int = 1


def jobs(root: Path, table: str | None = None) -> list[Job]:
    """Every job ever sent, of this table or of any, oldest first, with what the queue says of it; SlurmError where that
    cannot be asked."""
    entries = ledger.load(root, table)
    done: dict[str, dict[str, Record]] = {}
    for name in {table for entry in entries for id in entry.cells for table in entry.asking(id)}:
        done[name] = records.load(root, name)
    told = queue.jobs([entry.name for entry in entries if entry.executor == "slurm" and _unfinished(entry, done)])
    return [
        Job(entry, index, _queued(told, sent.id) if entry.executor == "slurm" else _process(entry, index))
        for entry in entries
        for index, sent in enumerate(entry.jobs)
    ]


def _queued(told: Mapping[str, Queued], id: str) -> Queued | None:
    """Of a task of an array whose rest was cancelled, what is said of that rest."""
    rest = told.get(id.partition("_")[0])
    return told.get(id) or (rest if rest and rest.state == "CANCELLED" else None)


def cells(root: Path, table: str, labels: Mapping[str, str], known: Sequence[Job] | None = None) -> list[CellState]:
    """Of these cells (labels by id), in their order; `known` are the jobs, where they were asked for already."""
    done, failures = records.load(root, table), records.load_failures(root, table)
    asked = jobs(root) if known is None else known
    last = {id: job for job in sorted(asked, key=lambda job: job.alive) for id in job.sent.cells}
    found = [_cell(id, label, done.get(id), failures.get(id), last.get(id)) for id, label in labels.items()]
    return [replace(cell, cards=last[cell.id].entry.cards) if cell.id in last else cell for cell in found]


def _cell(id: str, label: str, record: Record | None, failure: Failure | None, job: Job | None) -> CellState:
    name = job.sent.id if job else ""
    if job and job.queued and job.alive and not _since(job, record):
        if job.queued.state == "PENDING":
            chosen = job.queued.reason == "Dependency" and job.sent.choices
            return CellState(id, label, "queued", name, CHOSEN_FIRST if chosen else job.reason)
        if job.current == id:
            return CellState(id, label, "running", name, **job.pace)
        return CellState(
            id, label, "queued", name, "after other cells of its job" if job.events else "its job is starting"
        )
    if failure:  # later than a record, which would have removed it
        return CellState(id, label, "failed", name, failure.message, tuple(failure.traceback))
    if job and not record and job.is_cancelled:
        return CellState(id, label, "cancelled", name, job.death)
    if job and job.current == id and not _since(job, record):
        return CellState(id, label, "failed", name, job.death, tuple(job.last_lines))
    if record:
        return _finished(id, label, name, record)
    return CellState(id, label, "missing", name, job.death if job else "")


def _later(at: str, seconds: float | None) -> str:
    """The time so many seconds after `at`; empty where nobody knows."""
    if seconds is None:
        return ""
    return (datetime.fromisoformat(at) + timedelta(seconds=seconds)).isoformat(timespec="minutes")


def _since(job: Job, record: Record | None) -> bool:
    """Whether the record is younger than the job's submission, which may be there to make it again."""
    return record is not None and record.made_by.at >= job.entry.at


def _finished(id: str, label: str, job: str, record: Record) -> CellState:
    if lacking := measures.missing(record.measures):
        return CellState(id, label, "incomplete", job, f"without {', '.join(lacking)}: {next(iter(lacking.values()))}")
    return CellState(id, label, "done", job, f"resumed {record.resumed} times" if record.resumed else "")


def labels(root: Path, table: str) -> dict[str, str]:
    """Of every cell that was ever submitted for the table, by id."""
    return {id: label for entry in ledger.load(root, table) for id, label in entry.of(table).items()}


def models(root: Path, table: str) -> dict[str, str]:
    """What a reader calls the model of every cell that was ever submitted for the table, by id."""
    return {id: entry.model for entry in ledger.load(root, table) for id in entry.of(table)}


def find(root: Path, cell: str) -> list[Job]:
    """The jobs that had this cell, by its id or label, or those that collect, oldest first; UsageError for none."""
    found = [
        Job(entry, index, None)
        for entry in ledger.load(root)
        for index, sent in enumerate(entry.jobs)
        if cell in sent.cells
        or cell.lower() in map(str.lower, sent.cells.values())
        or (entry.collects and cell == COLLECT)
    ]
    if not found:
        raise UsageError(f"No job was ever submitted with a cell {cell!r}; `status TABLE` lists ids and labels.")
    return found


def asking(job: Job) -> set[str]:
    """The tables that asked for a cell of this job."""
    return {table for id in job.sent.cells for table in job.entry.asking(id)}


def wanting(job: Job) -> set[str]:
    """The tables that wait for a cell of this job: those that asked for one and have no record of it since."""
    done = {table: records.load(Path(job.entry.root), table) for table in asking(job)}
    return {table for id in job.sent.cells for table in job.entry.asking(id) if not _since(job, done[table].get(id))}


def cancel(found: Sequence[Job]) -> list[str]:
    """Stop those that live; returns their ids."""
    alive = [job for job in found if job.alive]
    queue.cancel([job.sent.id for job in alive if job.entry.executor == "slurm"])
    for job in alive:
        if job.entry.executor == "local":
            psutil.Process(int(job.sent.id)).send_signal(
                signal.SIGINT
            )  # submitit passes an interrupt on and then kills
    return [job.sent.id for job in alive]


def _unfinished(entry: Entry, done: Mapping[str, Mapping[str, Record]]) -> bool:
    """Whether a cell has no record since it was sent: it may have been sent to be made again."""
    sent = [(id, done[table]) for id in entry.cells for table in entry.asking(id)]
    if entry.collects:
        told = [event["event"] for index in range(len(entry.jobs)) for event in callbacks.read(entry.events(index))]
        return "job finished" not in told
    return any(id not in known or known[id].made_by.at < entry.at for id, known in sent)


def _process(entry: Entry, index: int) -> Queued | None:
    """A job on this machine, as long as it lives; a process of that number may be somebody else's by now."""
    try:
        command = psutil.Process(int(entry.jobs[index].id)).cmdline()
    except (ValueError, psutil.Error):  # no number for a job in this process
        return None
    return Queued("RUNNING", socket.gethostname(), "", "") if str(entry.folder) in command else None
