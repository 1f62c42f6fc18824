"""Cost of pruning: time by method, and memory on GPUs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.style import COLOURS, grid, named, refuse_few, room
from analysis.rows import Row
from experiments import rates
from experiments.spec import Table


def cost(table: Table, rows: Sequence[Row]) -> Figure:
    """Pruning time by method, the mean of its cells as a bar and each as a mark; on accelerators peak memory, too.

    Statistics that a cell found in the cache count as long as they took the cell that made them.  A cell that went on
    after a kill knows only what its pruning took since: it is left out, and so are those that share statistics which
    it made.  A CPU's peak is that of a process that ran other cells before, and not shown.  ValueError for fewer than
    two cells that prune.  Choices of a learning rate cost something else.
    """
    pruned = [row for row in rows if row.record and not (row.is_dense or rates.grid(row.run))]
    makers = _makers(pruned)
    done = [row for row in pruned if not (_is_resumed(row) or _is_resumed(makers[_shared(row)]))]
    refuse_few(len(done), "pruned cells", table)
    several = len({row.run.model for row in rows if row.record}) > 1
    seconds: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    for row, record in ((row, row.record) for row in done if row.record):
        name = named(f"{row.method}, {row.run.model_name}" if several else row.method)
        own = sum(record.cost.seconds.get(stage, 0.0) for stage in ("prune", "retrain"))
        seconds.setdefault(name, []).append(own + _statistics(makers[_shared(row)]))
        if record.made_by.device.startswith("cuda"):
            memory.setdefault(name, []).append(record.cost.peak_bytes / 2**30)
    high = sum(max(0.22, room(name)) for name in seconds)
    figure, panels = grid(table.title, 1 + bool(memory), (3.2, 0.4 + high))
    unit = 60 if max(map(max, seconds.values())) > 300 else 1
    _draw_bars(panels[0], {name: [one / unit for one in many] for name, many in seconds.items()}, COLOURS[0])
    panels[0].set(xlabel=f"statistics, pruning and retraining, {'min' if unit > 1 else 's'}")
    panels[0].invert_yaxis()
    if memory:
        _draw_bars(panels[1], memory, COLOURS[1])
        panels[1].set(xlabel="peak memory of the cell, GiB")
    return figure


def _draw_bars(axes: Axes, values: dict[str, list[float]], colour: str) -> None:
    axes.barh(
        list(values),
        [statistics.fmean(many) for many in values.values()],
        color=colour,
        height=0.7,
    )
    axes.margins(y=0.01)
    marks = [(value, line) for line, many in enumerate(values.values()) if len(many) > 1 for value in many]
    if marks:
        axes.plot(*zip(*marks, strict=True), linestyle="none", marker="|", markersize=4, color="0.1", zorder=3)


def _makers(pruned: Sequence[Row]) -> dict[str, Row]:
    """By what cells share through the cache the one that it took longest to have it; of one that shares none itself."""
    makers: dict[str, Row] = {}
    for row in pruned:
        makers[_shared(row)] = max(makers.get(_shared(row), row), row, key=_statistics)
    return makers


def _statistics(row: Row) -> float:
    """Seconds in which this cell made or found them."""
    return row.record.cost.seconds.get("statistics", 0.0) if row.record else 0.0


def _is_resumed(row: Row) -> bool:
    return bool(row.record and row.record.resumed)


def _shared(row: Row) -> str:
    method = row.run.method
    key = getattr(method, "statistics_key", None)
    return repr((row.run.model, row.run.dtype, row.run.windows, key) if key else id(row))
