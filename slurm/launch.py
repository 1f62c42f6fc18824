"""Sends what is missing: cells without a record that no job has, as arrays to Slurm or one by one on this machine.

The order of steps is what makes a killed launcher harmless: the entry is stored, the cluster is asked, the entry is
completed.  An entry that stayed incomplete names jobs that may lack their payload; the next launch cancels them and
sends their cells again.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import psutil
from submitit import LocalExecutor, SlurmExecutor
from submitit.core.utils import FailedJobError
from submitit.helpers import clean_env
from submitit.slurm.slurm import _make_sbatch_string  # the only way to see the script without sending it

from experiments.cells import Cell
from experiments.store import found, records
from slurm import jobs, ledger, queue, state
from slurm.jobs import Array
from slurm.ledger import Entry
from slurm.profile import Profile
from slurm.queue import SlurmError
from slurm.work import Work

NEVER = 10**6  # submitit's own count of time-outs, which an interrupted cell could mistake for an error of its own


def missing(plan: Work, chosen: Sequence[Cell]) -> list[Cell]:
    """Cells that have no record which `plan` would keep, and that no living job has."""
    finished = found.finished(chosen, records.load(plan.root, plan.table), plan.data_dir, plan.again)
    taken = {id for job in state.jobs(plan.root, plan.table) if job.alive for id in job.sent.cells}
    return [cell for cell in chosen if cell.id not in finished and cell.id not in taken]


def launch(
    plan: Work, chosen: Sequence[Cell], profile: Profile, executor: str, memory_gb: float | None = None
) -> Iterator[Entry]:
    """Send what is missing of the chosen cells; yields every submission.  `plan` is what a job gets, less its cells.

    On this machine (`local`: a subprocess, `debug`: this process) a job is waited for before the next one is sent.
    Raises SlurmError where Slurm refuses, TooLargeError before anything is sent.
    """
    if executor == "slurm":
        queue.check()
    with ledger.launching(plan.root, plan.table):
        clear_broken(plan.root, plan.table)
        todo = jobs.arrays(missing(plan, chosen), profile, memory_gb)
        if executor == "slurm":
            for array in todo:
                yield _send(plan, array, profile, executor)
            return
    for array in todo:
        for job in array.jobs:
            yield from _here(plan, replace(array, jobs=(job,)), profile, executor)


def clear_broken(root: Path, table: str) -> None:
    """Cancel and forget what a launcher that was killed left half sent; only for who holds `ledger.launching`."""
    for entry in ledger.load(root, table):
        if not entry.complete:
            if entry.executor == "slurm":
                queue.cancel_named(entry.name)
            ledger.remove(entry)


def script(array: Array, profile: Profile, name: str, folder: Path) -> str:
    """The batch script of this array, as sbatch gets it."""
    command = f"{profile.python or shlex.quote(sys.executable)} -u -m submitit.core._submit {shlex.quote(str(folder))}"
    count = len(array.jobs) if len(array.jobs) > 1 else None
    return _make_sbatch_string(command, folder, map_count=count, **_parameters(array, profile, name))


def _here(plan: Work, array: Array, profile: Profile, executor: str) -> Iterator[Entry]:
    """One job on this machine, of those of its cells that by now nobody else has."""
    with ledger.launching(plan.root, plan.table):
        (job,) = array.jobs
        left = tuple(missing(plan, job.cells))
        if not left:
            return
        entry = _send(plan, replace(array, jobs=(replace(job, cells=left),)), profile, executor)
    yield entry
    if executor == "debug":
        _works(plan, entry)[0]()
    else:
        _wait(int(entry.jobs[0].id))


def _send(plan: Work, array: Array, profile: Profile, executor: str) -> Entry:
    entry = ledger.new(plan.root, plan.table, executor, array)
    ledger.write(entry)
    works = _works(replace(plan, requeues=profile.requeues), entry)
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
        replace(plan, cells=tuple(job.cells), events=str(entry.events(index))) for index, job in enumerate(entry.jobs)
    ]


def _to_slurm(entry: Entry, works: Sequence[Work], array: Array, profile: Profile) -> list[str]:
    executor = SlurmExecutor(entry.folder, max_num_timeout=NEVER, python=profile.python)
    executor.update_parameters(**_parameters(array, profile, entry.name))
    try:
        with _outside_a_job(), redirect_stderr(StringIO()):  # submitit prints what it raises as well
            return [job.job_id for job in executor.submit_array(works)]
    except FailedJobError as error:
        raise SlurmError(f"sbatch refused: {queue.complaint(str(error))}") from error


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


SENDERS: dict[str, Callable[[Entry, Sequence[Work], Array, Profile], list[str]]] = {
    "slurm": _to_slurm,
    "local": _to_subprocess,
    "debug": _to_this_process,
}


def _wait(process: int) -> None:
    with suppress(psutil.NoSuchProcess):
        psutil.Process(process).wait()


def _parameters(array: Array, profile: Profile, name: str) -> dict[str, Any]:
    exports = [f"export {variable}={shlex.quote(value)}" for variable, value in profile.environment.items()]
    asked = {
        "job_name": name,
        "time": array.request.minutes,
        "mem": f"{array.request.memory_gb:.0f}G",
        "cpus_per_task": profile.cpus,
        "signal_delay_s": profile.warning_seconds,
        "array_parallelism": profile.parallel,
        "setup": [*profile.setup, *exports] or None,
        "wckey": None,  # submitit's own would be refused where such keys are checked
        "srun_args": [f"--cpus-per-task={profile.cpus}"],  # srun no longer takes that over from the job by itself
        "additional_parameters": {
            "requeue": True,
            **{name: value for name, value in profile.options.items() if value is not False},
        },
    }
    named = ("partition", "account", "qos", "constraint", "gres")
    return asked | {key: value for key in named if (value := getattr(profile, key)) is not None}
