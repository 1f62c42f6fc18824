"""Every table by name; a paper's file adds its module here."""

from __future__ import annotations

from dataclasses import replace

from experiments import embedded
from experiments.spec import Run, Table
from pruners.suggest import unknown

MODULES = (embedded,)
TABLES = {thing.name: thing for module in MODULES for thing in vars(module).values() if isinstance(thing, Table)}


def find(name: str) -> Table:
    """Raises LookupError with the nearest names."""
    try:
        return TABLES[name]
    except KeyError:
        raise LookupError(unknown("table", name, TABLES)) from None


def runs(table: Table, model: str | None = None, dtype: str | None = None) -> list[Run]:
    """The table's runs in reading order, on another model or in another number format where asked."""
    asked = table.runs(model)
    return [replace(run, dtype=dtype) for run in asked] if dtype else asked
