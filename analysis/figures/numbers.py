"""Bar charts of sizes, speed and other numbers of cells: one panel per quantity, one bar per cell."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from analysis.figures.style import COLOURS, UndrawableError, grid
from analysis.rows import Row, repeats
from analysis.tables.frames import Column, shown
from experiments.spec import Table

ELSEWHERE = ("perplexity", "score")  # have figures of their own


def numbers(table: Table, rows: Sequence[Row]) -> Figure:
    """Every quantity but perplexities and accuracies, a mean over seeds; UndrawableError where there is none."""
    columns = [column for column in shown(rows) if column.quantity.name not in ELSEWHERE]
    if not columns:
        raise UndrawableError(f"No record of {table.name} has a number that can be drawn.")
    several = len({row.run.model for row in rows}) > 1
    groups = {
        f"{some[0].label}, {some[0].run.model_name}" if several else some[0].label: some for some in repeats(rows)
    }
    figure, panels = grid(table.title, len(columns), (3.2, 0.5 + 0.24 * len(groups)))
    for index, (axes, column) in enumerate(zip(panels, columns, strict=True)):
        bars = {name: value for name, some in groups.items() if (value := _mean(column, some)) is not None}
        axes.barh(list(groups), [bars.get(name, math.nan) for name in groups], color=COLOURS[index % len(COLOURS)])
        axes.set_xlabel(column.title)
        axes.margins(y=0.01)
    panels[0].invert_yaxis()  # which all panels share
    return figure


def _mean(column: Column, rows: Sequence[Row]) -> float | None:
    values = [value for row in rows if (value := column.value(row)) is not None]
    return column.quantity.scale * statistics.fmean(values) if values else None
