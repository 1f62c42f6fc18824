"""Overview of all started tables: what runs, what waits and why, and what failed."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate

from experiments import cells, cli, labels, papers, selection
from slurm import ledger, state
from slurm.queue import Queued
from slurm.state import CellState, Job

STATES = ("done", "running", "queued", "failed", "cancelled", "incomplete", "missing")
SECONDS_BETWEEN = 10.0


@dataclass(frozen=True)
class Standing:
    """One table: its cells as asked for, and their models by id."""

    table: str
    cells: list[CellState]
    models: dict[str, str]

    @property
    def counts(self) -> Counter[str]:
        return Counter(cell.state for cell in self.cells)


def show(asked: argparse.Namespace) -> int:
    """Print it, once or until nothing is alive any more; the exit status is 1 where a cell failed or was cancelled, or
    what was to be collected was not."""
    if asked.json:
        found, jobs = look(asked)
        print(json.dumps([_plain(one, cell) for one in found for cell in one.cells], indent=1))
    elif asked.watch:
        found, jobs = _watch(asked)
    else:
        found, jobs = look(asked)
        print(text(found, jobs, detail=bool(asked.sources)))
        if not asked.sources and (others := len(papers.TABLES.keys() - {one.table for one in found})) and found:
            print(f"\n{others} other tables have no record, no failure and no job.")
    lost = any(one.counts["failed"] + one.counts["cancelled"] for one in found)
    return cli.EXIT_FAILED if lost or any(job.died for job in _collectors(jobs)) else 0


def look(asked: argparse.Namespace) -> tuple[list[Standing], list[Job]]:
    """The tables as they stand now, and the jobs with cells of them or that collect."""
    root, jobs = asked.results, state.jobs(asked.results)
    found = [
        Standing(table, state.cells(root, table, named, jobs), models)
        for table, (named, models) in _asked(asked, jobs).items()
    ]
    tables = {one.table for one in found}
    return found, [job for job in jobs if _about(job, tables, everything=not asked.sources)]


def text(found: Sequence[Standing], jobs: Sequence[Job], detail: bool = True) -> str:
    """For a reader: one line a table, or with `detail` one a cell; then what runs, what waits, and what failed."""
    if not found:
        return "\n\n".join(
            ["Nothing has been submitted yet; use python -m slurm submit TABLE, or --all.", *_collecting(jobs)]
        )
    parts = [_of_cells(one) for one in found] if detail else [_of_tables(found)]
    parts += [part for part in (_running(found, detail), _waiting(found, detail), *_collecting(jobs)) if part]
    parts += [part for one in found for part in _failures(one, detail)]
    if detail:
        parts += [_queue(jobs)] if _queue(jobs) else []
        parts += ["\n".join(f"{one.table}: {_counted(one.counts)}" for one in found)]
    else:
        parts += [_counted(sum((one.counts for one in found), Counter()))]
    return "\n\n".join(parts)


def _asked(asked: argparse.Namespace, jobs: Sequence[Job]) -> dict[str, tuple[dict[str, str], dict[str, str]]]:
    """By table the labels and models of the cells by id: those that are chosen, or what was sent, or what is declared.

    Without a name all tables that have a record, a failure or a job.
    """
    if asked.sources and any((asked.only, asked.method, asked.model, asked.dtype, asked.limit, asked.tasks)):
        return {one.table: _named(chosen) for one, chosen in selection.chosen(asked)}
    begun = {table for job in jobs for table in state.asking(job)}
    if not asked.sources:
        kept = {path.name for path in (Path(asked.results) / "runs").glob("*") if path.is_dir()}
        chosen = {name: name for name in papers.TABLES if name in kept | begun}
        asked = argparse.Namespace(**{**vars(asked), "sources": chosen | {name: name for name in sorted(begun)}})
    found: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
    for table in asked.sources:
        named: dict[str, str] = {}
        models: dict[str, str] = {}
        for entry in ledger.load(asked.results, table) if table in begun else ():
            named |= entry.of(table)
            models |= dict.fromkeys(entry.of(table), entry.model)
        if table in papers.TABLES and not named:
            declared = papers.TABLES[table]
            named, models = _named(cells.cells(declared.runs(), declared))
        found[table] = (named, models)
    return found


def _named(chosen: Sequence[cells.Cell]) -> tuple[dict[str, str], dict[str, str]]:
    return {cell.id: cell.label for cell in chosen}, {cell.id: cell.run.model_name for cell in chosen}


def _about(job: Job, tables: set[str], everything: bool) -> bool:
    if not job.entry.collects:
        return bool(tables & state.asking(job))
    return everything or not job.entry.collected or bool(tables & set(job.entry.collected))


def _of_tables(found: Sequence[Standing]) -> str:
    shown = [state for state in STATES if any(one.counts[state] for one in found)]
    rows = [(one.table, len(one.cells), *(one.counts[state] or "" for state in shown)) for one in found]
    return tabulate(rows, ("table", "cells", *shown), disable_numparse=True)


def _of_cells(one: Standing) -> str:
    """With their models where there are several."""
    several = len(set(one.models.values())) > 1
    rows = [
        (
            labels.beside_model(cell.label, one.models[cell.id]),
            cell.id,
            *([one.models[cell.id]] if several else []),
            cell.state,
            _job(cell),
            cell.note,
        )
        for cell in one.cells
    ]
    heads = ("cell", "id", *(["model"] if several else []), "state", "job", "note")
    return tabulate(rows, heads, disable_numparse=True)


def _job(cell: CellState) -> str:
    return f"{cell.job} ({cell.cards} cards)" if cell.job and cell.cards > 1 else cell.job


def _running(found: Sequence[Standing], detail: bool) -> str:
    rows = [
        (*_where(one, detail), cell.label, _job(cell), cell.stage or "starting",
         "" if cell.share is None else f"{cell.share:.0%}", cell.end.replace("T", " ").replace("+00:00", " UTC"))
        for one in found for cell in one.cells if cell.state == "running"
    ]  # fmt: skip
    heads = (*([] if detail else ["table"]), "running", "job", "stage", "done", "expected end")
    return tabulate(rows, heads, disable_numparse=True) if rows else ""


def _waiting(found: Sequence[Standing], detail: bool) -> str:
    reasons = Counter(
        (*_where(one, detail), cell.note or "starting") for one in found for cell in one.cells if cell.state == "queued"
    )
    rows = [(*key[:-1], count, key[-1]) for key, count in reasons.items()]
    heads = (*([] if detail else ["table"]), "waiting", "why")
    return tabulate(rows, heads, disable_numparse=True) if rows else ""


def _where(one: Standing, detail: bool) -> tuple[str, ...]:
    return () if detail else (one.table,)


def _failures(one: Standing, detail: bool) -> list[str]:
    """In one sentence each, in detail with the last lines; equal sentences once."""
    failed = [cell for cell in one.cells if cell.state == "failed"]
    if detail:
        return ["\n".join([f"{cell.label} ({cell.id}):", *(f"    {line}" for line in cell.lines)]) for cell in failed]
    said: dict[str, list[str]] = {}
    for cell in failed:
        said.setdefault(cell.note, []).append(cell.label)
    return (
        ["\n".join(f"{one.table}: failed: {', '.join(which)}: {note}" for note, which in said.items())] if said else []
    )


def _collecting(jobs: Sequence[Job]) -> list[str]:
    """Of every job that writes everything down, how it stands; its tables where there are several such jobs."""
    found = _collectors(jobs)
    return [_collected(job, named=len(found) > 1) for job in found]


def _collectors(jobs: Sequence[Job]) -> list[Job]:
    """The jobs that write everything down, but for those in whose place a later one was sent."""
    every = sorted((job for job in jobs if job.entry.collects), key=_age)
    return [job for number, job in enumerate(every) if not any(_replaces(job, later) for later in every[number + 1 :])]


def _age(job: Job) -> tuple[str, int, str]:
    """Submissions of one second stand in the order of their numbers."""
    return job.entry.at, len(job.sent.id), job.sent.id


def _replaces(job: Job, later: Job) -> bool:
    """Whether the later one writes down all that this one was to; one of an earlier day does not say what that is."""
    same = later.entry.same == job.entry.same and set(later.entry.collected) >= set(job.entry.collected)
    return not job.alive and (same or not job.entry.collected)


def _collected(job: Job, named: bool) -> str:
    what = f"Tables, figures, claims and report{_what(job) if named else ''}"
    if job.alive:
        return f"{what}: {f'waits ({_awaited(job)})' if job.waits else 'being written'}."
    return f"{what}: {job.death or 'written'}".rstrip(".") + "."


def _what(job: Job) -> str:
    """E.g. ` of flap.perplexity and 2 more on llama-7b`; nothing for one of an earlier day, which does not say."""
    first, *others = job.entry.collected or [""]
    options = dict(pairwise(job.entry.same))
    on = f" on {options['--model']}" if "--model" in options else ""
    return f" of {first}{f' and {len(others)} more' if others else ''}{on}" if first else ""


def _awaited(job: Job) -> str:
    return "for the jobs that make its cells" if job.reason == "Dependency" else job.reason


def _queue(jobs: Sequence[Job]) -> str:
    alive: list[tuple[str, Queued]] = [(job.sent.id, job.queued) for job in jobs if job.alive and job.queued]
    running = [(id, queued.state, queued.node, queued.left) for id, queued in alive if queued.state != "PENDING"]
    return tabulate(running, ("job", "state", "node", "time left"), disable_numparse=True) if running else ""


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]) or "no cells"


def _plain(one: Standing, cell: CellState) -> dict[str, Any]:
    return {"table": one.table, "model": one.models.get(cell.id, ""), **asdict(cell)}


def _watch(asked: argparse.Namespace) -> tuple[list[Standing], list[Job]]:
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(highlight=False)
    try:
        with Live(console=console, auto_refresh=False, vertical_overflow="visible") as live:
            while True:
                found, jobs = look(asked)
                live.update(Text(text(found, jobs, detail=bool(asked.sources))), refresh=True)
                if not any(job.alive for job in jobs):
                    return found, jobs
                time.sleep(SECONDS_BETWEEN)
    finally:
        if not console.is_terminal:  # where rich ends no line
            console.line()
