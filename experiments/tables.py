"""Every table by name; a paper's file adds its module here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments import baselines, embedded, flap, gblm, headlines, llm_pruner, perp, protocols
from experiments.spec import Run, Table, ZeroShot
from pruners.suggest import unknown

MODULES = (embedded, headlines, flap, gblm, perp, llm_pruner, baselines)
TABLES = {thing.name: thing for module in MODULES for thing in vars(module).values() if isinstance(thing, Table)}


def find(name: str) -> Table:
    """Raises LookupError with the nearest names."""
    try:
        return TABLES[name]
    except KeyError:
        raise LookupError(unknown("table", name, TABLES)) from None


def runs(
    table: Table,
    model: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    tasks: Sequence[str] = (),
) -> list[Run]:
    """The table's runs in reading order, on another model or in another number format where asked.

    `limit` cuts zero-shot tasks to their first so many documents, which gives them protocol keys of their own; `tasks`,
    a convention or tasks of lm-eval, are measured besides.
    """
    asked = table.runs(model)
    if dtype:
        asked = [replace(run, dtype=dtype) for run in asked]
    if tasks:
        asked = [replace(run, measures=(*run.measures, protocols.named(tasks))) for run in asked]
    return [replace(run, measures=_limited(run.measures, limit)) for run in asked] if limit else asked


def _limited(measures: tuple[Any, ...], limit: int) -> tuple[Any, ...]:
    return tuple(replace(what, limit=limit) if isinstance(what, ZeroShot) else what for what in measures)
