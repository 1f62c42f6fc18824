"""Which value of a column is significantly the best, and so set in bold.

A column is one number (protocol key) of one model at one setting; its cells are the table's methods.  The best is
marked only where all of them were measured and the 95 % interval of its difference from every other excludes zero: over
the same windows, or over seeds, as `evidence.difference` pairs them.  The dense model does not compete.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pandas as pd

from analysis.claims.evidence import difference
from analysis.claims.judge import HIGHER
from analysis.compare import Cell
from analysis.rows import Row
from analysis.tables.frames import shown

COMPARED = ("perplexity", "score")
NOTE = (
    "Bold: better than every other method of the same model, setting and measure, by a 95 % interval of the paired "
    "difference (unpaired: accuracies of one run, seeds of which fewer than two are common); where none is bold, none "
    "is clearly the best or a method is missing. The dense model does not compete."
)
Name = tuple[str, str, str, str, str]


def best(found: Sequence[Cell]) -> set[Name]:
    """The names (model, method, setting, protocol key, metric) of the cells to be marked."""
    return {name(winner) for column in _columns(found) if (winner := _winner(column))}


def competes(found: Sequence[Cell]) -> bool:
    """Whether any column has two measured methods to compare."""
    return any(sum(cell.ours is not None for cell in column) > 1 for column in _columns(found))


def name(cell: Cell) -> Name:
    return cell.model, cell.method, cell.setting, cell.key, cell.metric


def in_rows(rows: Sequence[Row], marked: set[Name]) -> pd.DataFrame:
    """True where `tables.text(rows)` shows a marked value; seeds have none, as their mean was compared."""
    names = [(row.run.model_name, row.method, row.setting) for row in rows]
    count = Counter(names)
    return pd.DataFrame(
        {
            column.title: [count[n] == 1 and (*n, column.key, column.quantity.name) in marked for n in names]
            for column in shown(rows)
        }
    )


def in_cells(found: Sequence[Cell], marked: set[Name]) -> pd.DataFrame:
    """True where `verdicts.text(found)` shows a marked value."""
    return pd.DataFrame({"Ours": [cell.fold == "mean" and name(cell) in marked for cell in found]})


def _columns(found: Sequence[Cell]) -> list[list[Cell]]:
    columns: dict[tuple[str, ...], dict[Name, Cell]] = {}
    for cell in found:
        if cell.metric in COMPARED and cell.fold == "mean" and not cell.is_dense:
            columns.setdefault((cell.model, cell.setting, cell.key, cell.metric), {})[name(cell)] = cell
    return [list(cells.values()) for cells in columns.values()]


def _winner(column: Sequence[Cell]) -> Cell | None:
    if any(cell.ours is None for cell in column):
        return None
    first, *others = sorted(column, key=lambda cell: cell.ours or 0.0, reverse=column[0].metric in HIGHER)
    return first if others and all(_better(first, other) for other in others) else None


def _better(first: Cell, other: Cell) -> bool:
    found = difference(first, other, 1.0)
    if isinstance(found, str):  # no interval, no test
        return False
    low, high = found
    return low > 0 if first.metric in HIGHER else high < 0
