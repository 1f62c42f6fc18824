"""Perplexity by sparsity, and our numbers against the paper's."""

from __future__ import annotations

import re
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import compare
from analysis.compare import Cell
from analysis.figures.style import grid, legend, look, refuse_few, use_log
from analysis.rows import Row
from experiments.spec import Table

SHARE = re.compile(r"^[\d.]+ %( of groups)?(, )?")  # in the paper's words, which need not be the method's


def by_sparsity(table: Table, rows: Sequence[Row]) -> Figure:
    """Perplexity over the sparsity that was reached, a panel a model and a line for cells that differ in nothing else.

    Of several protocol keys the first; ValueError where no line has two sparsities.
    """
    done = [
        cell
        for cell in compare.cells(table, rows)
        if cell.metric == "perplexity" and cell.fold == "mean" and cell.ours is not None
    ]
    key = done[0].key if done else ""
    swept = [cell for cell in done if cell.key == key and _is_swept(cell)]
    asked: dict[tuple[str, str], set[float]] = {}
    for cell in swept:
        asked.setdefault((cell.model, _line(cell)), set()).add(cell.rows[0].run.method.asked)
    refuse_few(max(map(len, asked.values()), default=0), "sparsities", table)
    names = list(dict.fromkeys(map(_line, swept)))
    models = list(dict.fromkeys(cell.model for cell in swept))
    figure, panels = grid(table.title, len(models), (4.4, 3.2), sharey=False)
    for axes, model in zip(panels, models, strict=True):
        _draw_lines(axes, [cell for cell in swept if cell.model == model], names)
        axes.set_title(model, loc="left", fontsize=9)
        axes.set(xlabel="weights removed, %", ylabel=f"perplexity, {key}")
    legend(figure, panels)
    return figure


def against_paper(table: Table, rows: Sequence[Row]) -> Figure:
    """Ours over the paper's with the diagonal, a marker a method; ValueError for fewer than two pairs."""
    pairs = [(cell, cell.published.value, cell.ours) for cell in compare.cells(table, rows) if cell.published]
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


def _is_swept(cell: Cell) -> bool:
    return not cell.is_dense and getattr(cell.rows[0].run.method, "pattern", None) is None


def _line(cell: Cell) -> str:
    """The method, and what the setting says besides the sparsity, such as `tuned` or a calibration text."""
    rest = SHARE.sub("", cell.setting)
    return f"{cell.method}, {rest}" if rest else cell.method


def _draw_lines(axes: Axes, cells: Sequence[Cell], names: Sequence[str]) -> None:
    lines: dict[str, set[tuple[float, float]]] = {}
    for cell in cells:
        lines.setdefault(_line(cell), set()).add((100 * _reached(cell), cell.ours or 0.0))
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), label=name, **look(names.index(name)))
    axes.grid(color="0.92")
    use_log(axes, [y for points in lines.values() for _, y in points])


def _reached(cell: Cell) -> float:
    record = cell.rows[0].record
    return record.sparsity if record else 0.0
