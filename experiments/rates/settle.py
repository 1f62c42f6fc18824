"""What a run's learning rate was chosen to be, or the choice made now."""

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
from experiments.store.locks import held
from experiments.store.records import Record


def settled(run: Run, settings: Settings, choose: Callable[[Run, str], Record] | None) -> tuple[Run, dict[str, Any]]:
    """A run with a Tuning at the rate that was chosen, and what its record keeps of that: every rate with its loss.

    A choice without a record that stands is made by `choose(run, table)`, by one of several processes that ask; without
    `choose`, ValueError.
    """
    wanted, table = choice(run), run.tuning.table
    id = wanted.id(models.identity(run.model))
    with held(settings.root / ".cache" / "started" / table / f"{id}.lock"):
        record = records.find(settings.root, table, id)
        if record is None or not found.stands(record, wanted, settings.data_dir, settings.again):
            if choose is None:
                raise ValueError(
                    f"The learning rate was not chosen yet, which one process does alone: run python -m experiments "
                    f"run {table} --only {id} first, without torchrun."
                )
            record = choose(wanted, table)
            shutil.rmtree(unfinished(settings.root, table, id), ignore_errors=True)
    about = record.measures[run.tuning.grid.key]
    recovery = replace(run.recovery, learning_rate=about["learning_rate"])
    return replace(run, recovery=recovery), {"rate_choice": {**about, "table": table, "record": id}}
