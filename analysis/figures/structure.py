"""Heads and channels kept in each block, and accuracy by parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis import compare
from analysis.figures.style import LINES, canvas, first_of_each, grid, legend, look, refuse_few, title_of_first
from analysis.rows import Row
from experiments.spec import Table


def kept(table: Table, rows: Sequence[Row]) -> Figure:
    """Heads and MLP channels that stay in each block, as shares of the dense block, a line of panels a setting.

    Of several models and seeds the first; ValueError for one block.
    """
    done = first_of_each([row for row in rows if _structure(row)])
    blocks = max((len(_told(row)["after"]["blocks"]) for row in done), default=0)
    refuse_few(blocks, "blocks of a structured model", table)
    settings, methods = (list(dict.fromkeys(getattr(row, name) for row in done)) for name in ("setting", "method"))
    figure, panels = grid(title_of_first(table, done), 2 * len(settings), (3.6, 2.2), sharex=True)
    for index, axes in enumerate(panels):
        setting, kind = settings[index // 2], ("heads", "channels")[index % 2]
        for row in (row for row in done if row.setting == setting):
            shares = _shares(row, kind)
            line = methods.index(row.method)
            marks = {"markevery": (line % len(shares), len(methods)), "linestyle": LINES[line % len(LINES)]}
            axes.plot(range(len(shares)), shares, label=row.method, **look(line) | marks)  # equal lines stay visible
        axes.set_title(f"{kind} kept at {setting}, %", loc="left", fontsize=9)
        axes.set_ylim(-3, 103)
        axes.grid(color="0.92")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[-2:]:
        axes.set_xlabel("block")
    legend(figure, panels)
    return figure


def by_parameters(table: Table, rows: Sequence[Row]) -> Figure:
    """Mean accuracy over the parameters that are left, a marker a method; ValueError for fewer than two cells."""
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in compare.cells(table, rows):
        size = _parameters(cell.rows[0])
        if cell.metric == "score" and cell.key.startswith("mean.") and cell.ours is not None and size:
            points.setdefault(cell.method, []).append((size / 1e9, 100 * cell.ours))
    refuse_few(sum(map(len, points.values())), "mean accuracies of models with known sizes", table)
    figure, axes = canvas(table.title)
    for index, (method, pairs) in enumerate(points.items()):
        axes.plot(*zip(*sorted(set(pairs)), strict=True), label=method, **look(index))
    axes.set(xlabel="parameters, billions", ylabel="mean accuracy, %")
    legend(figure, [axes])
    return figure


def _told(row: Row) -> dict[str, Any]:
    return row.record.achieved["structure"] if row.record else {}


def _shares(row: Row, kind: str) -> list[float]:
    """A block each, NaN for one whose dense block has none of them."""
    pairs = zip(_told(row)["before"]["blocks"], _told(row)["after"]["blocks"], strict=False)
    return [100 * after[kind] / before[kind] if before[kind] else math.nan for before, after in pairs]


def _structure(row: Row) -> bool:
    return row.record is not None and bool(row.record.achieved.get("structure"))


def _parameters(row: Row) -> float | None:
    if row.record is None:
        return None
    counted = (measured.get("parameters") for measured in row.record.measures.values())
    left = row.record.achieved["structure"]["after"]["size"]["model"] if _structure(row) else None
    return next((count for count in counted if count), left)
