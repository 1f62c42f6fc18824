"""Figures beyond perplexity by method: by sparsity, ours against the paper's, and what methods cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.compare import Cell
from analysis.figures.perplexity import COLOURS, UndrawableError, grid, legend, look, use_log
from analysis.rows import Row
from experiments.spec import Table


def by_sparsity(table: Table, found: Sequence[Cell]) -> Figure:
    """Perplexity over the sparsity that was reached, a panel a model and a line a method.

    Of several protocol keys the first; ValueError for fewer than two sparsities.
    """
    done = [cell for cell in found if cell.metric == "perplexity" and cell.fold == "mean" and cell.ours is not None]
    key = done[0].key if done else ""
    swept = [cell for cell in done if cell.key == key and _is_swept(cell)]
    refuse_few(len({cell.rows[0].run.method.asked for cell in swept}), "sparsities", table)
    methods = list(dict.fromkeys(cell.method for cell in swept))
    models = list(dict.fromkeys(cell.model for cell in swept))
    figure, panels = grid(table.title, len(models), (4.4, 3.2), sharey=False)
    for axes, model in zip(panels, models, strict=True):
        _draw_lines(axes, [cell for cell in swept if cell.model == model], methods)
        axes.set_title(model, loc="left", fontsize=9)
        axes.set(xlabel="weights removed, %", ylabel=f"perplexity, {key}")
    legend(figure, panels)
    return figure


def against_paper(table: Table, found: Sequence[Cell]) -> Figure:
    """Ours over the paper's with the diagonal, a marker a method; ValueError for fewer than two pairs."""
    pairs = [(cell, cell.published.value, cell.ours) for cell in found if cell.published]
    both = [(cell, x, y) for cell, x, y in pairs if x is not None and y is not None and cell.fold == "mean"]
    first = both[0][0].metric if both else ""
    both = [(cell, x, y) for cell, x, y in both if cell.metric == first]
    refuse_few(len(both), "values beside the paper's", table)
    figure, (axes,) = grid(table.title, 1, (5.0, 4.2))
    low, high = (pick(value for _, x, y in both for value in (x, y)) for pick in (min, max))
    axes.plot([low, high], [low, high], color="0.6", linewidth=1, linestyle="--", zorder=0, label="equal")
    for index, name in enumerate(dict.fromkeys(cell.method for cell, _, _ in both)):
        points = [(x, y) for cell, x, y in both if cell.method == name]
        axes.plot(*zip(*points, strict=True), label=name, **look(index, line=False))
    axes.set(xlabel=f"{first}, the paper's", ylabel=f"{first}, ours")
    axes.grid(color="0.92")
    use_log(axes, [low, high], "xy")
    legend(figure, [axes])
    return figure


def cost(table: Table, rows: Sequence[Row]) -> Figure:
    """Pruning time by method, the mean of its cells as a bar and each as a mark; on accelerators peak memory, too.

    Statistics that a cell found in the cache count as long as they took the cell that made them.  A CPU's peak is that
    of a process that ran other cells before, and not shown.  ValueError for fewer than two cells that prune.
    """
    done = [row for row in rows if not row.is_dense and row.record]
    refuse_few(len(done), "pruned cells", table)
    several = len({row.run.model for row in rows if row.record}) > 1
    made = _statistics(done)
    seconds: dict[str, list[float]] = {}
    memory: dict[str, list[float]] = {}
    for row, record in ((row, row.record) for row in done if row.record):
        name = f"{row.method}, {row.run.model_name}" if several else row.method
        own = sum(record.cost.seconds.get(stage, 0.0) for stage in ("prune", "retrain"))
        seconds.setdefault(name, []).append(own + made.get(_shared(row), 0.0))
        if record.made_by.device.startswith("cuda"):
            memory.setdefault(name, []).append(record.cost.peak_bytes / 2**30)
    figure, panels = grid(table.title, 1 + bool(memory), (3.2, 0.4 + 0.22 * len(seconds)))
    unit = 60 if max(map(max, seconds.values())) > 300 else 1
    _draw_bars(panels[0], {name: [one / unit for one in many] for name, many in seconds.items()}, COLOURS[0])
    panels[0].set(xlabel=f"statistics, pruning and retraining, {'min' if unit > 1 else 's'}")
    panels[0].invert_yaxis()
    if memory:
        _draw_bars(panels[1], memory, COLOURS[1])
        panels[1].set(xlabel="peak memory of the cell, GiB")
    return figure


def canvas(title: str, size: tuple[float, float] = (6.4, 4.0)) -> tuple[Figure, Axes]:
    """One panel under its wrapped title."""
    figure, (axes,) = grid(title, 1, (size[0] - 1.4, size[1] - 1.3))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return figure, axes


def refuse_few(count: int, what: str, table: Table) -> None:
    if count < 2:
        raise UndrawableError(
            f"A figure of {table.name} needs two {what} at least and there {'is' if count == 1 else 'are'} {count}; "
            f"run more of its cells (python -m experiments show {table.name})."
        )


def _is_swept(cell: Cell) -> bool:
    return not cell.is_dense and getattr(cell.rows[0].run.method, "pattern", None) is None


def _draw_lines(axes: Axes, cells: Sequence[Cell], methods: Sequence[str]) -> None:
    lines: dict[str, set[tuple[float, float]]] = {}
    for cell in cells:
        lines.setdefault(cell.method, set()).add((100 * _reached(cell), cell.ours or 0.0))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), label=name, **look(methods.index(name)))
    axes.grid(color="0.92")
    use_log(axes, [y for points in lines.values() for _, y in points])


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


def _statistics(done: Sequence[Row]) -> dict[str, float]:
    """Seconds that it took to make statistics, which cells share through the cache."""
    made: dict[str, float] = {}
    for row in done:
        took = row.record.cost.seconds.get("statistics", 0.0) if row.record else 0.0
        made[_shared(row)] = max(made.get(_shared(row), 0.0), took)
    return made


def _shared(row: Row) -> str:
    return repr((row.run.model, row.run.dtype, row.run.windows, row.run.method.statistics_key))


def _reached(cell: Cell) -> float:
    record = cell.rows[0].record
    return record.achieved["sparsity"] if record else 0.0
