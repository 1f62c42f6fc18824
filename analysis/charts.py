"""Figures beyond perplexity by method: by sparsity, ours against the paper's, and what methods cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures import COLOURS, LOG_ABOVE, MARKERS, STYLE
from analysis.rows import Row
from analysis.verdicts import Cell
from experiments.spec import Table

Point = tuple[float, float]


def by_sparsity(table: Table, found: Sequence[Cell]) -> Figure:
    """Perplexity over the sparsity that was reached, a line a method; ValueError for fewer than two sparsities."""
    lines: dict[str, list[Point]] = {}
    done = [cell for cell in found if cell.metric == "perplexity" and cell.fold == "mean" and cell.ours is not None]
    first = done[0] if done else None
    for cell in done:
        method = cell.rows[0].run.method
        swept = method is not None and getattr(method, "pattern", None) is None
        if first and swept and (cell.model, cell.key) == (first.model, first.key):
            lines.setdefault(cell.method, []).append((100 * _reached(cell), cell.ours or 0.0))
    lines = {name: sorted(set(points)) for name, points in lines.items()}
    refuse_few(len({x for points in lines.values() for x, _ in points}), "sparsities", table)
    assert first is not None
    figure, axes = canvas(f"{table.title}: {first.model}")
    for index, (name, points) in enumerate(lines.items()):
        axes.plot(*zip(*points, strict=True), label=name, **look(index))
    axes.set(xlabel="weights removed, %", ylabel=f"perplexity, {first.key}")
    _log_if_wide(axes, [y for points in lines.values() for _, y in points], axes.set_yscale)
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def against_paper(table: Table, found: Sequence[Cell]) -> Figure:
    """Ours over the paper's with the diagonal, a marker a method; ValueError for fewer than two pairs."""
    pairs = [(cell, cell.published.value, cell.ours) for cell in found if cell.published]
    both = [(cell, x, y) for cell, x, y in pairs if x is not None and y is not None and cell.fold == "mean"]
    first = both[0][0].metric if both else ""
    both = [(cell, x, y) for cell, x, y in both if cell.metric == first]
    refuse_few(len(both), "values beside the paper's", table)
    figure, axes = canvas(table.title, (4.8, 4.6))
    low, high = (pick(value for _, x, y in both for value in (x, y)) for pick in (min, max))
    axes.plot([low, high], [low, high], color="0.6", linewidth=1, linestyle="--", zorder=0)
    for index, name in enumerate(dict.fromkeys(cell.method for cell, _, _ in both)):
        points = [(x, y) for cell, x, y in both if cell.method == name]
        axes.plot(*zip(*points, strict=True), label=name, **look(index) | {"linestyle": "none"})
    axes.set(xlabel=f"{first}, the paper's", ylabel=f"{first}, ours")
    for scale in (axes.set_xscale, axes.set_yscale):
        _log_if_wide(axes, [low, high], scale)
    axes.legend(frameon=False, fontsize=8.5)
    return figure


def cost(table: Table, rows: Sequence[Row]) -> Figure:
    """Pruning time and peak memory by cell; ValueError for fewer than two cells that prune."""
    done = [(row.label, row.record.cost) for row in rows if row.record and row.run.method is not None]
    refuse_few(len(done), "pruned cells", table)
    names = [name for name, _ in done]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.0, 1.4 + 0.24 * len(done)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(names, [paid.seconds.get("prune", 0) + paid.seconds.get("statistics", 0) for _, paid in done],
                  color=COLOURS[0])  # fmt: skip
        right.barh(names, [paid.peak_bytes / 2**30 for _, paid in done], color=COLOURS[1])
        left.set(xlabel="statistics and pruning, s")
        right.set(xlabel="peak memory of the cell, GiB")
        left.invert_yaxis()
        left.set_title(table.title, loc="left", fontsize=10)
    return figure


def _reached(cell: Cell) -> float:
    record = cell.rows[0].record
    return record.achieved["sparsity"] if record else 0.0


def canvas(title: str, size: tuple[float, float] = (6.4, 4.0)) -> tuple[Figure, Axes]:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return figure, axes


def look(index: int) -> dict:
    return {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)], "markersize": 5}


def _log_if_wide(axes: Axes, values: Sequence[float], scale: Callable[[str], object]) -> None:
    if values and min(values) > 0 and max(values) / min(values) > LOG_ABOVE:
        scale("log")


def refuse_few(count: int, what: str, table: Table) -> None:
    if count < 2:
        raise ValueError(
            f"A figure of {table.name} needs two {what} at least and there {'is' if count == 1 else 'are'} {count}; "
            f"run more of its cells (python -m experiments show {table.name})."
        )
