"""Every table by name; a paper's file adds its module here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments import models, protocols
from experiments.papers import embedded, flap, gblm, headlines, llm_pruner, llm_pruner_chatglm, perp, wanda_sparsegpt
from experiments.spec import Run, Table, ZeroShot
from pruners.interface.suggest import UsageError, unknown

MODULES = (
    embedded,
    headlines,
    flap,
    gblm,
    perp,
    llm_pruner,
    llm_pruner_chatglm,
    wanda_sparsegpt,
)
TABLES = {thing.name: thing for module in MODULES for thing in vars(module).values() if isinstance(thing, Table)}
PAPERS = frozenset(TABLES)  # `experiments.own.tables` adds tables of one's own


def find(name: str) -> Table:
    """Raises UsageError with the nearest names."""
    if name not in TABLES:
        raise UsageError(unknown("table", name, TABLES))
    return TABLES[name]


def runs(
    table: Table,
    model: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    tasks: Sequence[str] = (),
) -> list[Run]:
    """The table's runs in reading order, on another model or in another number format where asked.

    `limit` cuts zero-shot tasks to their first so many documents, which gives them protocol keys of their own; `tasks`,
    a task set or tasks of lm-eval, are measured besides.  UsageError for a model that is not there, for a `limit`
    where there is no such task, and for tasks whose mean would have the name of another.
    """
    if model is not None:
        model = models.canonical(model)
        models.check(model)
    asked = table.runs(model)
    if limit and not tasks and not any(isinstance(what, ZeroShot) for run in asked for what in run.measures):
        raise UsageError(f"{table.name} has no zero-shot tasks, to which --limit applies; leave it out.")
    if dtype:
        asked = [replace(run, dtype=dtype) for run in asked]
    try:
        if tasks:
            asked = [replace(run, measures=(*run.measures, _named(tasks, run))) for run in asked]
        return [replace(run, measures=_limited(run.measures, limit)) for run in asked] if limit else asked
    except ValueError as error:  # two means of one name
        raise error if isinstance(error, UsageError) else UsageError(f"{table.called}: {error}") from error


def _named(tasks: Sequence[str], run: Run) -> ZeroShot:
    return protocols.named(tasks, protocols.parameters(run.model))


def _limited(measures: tuple[Any, ...], limit: int) -> tuple[Any, ...]:
    return tuple(replace(what, limit=limit) if isinstance(what, ZeroShot) else what for what in measures)
