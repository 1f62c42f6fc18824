"""Figures beyond perplexity by method: by sparsity, ours against the paper's, and what methods cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import COLOURS, UndrawableError, grid, legend, look, use_log
from analysis.rows import Row
from analysis.verdicts import Cell
from experiments.records import Cost
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
    """Pruning time and peak memory by method, the mean of its cells as a bar and each as a mark.

    ValueError for fewer than two cells that prune.
    """
    paid: dict[str, list[Cost]] = {}
    several = len({row.run.model for row in rows if row.record}) > 1
    for row in (row for row in rows if not row.is_dense and row.record):
        name = f"{row.method}, {Path(row.run.model).name}" if several else row.method
        paid.setdefault(name, []).append(row.record.cost)  # type: ignore[union-attr]
    refuse_few(sum(map(len, paid.values())), "pruned cells", table)
    figure, (left, right) = grid(table.title, 2, (3.2, 0.4 + 0.22 * len(paid)))
    seconds = {name: [_seconds(one) for one in costs] for name, costs in paid.items()}
    long = max(map(max, seconds.values())) > 300
    _draw_bars(left, {name: [one / (60 if long else 1) for one in many] for name, many in seconds.items()}, COLOURS[0])
    _draw_bars(right, {name: [one.peak_bytes / 2**30 for one in costs] for name, costs in paid.items()}, COLOURS[1])
    left.set(xlabel=f"statistics, pruning and retraining, {'min' if long else 's'}")
    right.set(xlabel="peak memory of the cell, GiB")
    left.invert_yaxis()
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


def _seconds(paid: Cost) -> float:
    return sum(paid.seconds.get(stage, 0.0) for stage in ("statistics", "prune", "retrain"))


def _reached(cell: Cell) -> float:
    record = cell.rows[0].record
    return record.achieved["sparsity"] if record else 0.0
