"""Submits missing cells, those without a record or a job: as arrays to Slurm, or one by one on this machine.

The order of steps is what makes a killed launcher harmless: the entry is stored, the cluster is asked, the entry is
completed.  An entry that stayed incomplete names jobs that may lack their payload; the next launch cancels them and
sends their cells again.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
from submitit import LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env
from submitit.slurm.slurm import _make_sbatch_string  # the only way to see the script without sending it

from experiments import batch
from experiments.cells import Cell
from experiments.store import elsewhere, records
from slurm import choices, jobs, ledger, queue, state
from slurm.jobs import Array
from slurm.ledger import Entry
from slurm.profile import Profile
from slurm.queue import SlurmError
from slurm.work import Work

Chosen = Mapping[str, Sequence[Cell]]  # by table
Profiles = Mapping[str, Profile]  # by name
NEVER = 10**6  # submitit's own count of time-outs, which an interrupted cell could mistake for an error of its own


@dataclass(frozen=True)
class Todo:
    """Cells to send, each once; `tables` are those that ask for it, by id, and `left` why others are not sent."""

    cells: list[Cell]
    tables: dict[str, list[str]]
    left: dict[str, str] = field(default_factory=dict)


def missing(plan: Work, chosen: Chosen, dry: bool = False) -> Todo:
    """Cells that have no record which `plan` would keep, and that no living job has.

    A record of the same cell in another table is taken over, and a living job that has it for another table has it for
    this one, too, from now on, unless all that is only looked at (`dry`).
    """
    taken = {id: job.entry for job in state.jobs(plan.root) if job.alive for id in job.sent.cells}
    cells: dict[str, Cell] = {}
    tables: dict[str, list[str]] = {}
    for table, asked in chosen.items():
        known = batch.finished(asked, records.load(plan.root, table), plan.settings(table, asked))
        left = [cell for cell in asked if cell.id not in known]
        if not dry:
            _ask(table, [cell.id for cell in left if cell.id in taken], taken)
        for cell in left:
            if cell.id in taken or _elsewhere(plan, table, cell, dry):
                continue
            cells.setdefault(cell.id, cell)
            tables.setdefault(cell.id, []).append(table)
    return Todo(list(cells.values()), tables)


def _ask(table: str, ids: Sequence[str], taken: dict[str, Entry]) -> None:
    """Of the jobs that have these cells; `taken` are their submissions by cell, and is kept up."""
    wanted: dict[str, list[str]] = {}
    for id in ids:
        if table not in taken[id].asking(id):
            wanted.setdefault(taken[id].name, []).append(id)
    for name, some in wanted.items():
        entry = taken[some[0]].asked_by(table, some)
        ledger.write(entry)
        taken.update({id: entry for id, other in taken.items() if other.name == name})


def _elsewhere(plan: Work, table: str, cell: Cell, dry: bool) -> bool:
    take = elsewhere.known if dry else elsewhere.adopt
    return not plan.saves and take(plan.root, table, cell, plan.data_dir) is not None


def planned(plan: Work, todo: Todo, profiles: Profiles, memory_gb: float | None = None) -> list[tuple[str, Array]]:
    """By the name of their profile; `todo.left` says afterwards what no profile takes."""
    by_profile, left = jobs.assigned(todo.cells, profiles, memory_gb)
    todo.left.update(left)
    largest = queue.largest_array(jobs.LARGEST_ARRAY)
    arrays = [
        (name, array)
        for name, cells in by_profile.items()
        for array in jobs.arrays(cells, profiles[name], memory_gb, largest)
    ]
    alive = [job for job in state.jobs(plan.root) if job.alive and job.entry.executor == "slurm"]
    latest_first = sorted(alive, key=lambda job: [*map(int, job.sent.id.split("_"))], reverse=True)
    makers = {id: job.sent.id for job in latest_first for id in job.sent.choices}  # of several the first that was sent
    return choices.Choices(plan.root, plan.data_dir, plan.again, makers).parted(arrays)


def launch(
    plan: Work, chosen: Chosen, profiles: Profiles, executor: str, memory_gb: float | None = None
) -> Iterator[Entry | Todo]:
    """Send what is missing of the chosen cells; yields what there is to do, then every submission.

    `plan` is what a job gets, less its cells.  On this machine (`local`: a subprocess, `debug`: this process) a job is
    waited for before the next one is sent.  Raises SlurmError where Slurm refuses.
    """
    if executor == "slurm":
        queue.check()
    with ledger.launching(plan.root):
        clear_broken(plan.root)
        todo = missing(plan, chosen)
        arrays = planned(plan, todo, profiles, memory_gb)
        yield todo
        if executor == "slurm":
            yield from _send_all(plan, todo, arrays, profiles)
            return
    for name, array in arrays:
        for job in array.jobs:
            yield from _here(plan, chosen, replace(array, jobs=(job,)), profiles[name], executor)


def clear_broken(root: Path) -> None:
    """Cancel and forget what a launcher that was killed left half sent; only for who holds `ledger.launching`."""
    for entry in ledger.load(root):
        if not entry.complete:
            if entry.executor == "slurm":
                queue.cancel_named(entry.name)
            ledger.remove(entry)


def script(array: Array, profile: Profile, name: str, folder: Path) -> str:
    """The batch script of this array, as sbatch gets it."""
    command = f"{profile.python or shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    count = len(array.jobs) if len(array.jobs) > 1 else None
    return _make_sbatch_string(command, folder, map_count=count, **_parameters(array, profile, name))


def _here(plan: Work, chosen: Chosen, array: Array, profile: Profile, executor: str) -> Iterator[Entry]:
    """One job on this machine, of those of its cells that by now nobody else has."""
    with ledger.launching(plan.root):
        (job,) = array.jobs
        ids = {cell.id for cell in job.cells}
        left = missing(plan, {name: [cell for cell in cells if cell.id in ids] for name, cells in chosen.items()})
        still = tuple(cell for cell in job.cells if cell.id in left.tables)
        if not still:
            return
        entry = _send(plan, replace(array, jobs=(replace(job, cells=still),)), left.tables, profile, executor)
    yield entry
    if executor == "debug":
        _works(plan, entry)[0]()
    else:
        _wait(int(entry.jobs[0].id))


def _send_all(plan: Work, todo: Todo, arrays: Sequence[tuple[str, Array]], profiles: Profiles) -> Iterator[Entry]:
    sent: dict[str, str] = {}
    for name, array in arrays:
        waits = profiles[name].after(choices.awaited(array, sent))
        entry = _send(plan, array, todo.tables, waits, "slurm")
        sent |= {job.key: told.id for job, told in zip(array.jobs, entry.jobs, strict=True)}
        yield entry


def _send(plan: Work, array: Array, tables: Mapping[str, list[str]], profile: Profile, executor: str) -> Entry:
    entry = ledger.new(plan.root, tables, executor, array)
    entry = replace(entry, asks=asks(array, profile), memory_gb=0 if profile.whole_memory else entry.memory_gb)
    ledger.write(entry)
    works = _works(replace(plan, requeues=profile.requeues, cards=entry.cards), entry)
    try:
        ids = SENDERS[executor](entry, works, array, profile)
    except SlurmError:
        ledger.remove(entry)
        raise
    entry = entry.with_ids(ids)
    ledger.write(entry)
    return entry


def _works(plan: Work, entry: Entry) -> list[Work]:
    return [
        replace(plan, cells={id: tuple(entry.asking(id)) for id in job.cells}, events=str(entry.events(index)))
        for index, job in enumerate(entry.jobs)
    ]


def _to_slurm(entry: Entry, works: Sequence[Work], array: Array, profile: Profile) -> list[str]:
    executor = SlurmExecutor(entry.folder, max_num_timeout=NEVER, python=profile.python)
    executor.update_parameters(**_parameters(array, profile, entry.name))
    try:
        with _outside_a_job(), redirect_stderr(StringIO()):  # submitit prints what it raises as well
            return [job.job_id for job in executor.submit_array(works)]
    except FailedJobError as error:
        raise queue.refusal("sbatch", str(error)) from error


@contextmanager
def _outside_a_job() -> Iterator[None]:
    """Jobs inherit nothing of a job that sends them; but sbatch is still told where its cluster is."""
    cluster = {name: value for name, value in os.environ.items() if name == "SLURM_CONF"}
    with clean_env():
        os.environ.update(cluster)
        yield


def _to_subprocess(entry: Entry, works: Sequence[Work], array: Array, profile: Profile) -> list[str]:
    executor = LocalExecutor(entry.folder, max_num_timeout=NEVER, python=profile.python)
    executor.update_parameters(timeout_min=NEVER, gpus_per_node=array.request.gpus)
    return [job.job_id for job in executor.submit_array(works)]


def _to_this_process(entry: Entry, works: Sequence[Work], array: Array, profile: Profile) -> list[str]:
    return ["debug" for _ in works]


SENDERS: dict[str, Callable[[Entry, Sequence[Any], Array, Profile], list[str]]] = {
    "slurm": _to_slurm,
    "local": _to_subprocess,
    "debug": _to_this_process,
}


def _wait(process: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(process).wait()


def asks(array: Array, profile: Profile) -> str:
    """What each job asks for, in words."""
    request = array.request
    memory = request.memory(profile.whole_memory)
    told = [f"{request.cards * profile.cpus} CPUs", memory, profile.gres_of(request.cards), f"{request.hours:.3g} h"]
    return ", ".join(filter(None, told))


def _parameters(array: Array, profile: Profile, name: str) -> dict[str, Any]:
    exports = [f"export {variable}={shlex.quote(value)}" for variable, value in profile.environment.items()]
    cpus = array.request.cards * profile.cpus
    asked = {
        "job_name": name,
        "time": array.request.minutes,
        "mem": "0" if profile.whole_memory else f"{array.request.memory_gb:.0f}G",
        "cpus_per_task": cpus,
        "signal_delay_s": profile.warning_seconds,
        "array_parallelism": profile.parallel,
        "setup": [*profile.setup, *exports] or None,
        "wckey": None,  # submitit's own would be refused where such keys are checked
        "srun_args": [f"--cpus-per-task={cpus}"],  # srun no longer takes that over from the job by itself
        "additional_parameters": {
            "requeue": True,
            **{name: value for name, value in profile.options.items() if value is not False},
        },
    }
    named = {key: getattr(profile, key) for key in ("partition", "account", "qos", "constraint")}
    named["gres"] = profile.gres_of(array.request.cards)
    return asked | {key: value for key, value in named.items() if value is not None}
