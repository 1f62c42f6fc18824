"""Run the cells of the papers' tables as Slurm jobs, and follow them.

python -m slurm submit embedded.demo --profile gpu_partition --dry-run
python -m slurm submit --all --profile rtx4090.toml a100.toml --collect
python -m slurm status
python -m slurm status embedded.demo --watch
python -m slurm logs 361c449de9
python -m slurm logs collect
python -m slurm retry embedded.demo --failed
python -m slurm cancel embedded.demo
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

from experiments import cli, selection
from experiments.models import catalogue
from experiments.progress import duration

if TYPE_CHECKING:
    from experiments.cells import Cell
    from slurm.jobs import Array, Job
    from slurm.profile import Profile
    from slurm.work import Work

LOG_LINES = 200


def main(words: Sequence[str] | None = None) -> int:
    """The exit status."""
    asked = parser().parse_args(words)
    asked.results = asked.results.resolve()  # jobs may run in another folder
    return cli.carry_out(asked, _stopped(asked))


def _stopped(asked: argparse.Namespace) -> str:
    """What is so once this command is interrupted."""
    if asked.command in (_submit, _retry):
        if asked.dry_run:
            return "Stopped. Nothing was submitted."
        if asked.executor != "slurm":
            return "Stopped. Finished cells are kept; the same command runs the rest."
        return "Stopped. Submitted jobs stay in the queue; the same command submits the rest."
    if asked.command is _cancel:
        return "Stopped. Some jobs may be cancelled by now; the same command cancels the rest."
    return "Stopped. The jobs are as they were."


def parser() -> argparse.ArgumentParser:
    top = cli.Parser(prog="python -m slurm", description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    submit = commands.add_parser("submit", help="submit the cells that have no record and are not queued yet")
    retry = commands.add_parser("retry", help="submit failed and cancelled cells again")
    retry.add_argument(
        "--failed", action="store_true", required=True, help="submit cells that failed or were cancelled (required)"
    )
    for command in (submit, retry):
        selection.add(command)
        cli.add_running(command)
        cli.add_saving(command)
        _add_sending(command)
    status = commands.add_parser("status", help="overview of all tables, or the cells and jobs of the given ones")
    selection.add(status)
    cli.add_data(status)
    shown = status.add_mutually_exclusive_group()
    shown.add_argument("--watch", action="store_true", help="refresh in place until no job runs or waits")
    shown.add_argument("--json", action="store_true", help="print the cells as a JSON list")
    cancel = commands.add_parser(
        "cancel", help="cancel the jobs of these tables, except those that other tables need as well"
    )
    selection.add_tables(cancel)
    cli.add_variant(cancel)
    cli.add_data(cancel)
    logs = commands.add_parser("logs", help="show the log of the last job that had a cell")
    logs.add_argument("cell", type=cli.word, metavar="CELL", help="id or label of the cell, or: collect")
    for command in (cancel, logs):
        cli.add_results(command)
    actions = {submit: _submit, retry: _retry, status: _status, cancel: _cancel, logs: _logs}
    for command, action in actions.items():
        command.set_defaults(command=action, idle=action is _status)
        command.add_argument("--debug", action="store_true", help="show the full traceback on error")
    return top


def _add_sending(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--profile", nargs="+", type=cli.word, default=["cpu"], metavar="NAME|FILE",
        help="Slurm profile: a name in slurm/profiles or a TOML file; of several, each cell goes to the smallest "
        "GPU that holds it (default: cpu)",
    )  # fmt: skip
    command.add_argument(
        "--executor",
        choices=("slurm", "local", "debug"),
        default="slurm",
        help="slurm, or run the jobs on this machine: as subprocesses (local) or in this process (debug); "
        "default: slurm",
    )
    command.add_argument(
        "--memory-gb", type=cli.gigabytes, metavar="GB", help="memory to request per job, instead of the estimate"
    )
    command.add_argument("--dry-run", action="store_true", help="print the jobs and batch scripts, submit nothing")
    command.add_argument(
        "--collect", action="store_true", help="add a last job that writes tables, figures, claims and the report"
    )
    cli.add_strict(command)


def _submit(asked: argparse.Namespace) -> int:
    return _launch(asked, selection.chosen(asked))


def _retry(asked: argparse.Namespace) -> int:
    from slurm import state

    known, again = state.jobs(asked.results), []
    for one, cells in selection.chosen(asked):
        found = state.cells(asked.results, one.table, {cell.id: cell.label for cell in cells}, known)
        failed = {cell.id for cell in found if cell.state in ("failed", "cancelled")}
        again.append((one, [cell for cell in cells if cell.id in failed]))
    return _launch(asked, again)


def _refuse_unheeded(asked: argparse.Namespace) -> None:
    """UsageError for options about the jobs of a cluster where none is asked."""
    from pruners.interface.suggest import UsageError

    told = {"--memory-gb": asked.memory_gb, "--dry-run": asked.dry_run}
    if asked.executor != "slurm" and (unheeded := [name for name, value in told.items() if value]):
        which = " and ".join(unheeded)
        raise UsageError(
            f"{which} has no effect without a cluster; leave it out, or leave out --executor {asked.executor}."
        )


def _refuse_unmeant(asked: argparse.Namespace, profiles: Mapping[str, Profile]) -> None:
    """UsageError for what Slurm would take for something else."""
    from pruners.interface.suggest import UsageError

    if "%" in str(asked.results) and asked.executor != "debug":
        raise UsageError(
            f"Jobs write their logs under {asked.results}, and Slurm replaces % in the names of logs; use a "
            "results folder without % in its path."
        )
    whole = [name for name, found in profiles.items() if found.whole_memory]
    if whole and asked.memory_gb is not None:
        raise UsageError(f"The profile {whole[0]} requests all memory of a node (whole_memory); leave out --memory-gb.")


def _launch(asked: argparse.Namespace, chosen: selection.Asked) -> int:
    from slurm import collect, estimate, launch, pace, profile

    _refuse_unheeded(asked)
    loaded = {name: profile.load(name) for name in dict.fromkeys(asked.profile)}
    if ":" in (asked.device or ""):  # one card by its number
        loaded = {name: found.model_copy(update={"cards": 1}) for name, found in loaded.items()}
    _refuse_unmeant(asked, loaded)
    calibrated = {name: pace.measured(found, asked.results) for name, found in loaded.items()}
    profiles = {name: found.with_weights(asked.weights) for name, (found, _) in calibrated.items()}
    plan, tables = _plan(asked, chosen), {one.table: cells for one, cells in chosen}
    first = next(iter(profiles))
    if len(profiles) == 1 and (slow := estimate.slow(launch.missing(plan, tables, dry=True).cells, profiles[first])):
        count = len({cell.id for cells in tables.values() for cell in cells})
        print(_slowness(slow, count, first), file=sys.stderr)
    if asked.dry_run:
        cli.say_lines([f"{name}: {line}" for name, (_, lines) in calibrated.items() for line in lines])
        return _dry_run(asked, plan, tables, profiles)
    sent, left, ids = 0, {}, []
    for entry in launch.launch(plan, tables, profiles, asked.executor, asked.memory_gb):
        if isinstance(entry, launch.Todo):
            left = entry.left
            cli.say_lines(_left(left, tables))
            continue
        for job in entry.jobs:
            sent += sum(len(entry.asking(id)) for id in job.cells)
            ids.append(job.id)
            print(f"{job.id}: {', '.join(job.cells.values())}", flush=True)
    if asked.collect:
        every = {cell.id for one in selection.each(asked) for cell in cli.declared(one)}
        print(collect.send(plan, every, profiles[first], asked.executor), flush=True)
    _say_sent(asked, tables, sent, left)
    return cli.EXIT_FAILED if left and asked.strict else 0


def _say_sent(
    asked: argparse.Namespace, tables: Mapping[str, Sequence[Cell]], sent: int, left: Mapping[str, str]
) -> None:
    count = sum(map(len, tables.values()))
    lacking = sum(cell.id in left for cells in tables.values() for cell in cells)
    which = f"{len(tables)} tables" if len(tables) > 1 else next(iter(tables))
    told = f"{which}: cells submitted: {sent}, done or queued already: {count - sent - lacking}"
    told += f", left out: {lacking}" if lacking else ""
    print(f"{told}; python -m slurm status {cli.same_tables(asked)}".rstrip(), file=sys.stderr)


def _left(left: Mapping[str, str], tables: Mapping[str, Sequence[Cell]]) -> list[str]:
    return [
        line
        for table, cells in tables.items()
        for line in selection.left_out(table, {cell.label: left[cell.id] for cell in cells if cell.id in left})
    ]


def _dry_run(
    asked: argparse.Namespace, plan: Work, tables: Mapping[str, Sequence[Cell]], profiles: Mapping[str, Profile]
) -> int:
    from slurm import collect, launch

    todo = launch.missing(plan, tables, dry=True)
    planned = launch.planned(plan, todo, profiles, asked.memory_gb)
    named = next(iter(tables)) if len(tables) == 1 else f"{next(iter(tables))}+{len(tables) - 1}"
    for name, array in planned:
        _show(array, name if len(profiles) > 1 else "", profiles[name].whole_memory)
        print(f"\n{launch.script(array, profiles[name], named, plan.root / '.cache/slurm/...')}")
    cli.say_lines(_left(todo.left, tables))
    for name in dict.fromkeys(name for name, _ in planned):
        of_profile = [job for other, array in planned if other == name for job in array.jobs]
        print(f"{name}: {_counted(of_profile)}")
    if asked.collect:
        first = next(iter(profiles.values()))
        array, waits = collect.planned(first), collect.waiting(first, ["JOBS"])
        request = array.request
        print(
            f"\nA last job, once those of these tables have ended, writes {collect.WHAT}. It requests "
            f"{request.memory(waits.whole_memory)} and {duration(60 * request.minutes)}.\n\n"
            f"{launch.script(array, waits, collect.NAME, plan.root / '.cache/slurm/...')}"
        )
    would = _number(len(todo.cells) - len(todo.left), "cell")
    print(f"Nothing was submitted: {would} would be, {len(todo.left)} left out.")
    return cli.EXIT_FAILED if todo.left and asked.strict else 0


def _counted(planned: Sequence[Job]) -> str:
    """E.g. `14 cells in 9 jobs, about 28.0 h together`; with their cards where a job takes several."""
    together = duration(max(1, sum(job.seconds for job in planned)))
    told = f"{_number(sum(len(job.cells) for job in planned), 'cell')} in {_number(len(planned), 'job')}"
    by_cards = Counter(job.cards for job in planned)
    if max(by_cards) == 1:
        return f"{told}, about {together} together"
    each = ", ".join(f"{count} on {cards}" for cards, count in sorted(by_cards.items()))
    of_cards = duration(max(1, sum(job.cards * job.seconds for job in planned)))
    return f"{told} ({each} cards), about {together} together, {of_cards} of single cards"


def _number(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


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
    needed = f"profiles with GPUs: {cards}; these cells need up to {most:.0f} GB per GPU"
    return f"{said}; {needed}." if cards else f"{said}."


def _plan(asked: argparse.Namespace, chosen: selection.Asked) -> Work:
    from experiments.own import tables
    from slurm.work import Work

    ours = {
        "command", "debug", "profile", "executor", "memory_gb", "dry_run", "failed", "collect", "strict", "tables",
        "all", "idle",
    }  # fmt: skip
    told = {name: value for name, value in vars(asked).items() if name not in ours}
    places = {name: _absolute(told[name]) for name in ("data_dir", "save_models")}  # jobs may run in another folder
    model = told["model"] and catalogue.absolute(told["model"])
    sources = {one.table: tables.absolute(one.source) for one, _ in chosen}
    limits = {one.table: one.limit for one, _ in chosen}  # None for a table without tasks to cut
    own: dict[str, Any] = {"plugin": [_absolute(file) for file in asked.plugin], "sources": sources}
    own |= {"limit": next(filter(None, limits.values()), None), "limits": limits}
    return Work({**told, "model": model, "results": str(asked.results), **places, **own})


def _absolute(place: Path | None) -> str | None:
    return str(place.expanduser().resolve()) if place else None


def _show(array: Array, profile: str, whole_memory: bool) -> None:
    request = array.request
    rows = [(number, len(job.cells), job.label) for number, job in enumerate(array.jobs)]
    print(tabulate(rows, ("job", "cells", f"cells of {array.model}"), maxcolwidths=[None, None, 100]))
    device = ""
    if request.gpus:
        some = "GPU with" if request.gpus == 1 else "GPUs, each with"
        device = f"{request.gpus} {some} {request.gpu_memory_gb:g} GB in use, "
    elif request.cards > 1:
        device = f"{request.cards} processes, "
    needed = duration(3600 * request.needed_hours)
    times = f", then requeued, {needed} in total" if request.hours < request.needed_hours else ""
    where = f" with the profile {profile}" if profile else ""
    print(f"\nEach requests {device}{request.memory(whole_memory)} and {duration(60 * request.minutes)}{times}{where}.")
    if array.after:
        jobs = f"{len(array.after)} jobs have" if len(array.after) > 1 else "1 job has"
        print(f"They start once {jobs} chosen the learning rates that they need.")


def _status(asked: argparse.Namespace) -> int:
    from slurm import overview

    return overview.show(asked)


def _cancel(asked: argparse.Namespace) -> int:
    from slurm import collect, ledger

    with ledger.launching(asked.results):
        stopped = [id for one in selection.each(asked) for id in _cancel_table(one, set(asked.sources))]
        over = collect.cancel(asked.results, () if _variant(asked) else asked.sources, stopped)
    if over:
        print(f"{', '.join(over)}: also cancelled, as it would have collected their results", file=sys.stderr)
    return 0


def _cancel_table(one: argparse.Namespace, named: set[str]) -> list[str]:
    """The ids of the jobs that are stopped: of the chosen model, format and tasks, or of any where none is chosen."""
    from slurm import state

    ids = {cell.id for cell in cli.declared(one)} if _variant(one) else None
    jobs = [job for job in state.jobs(one.results, one.table) if job.alive and one.table in state.asking(job)]
    alive = [job for job in jobs if ids is None or ids & set(job.sent.cells)]
    others = {job.sent.id: state.wanting(job) - named for job in alive}
    stopped = state.cancel([job for job in alive if not others[job.sent.id]])
    told = f"{one.table}: jobs cancelled: {len(stopped)}; finished cells are kept"
    if on := len(alive) - len(stopped):
        wanted = ", ".join(sorted(set().union(*others.values())))
        told += f"; {on} continue, as they have cells for {wanted}; name all these tables to cancel them as well"
    print(told, file=sys.stderr)
    return stopped


def _variant(asked: argparse.Namespace) -> bool:
    return any((asked.model, asked.dtype, asked.limit, asked.tasks))


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
