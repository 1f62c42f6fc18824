"""Send the cells of a paper's table to a cluster, and see how they are.

python -m slurm submit embedded.demo --profile gpu_partition --dry-run
python -m slurm status embedded.demo
python -m slurm logs 361c449de9
python -m slurm retry embedded.demo --failed
python -m slurm cancel embedded.demo
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from experiments import cli
from experiments.models import catalogue

if TYPE_CHECKING:
    from experiments.cells import Cell
    from slurm.jobs import Array
    from slurm.state import CellState
    from slurm.work import Work

LOG_LINES = 200


def main(words: Sequence[str] | None = None) -> int:
    """The exit status."""
    asked = parser().parse_args(words)
    asked.results = asked.results.resolve()  # jobs may run in another folder
    return cli.carry_out(asked, "Stopped. What was sent is in the queue; the same command sends the rest.")


def parser() -> argparse.ArgumentParser:
    top = cli.Parser(prog="python -m slurm", description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    submit = commands.add_parser("submit", help="send the cells that have no record and are not queued")
    retry = commands.add_parser("retry", help="send the cells that failed once more")
    retry.add_argument("--failed", action="store_true", required=True, help="which cells: those that failed")
    for command in (submit, retry):
        cli.add_selection(command)
        cli.add_running(command)
        cli.add_saving(command)
        _add_sending(command)
    status = commands.add_parser("status", help="how the cells and jobs of a table stand")
    cancel = commands.add_parser("cancel", help="stop every job of a table")
    for command in (status, cancel):
        command.add_argument("table", type=cli.word, metavar="TABLE")
    logs = commands.add_parser("logs", help="what the last job with a cell said")
    logs.add_argument("cell", type=cli.word, metavar="CELL", help="its id or label")
    for command in (status, cancel, logs):
        cli.add_results(command)
    actions = {submit: _submit, retry: _retry, status: _status, cancel: _cancel, logs: _logs}
    for command, action in actions.items():
        command.set_defaults(command=action)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return top


def _add_sending(command: argparse.ArgumentParser) -> None:
    command.add_argument("--profile", type=cli.word, default="cpu", metavar="NAME|FILE", help="default: cpu")
    command.add_argument("--executor", choices=("slurm", "local", "debug"), default="slurm", help="default: slurm")
    command.add_argument(
        "--memory-gb", type=cli.gigabytes, metavar="GB", help="ask for this much instead of the estimate"
    )
    command.add_argument("--dry-run", action="store_true", help="show the jobs and their script, send nothing")


def _submit(asked: argparse.Namespace) -> int:
    return _launch(asked, cli.chosen(asked))


def _retry(asked: argparse.Namespace) -> int:
    from slurm import state

    cells = {cell.id: cell for cell in cli.chosen(asked)}
    labels = {id: cell.label for id, cell in cells.items()}
    failed = [cell.id for cell in state.cells(asked.results, asked.table, labels) if cell.state == "failed"]
    return _launch(asked, [cells[id] for id in failed])


def _refuse_unheeded(asked: argparse.Namespace) -> None:
    """UsageError for options about the jobs of a cluster where none is asked."""
    from pruners.suggest import UsageError

    told = {"--memory-gb": asked.memory_gb, "--dry-run": asked.dry_run}
    if asked.executor != "slurm" and (unheeded := [name for name, value in told.items() if value]):
        which = " and ".join(unheeded)
        raise UsageError(f"{which} means nothing without a cluster; leave it out, or --executor {asked.executor}.")


def _launch(asked: argparse.Namespace, cells: Sequence[Cell]) -> int:
    from slurm import estimate, jobs, launch, profile

    _refuse_unheeded(asked)
    plan, wanted = _plan(asked), profile.load(asked.profile)
    todo = launch.missing(plan, cells)
    if slow := estimate.slow(todo, wanted):
        print(_slowness(slow, len(todo), asked.profile), file=sys.stderr)
    if asked.dry_run:
        for array in jobs.arrays(todo, wanted, asked.memory_gb):
            _show(array)
            print(f"\n{launch.script(array, wanted, asked.table, plan.root / '.cache/slurm/...')}")
        return 0
    sent = 0
    for entry in launch.launch(plan, cells, wanted, asked.executor, asked.memory_gb):
        for job in entry.jobs:
            sent += len(job.cells)
            print(f"{job.id}: {', '.join(job.cells.values())}", flush=True)
    print(
        f"{asked.table}: cells sent: {sent}, done or queued already: {len(cells) - sent}; "
        f"python -m slurm status {cli.same_table(asked)}",
        file=sys.stderr,
    )
    return 0


def _slowness(slow: Mapping[Cell, float], count: int, name: str) -> str:
    from experiments.placement.needs import device_gb
    from slurm import estimate, profile

    said = (
        f"{len(slow)} of {count} cells would take more than {estimate.PATIENCE_DAYS} days each with the profile {name},"
        f" up to {max(slow.values()):,.0f}"
    )
    others = {other: profile.load(other).gpu_memory_gb for other in profile.names() if other != name}
    cards = ", ".join(f"{other} ({held:g} GB)" for other, held in others.items() if held)
    most = max(device_gb(cell.run) for cell in slow)
    needed = f"profiles with accelerators: {cards}; these cells need up to {most:.0f} GB on one"
    return f"{said}; {needed}." if cards else f"{said}."


def _plan(asked: argparse.Namespace) -> Work:
    from experiments.own import tables
    from slurm.work import Work

    ours = {"command", "debug", "profile", "executor", "memory_gb", "dry_run", "failed"}
    told = {name: value for name, value in vars(asked).items() if name not in ours}
    places = {name: _absolute(told[name]) for name in ("data_dir", "save_models")}  # jobs may run in another folder
    model = told["model"] and catalogue.absolute(told["model"])
    own = {"plugin": [_absolute(file) for file in asked.plugin], "source": tables.absolute(asked.source)}
    return Work({**told, "model": model, "results": str(asked.results), **places, **own})


def _absolute(place: Path | None) -> str | None:
    return str(place.expanduser().resolve()) if place else None


def _show(array: Array) -> None:
    request = array.request
    rows = [(number, len(job.cells), job.label) for number, job in enumerate(array.jobs)]
    print(tabulate(rows, ("job", "cells", "which")))
    device = f"{request.gpus} accelerator with {request.gpu_memory_gb:g} GB in use, " if request.gpus else ""
    times = (
        f", then back into the queue, {request.needed_hours:.1f} h in all"
        if request.hours < request.needed_hours
        else ""
    )
    print(f"\nEach asks for {device}{request.memory_gb:g} GB of memory and {request.hours:.1f} h{times}.")


def _status(asked: argparse.Namespace) -> int:
    from experiments import cells, papers
    from slurm import state

    table = papers.find(asked.table)
    labels, models = state.labels(asked.results, asked.table), state.models(asked.results, asked.table)
    if not labels:
        declared = cells.cells(table.runs(), table.label)
        labels = {cell.id: cell.label for cell in declared}
        models = {cell.id: cell.run.model_name for cell in declared}
    found = state.cells(asked.results, asked.table, labels)
    _print_cells(found, models)
    _print_failures(found)
    alive = [(job.sent.id, job.queued) for job in state.jobs(asked.results, asked.table) if job.alive and job.queued]
    if alive:
        queued = [(id, job.state, job.node, job.left) for id, job in alive]
        print(f"\n{tabulate(queued, ('job', 'state', 'node', 'time left'), disable_numparse=True)}")
    counts = Counter(cell.state for cell in found)
    print(f"\n{asked.table}: {', '.join(f'{count} {name}' for name, count in counts.items())}")
    return cli.EXIT_FAILED if counts["failed"] else 0


def _print_cells(found: Sequence[CellState], models: Mapping[str, str]) -> None:
    """With their models where there are several."""
    several = len(set(models.values())) > 1
    rows = [
        (cell.label, cell.id, *([models[cell.id]] if several else []), cell.state, cell.job, cell.note)
        for cell in found
    ]
    heads = ("cell", "id", *(["model"] if several else []), "state", "job", "note")
    print(tabulate(rows, heads, disable_numparse=True))


def _print_failures(found: Sequence[CellState]) -> None:
    for cell in found:
        if cell.state == "failed":
            print("\n".join([f"\n{cell.label} ({cell.id}):", *(f"    {line}" for line in cell.lines)]))


def _cancel(asked: argparse.Namespace) -> int:
    from experiments import papers
    from slurm import ledger, state

    papers.find(asked.table)
    with ledger.launching(asked.results, asked.table):
        stopped = state.cancel(state.jobs(asked.results, asked.table))
    print(f"{asked.table}: jobs cancelled: {len(stopped)}; what they had finished is kept", file=sys.stderr)
    return 0


def _logs(asked: argparse.Namespace) -> int:
    from experiments.store.redaction import redacted
    from slurm import state

    job = state.find(asked.results, asked.cell)[-1]
    for path in job.logs:
        print(f"==> {path} <==")
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ["(nothing yet)"]
        print(redacted("\n".join(lines[-LOG_LINES:])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
