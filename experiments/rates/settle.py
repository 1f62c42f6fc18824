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


def settled(run: Run, settings: Settings, choose: Callable[[Run, str], Record]) -> tuple[Run, dict[str, Any]]:
    """A run with a Tuning at the rate that was chosen, and what its record keeps of that: every rate with its loss.

    A choice without a record that stands is made by `choose(run, table)`, by one of several processes that ask.  The
    others wait, as it is a training for every rate and two processes would write the same unfinished state; jobs of a
    cluster wait in the queue (`slurm.choices`), so that no card is held meanwhile.
    """
    wanted, table = choice(run), run.tuning.table
    id = wanted.id(models.identity(run.model))
    together = ranks.here()

    def chosen() -> dict[str, Any] | None:
        record = records.find(settings.root, table, id)
        stands = record is not None and found.stands(record, wanted, settings.data_dir, settings.again)
        return record.measures[run.tuning.grid.key] if record is not None and stands else None

    with shared(settings.root / ".cache" / "started" / table / f"{id}.lock"):
        about = together.first(chosen)
        if about is None:
            about = choose(wanted, table).measures[run.tuning.grid.key]
            together.first(lambda: shutil.rmtree(unfinished(settings.root, table, id), ignore_errors=True))
    recovery = replace(run.recovery, learning_rate=about["learning_rate"])
    return replace(run, recovery=recovery), {"rate_choice": {**about, "table": table, "record": id}}
