"""How a table stands: the jobs of its submissions, and its cells."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from submitit.core.utils import JobPaths

from experiments import callbacks, measures
from experiments.store import records
from experiments.store.records import Failure, Record
from experiments.store.redaction import redacted
from pruners.suggest import UsageError
from slurm import ledger, queue
from slurm.ledger import Entry, Sent
from slurm.queue import Queued

LAST_LINES = 8
DEATHS = {
    r"exceeded (job )?memory limit|oom.?kill|out of memory|out_of_memory|MemoryError": (
        "Out of memory in a job of {memory_gb:.0f} GB: submit again with --memory-gb {more_gb:.0f}, or a smaller "
        "--batch-size."
    ),
    r"DUE TO TIME LIMIT|TIMEOUT": (
        "Stopped at its time limit before it could put itself back into the queue; give the profile more "
        "warning_seconds."
    ),
    r"DUE TO NODE FAILURE|NODE_FAIL": "Its node failed; submit again.",
    r"CANCELLED(?!.*DUE TO JOB REQUEUE)|KeyboardInterrupt": "Cancelled; submit again to go on.",
    r"User defined signal": "Told to stop before it had begun; submit again.",
    r"task 0: Killed|exit code 137": (
        "Killed from outside, most often for its memory ({memory_gb:.0f} GB were asked for); submit again, with "
        "--memory-gb {more_gb:.0f} if so."
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
    def logs(self) -> tuple[Path, Path]:
        paths = JobPaths(self.entry.folder, self.sent.id, 0)
        return paths.stdout, paths.stderr

    @property
    def current(self) -> str:
        """The id of the cell that it is at, or was at in the end."""
        told = [event for event in callbacks.read(self.entry.events(self.index)) if event["cell"]]
        return told[-1]["cell"] if told and told[-1]["event"] not in ("finished", "failed") else ""

    @property
    def last_lines(self) -> list[str]:
        error = self.logs[1]
        text = error.read_text(encoding="utf-8", errors="replace") if error.exists() else ""
        return [line for line in redacted(text).splitlines() if line.strip()][-LAST_LINES:]

    @property
    def death(self) -> str:
        """One sentence on why it ended before its cells were finished; empty if it did not."""
        of_job = [e for e in callbacks.read(self.entry.events(self.index)) if e["event"].startswith("job ")]
        if of_job and of_job[-1]["event"] in ("job finished", "job gave up"):
            return str(of_job[-1].get("message", ""))
        state = self.queued.state if self.queued else ""
        told = "\n".join([*self.last_lines, state])
        for pattern, sentence in DEATHS.items():
            if re.search(pattern, told, re.IGNORECASE):
                return sentence.format(memory_gb=self.entry.memory_gb, more_gb=2 * self.entry.memory_gb)
        return f"The job ended early{state and f' ({state})'}; `logs` shows what it said."


@dataclass(frozen=True)
class CellState:
    """`state` is done, incomplete (without a task), running, queued, failed or missing; `note` one sentence where
    something is to be said."""

    id: str
    label: str
    state: str
    job: str = ""
    note: str = ""
    lines: tuple[str, ...] = ()


def jobs(root: Path, table: str) -> list[Job]:
    """Every job ever sent, oldest first, with what the queue says of it; SlurmError where that cannot be asked."""
    entries = ledger.load(root, table)
    told = queue.jobs([entry.name for entry in entries if entry.executor == "slurm" and _unfinished(entry)])
    return [
        Job(entry, index, told.get(sent.id) if entry.executor == "slurm" else _process(entry, index))
        for entry in entries
        for index, sent in enumerate(entry.jobs)
    ]


def cells(root: Path, table: str, labels: Mapping[str, str]) -> list[CellState]:
    """Of these cells (labels by id), in their order."""
    done, failures = records.load(root, table), records.load_failures(root, table)
    last = {id: job for job in sorted(jobs(root, table), key=lambda job: job.alive) for id in job.sent.cells}
    return [_cell(id, label, done.get(id), failures.get(id), last.get(id)) for id, label in labels.items()]


def _cell(id: str, label: str, record: Record | None, failure: Failure | None, job: Job | None) -> CellState:
    name = job.sent.id if job else ""
    if job and job.queued and job.alive and not _since(job, record):
        if job.queued.state == "PENDING":
            return CellState(id, label, "queued", name, job.queued.reason)
        return CellState(id, label, "running" if job.current == id else "queued", name)
    if failure:  # later than a record, which would have removed it
        return CellState(id, label, "failed", name, failure.message, tuple(failure.traceback))
    if job and job.current == id and not _since(job, record):
        return CellState(id, label, "failed", name, job.death, tuple(job.last_lines))
    if record:
        return _finished(id, label, name, record)
    return CellState(id, label, "missing", name, job.death if job else "")


def _since(job: Job, record: Record | None) -> bool:
    """Whether the record is younger than the job's submission, which may be there to make it again."""
    return record is not None and record.made_by.at >= job.entry.at


def _finished(id: str, label: str, job: str, record: Record) -> CellState:
    if lacking := measures.missing(record.measures):
        return CellState(id, label, "incomplete", job, f"without {', '.join(lacking)}: {next(iter(lacking.values()))}")
    return CellState(id, label, "done", job, f"resumed {record.resumed} times" if record.resumed else "")


def labels(root: Path, table: str) -> dict[str, str]:
    """Of every cell that was ever submitted, by id."""
    return {id: label for entry in ledger.load(root, table) for id, label in entry.cells.items()}


def models(root: Path, table: str) -> dict[str, str]:
    """What a reader calls the model of every cell that was ever submitted, by id."""
    return {id: entry.model for entry in ledger.load(root, table) for id in entry.cells}


def find(root: Path, cell: str) -> list[Job]:
    """The jobs that had this cell, by its id or label, oldest first; UsageError where there is none."""
    found = [
        Job(entry, index, None)
        for table in ledger.tables(root)
        for entry in ledger.load(root, table)
        for index, sent in enumerate(entry.jobs)
        if cell in sent.cells or cell.lower() in map(str.lower, sent.cells.values())
    ]
    if not found:
        raise UsageError(f"No job was ever sent with a cell {cell!r}; `status TABLE` lists ids and labels.")
    return found


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


def _unfinished(entry: Entry) -> bool:
    """Whether a cell has no record since it was sent: it may have been sent to be made again."""
    done = records.load(Path(entry.root), entry.table)
    return any(id not in done or done[id].made_by.at < entry.at for id in entry.cells)


def _process(entry: Entry, index: int) -> Queued | None:
    """A job on this machine, as long as it lives; a process of that number may be somebody else's by now."""
    try:
        command = psutil.Process(int(entry.jobs[index].id)).cmdline()
    except (ValueError, psutil.Error):  # no number for a job in this process
        return None
    return Queued("RUNNING", socket.gethostname(), "", "") if str(entry.folder) in command else None
