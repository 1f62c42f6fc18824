"""Looks up a run's chosen learning rate, or makes the choice now."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from experiments import models
from experiments.rates import choice
from experiments.resume import unfinished
from experiments.settings import Settings
from experiments.spec import Run
from experiments.store import found, records
from experiments.store.locks import shared
from experiments.store.records import Record
from pruners.run import ranks


def settled(
    run: Run, settings: Settings, choose: Callable[[Run, str], Record]
) -> tuple[Run, dict[str, Any], dict[str, dict[str, Any]]]:
    """A run with a Tuning at the rate that was chosen, what its record keeps of that (every rate with its loss), and
    where the text came from on which losses were taken.

    A choice without a record that stands is made by `choose(run, table)`, by one of several processes that ask.  The
    others wait, as it is a training for every rate and two processes would write the same unfinished state; jobs of a
    cluster wait in the queue (`slurm.choices`), so that no card is held meanwhile.
    """
    wanted, table = choice(run), run.tuning.table
    id = wanted.id(models.identity(run.model))
    together = ranks.here()

    def chosen() -> list[dict[str, Any]] | None:
        record = records.find(settings.root, table, id)
        if record is None or not found.stands(record, wanted, settings.root, settings.data_dir, settings.again):
            return None
        return told(record)

    def told(record: Record) -> list[dict[str, Any]]:
        grid = run.tuning.grid
        return [record.measures[grid.key], {grid.corpus: record.data[grid.corpus]}]

    with shared(settings.root / ".cache" / "started" / table / f"{id}.lock"):
        known = together.first(chosen)
        if known is None:
            known = told(choose(wanted, table))
            together.first(lambda: shutil.rmtree(unfinished(settings.root, table, id), ignore_errors=True))
    about, text = known
    recovery = replace(run.recovery, learning_rate=about["learning_rate"])
    return replace(run, recovery=recovery), {"rate_choice": {**about, "table": table, "record": id}}, text
