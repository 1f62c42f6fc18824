"""A dense row for tables whose rows are variants of one method."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from experiments.spec import Run, Table

DENSE = "dense"


def with_dense(table: Table) -> Table:
    """The table with its models unpruned in front, measured as their other cells are."""
    label = table.label

    def run(row: Any, model: str, *column: Any) -> Run | None:
        if row != DENSE:
            return table.run(row, model, *column)
        made = next((found for other in table.rows if (found := table.run(other, model, *column))), None)
        return made and replace(made, method=None, windows=None, recovery=None, tuning=None)

    def words(asked: Run) -> tuple[str, str]:
        assert label is not None
        return ("Dense", "") if asked.method is None else label(asked)

    return replace(table, rows=(DENSE, *table.rows), run=run, label=label and words)
