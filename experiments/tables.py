"""The chosen cells of one table or several, run by one command, and what it says of them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from experiments import batch, cells, cli, placement, resume, selection
from experiments.batch import Outcome
from experiments.callbacks import Watcher
from experiments.cells import Cell
from experiments.models import kept
from experiments.settings import Settings
from experiments.store import code, records
from pruners.run import ranks


@dataclass(frozen=True)
class _Table:
    """One table's command, those of its chosen cells that the device takes, how many it does not, and what came of
    those that were run so far."""

    asked: argparse.Namespace
    settings: Settings
    fitting: list[Cell]
    large: int
    watchers: list[Watcher]
    outcome: Outcome = field(default_factory=Outcome)


def run(chosen: selection.Asked) -> int:
    """Cells of several tables that measure the same model follow each other, so that it is made once; the exit
    status."""
    tables = [_fitting(asked, some) for asked, some in chosen]
    turns = list(cells.in_turns([(table, table.fitting) for table in tables]))
    last = {id(table): number for number, (table, _) in enumerate(turns)}
    status = 0
    with kept.lasting():
        for number, (table, some) in enumerate(turns):
            if some and len(tables) > 1:
                cli.say(f"{table.asked.table}: {len(some)} of {len(table.fitting)} cells")
            table.outcome.add(batch.run_table(table.asked.table, some, table.settings, table.watchers))
            if number == last[id(table)]:
                status = max(status, _finish(table))
    return status


def _fitting(asked: argparse.Namespace, chosen: Sequence[Cell]) -> _Table:
    settings = cli.settings(asked, chosen if asked.save_models else ())
    together = ranks.here(settings.device or "cpu")
    large, todo = together.first(lambda: _too_large(asked, chosen, settings, together.count))
    cli.say_lines(selection.left_out(asked.table, {cell.label: large[cell.id] for cell in chosen if cell.id in large}))
    fitting = [cell for cell in chosen if cell.id not in large]
    code.load(cell.run for cell in fitting if cell.id in todo)  # of every table, before the first of them is run
    return _Table(asked, settings, fitting, len(large), cli.watchers(asked, asked.table))


def _too_large(
    asked: argparse.Namespace, chosen: Sequence[Cell], settings: Settings, cards: int
) -> tuple[dict[str, str], list[str]]:
    """Why the device cannot take them, by the ids of such cells among those that have yet to be run, and all these."""
    finished = batch.finished(chosen, records.load(settings.root, asked.table), settings)
    todo = [cell for cell in chosen if cell.id not in finished]
    reasons = ((cell.id, placement.too_large(cell.run, settings, asked.card, cards)) for cell in todo)
    return {id: why for id, why in reasons if why}, [cell.id for cell in todo]


def _finish(table: _Table) -> int:
    """Say what came of all its cells; the exit status."""
    asked, outcome = table.asked, table.outcome
    together = ranks.here(table.settings.device or "cpu")
    together.first(lambda: resume.tidy(asked.results, asked.table, cli.declared(asked)))
    counts = f"{len(outcome.done)} done now, {len(outcome.found)} before, {len(outcome.failed)} failed"
    counts += f", {len(outcome.incomplete)} incomplete" if outcome.incomplete else ""
    counts += f", {table.large} left out" if table.large else ""
    print(f"{asked.table}: {counts}; python -m analysis table {cli.same_cells(asked)}", file=sys.stderr)
    unmet = outcome.failed or (outcome.incomplete and not asked.allow_missing_tasks)
    return cli.EXIT_FAILED if unmet or (table.large and asked.strict) else 0
