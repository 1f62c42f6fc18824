"""Perplexity or accuracy by method."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis.figures.style import COLOURS, grid, legend, look, named, one_key, room, use_log
from analysis.rows import Row, repeats
from eval.intervals import half_width
from experiments.spec import Table

LABELLED = 4  # settings of a method whose values still have room beside their marks
BELOW = 0.2  # of a method's height: where the seeds of a mark stand


@dataclass(frozen=True)
class Quantity:
    """What is drawn, under its name in a record; `better` is said at the axis, and errors are over `units`."""

    name: str
    title: str
    scale: float
    better: str
    units: str


PERPLEXITY = Quantity("perplexity", "perplexity", 1, "lower", "windows")
ACCURACY = Quantity("score", "accuracy, %", 100, "higher", "documents")


@dataclass(frozen=True)
class Point:
    """One method at one setting: values by seed, and the length of the bar to each side (0: none).

    `seeds` are those that the table declares, of which some may be missing.
    """

    model: str
    method: str
    setting: str
    seeds: int
    values: tuple[float, ...]
    half_width: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def lacks(self) -> str:
        """E.g. ` (1 of 3 seeds)`; empty where none is missing."""
        return f" ({len(self.values)} of {self.seeds} seeds)" if len(self.values) < self.seeds else ""


def perplexity(table: Table, rows: Sequence[Row], key: str | None = None) -> Figure:
    """Methods downwards, perplexity to the right; a panel per model, its dense perplexity as a line.

    Settings have their own colour and marker; several seeds are one mark at their mean, which says where some are
    missing.  Raises ValueError if several
    protocol keys were measured and none is asked for, UsageError for a key that nobody measured.
    """
    return _by_method(table, rows, one_key(rows, key, "perplexity"), PERPLEXITY)


def accuracy(table: Table, rows: Sequence[Row], key: str | None = None) -> Figure:
    """As `perplexity`, of a mean over tasks or of one task."""
    return _by_method(table, rows, one_key(rows, key, "score"), ACCURACY)


def _by_method(table: Table, rows: Sequence[Row], key: str, what: Quantity) -> Figure:
    found = _points(rows, key, what)
    pruned = [point for point in found if point.method]
    methods, settings, models = (
        list(dict.fromkeys(getattr(point, name) for point in points))
        for name, points in (("method", pruned), ("setting", pruned), ("model", found))
    )
    most = max((len({p.setting for p in pruned if p.method == method}) for method in methods), default=1)
    named_high = max((room(named(method)) for method in methods), default=0.0)
    height = 0.55 + len(methods) * max(0.36, named_high, (0.18 if most <= LABELLED else 0.1) * most + 0.08)
    figure, panels = grid(table.title, len(models), (4.6, max(1.4, height)))
    for axes, model in zip(panels, models, strict=True):
        _draw(axes, [point for point in found if point.model == model], methods, settings, most <= LABELLED)
    for axes in panels[-2:]:
        axes.set_xlabel(f"{what.title}, {key} ({what.better} is better)")
    legend(figure, panels, _bars(pruned, what))
    return figure


def _points(rows: Sequence[Row], key: str, what: Quantity) -> list[Point]:
    found = []
    for group in repeats(rows):
        measured = [one for row in group if what.name in (one := row.measure(key) or {})]
        if measured:
            row = group[0]
            name = (row.run.model_name, "" if row.is_dense else row.method, row.setting)
            found.append(_point(name, len(group), measured, what))
    return found


def _point(name: tuple[str, str, str], seeds: int, measured: Sequence[dict[str, Any]], what: Quantity) -> Point:
    values = tuple(what.scale * one[what.name] for one in measured)
    if len(values) == 1:
        return Point(*name, seeds, values, what.scale * (measured[0].get("standard_error") or 0.0))
    return Point(*name, seeds, values, half_width(values))


def _bars(points: Sequence[Point], what: Quantity) -> str:
    kinds = {
        "several seeds: mean, its 95 % interval, and each seed": any(len(p.values) > 1 for p in points),
        f"one run: ± 1 standard error over {what.units}": any(len(p.values) == 1 and p.half_width for p in points),
    }
    return "; ".join(kind for kind, there in kinds.items() if there)


def _draw(axes: Axes, points: Sequence[Point], methods: list[str], settings: list[str], labelled: bool) -> None:
    dense = next((point for point in points if not point.method), None)
    pruned = [point for point in points if point.method]
    if dense is not None:
        _draw_dense(axes, dense)
    heights = _heights(pruned, methods)
    for index, setting in enumerate(settings):
        drawn = {point: heights[point] for point in pruned if point.setting == setting}
        if drawn:
            _draw_setting(axes, drawn, look(index, line=False) | {"label": setting})
        told = drawn if labelled else {point: at for point, at in drawn.items() if point.lacks}
        _label(axes, told, COLOURS[index % len(COLOURS)])
    _dress(axes, points, methods)
    axes.set_title(f"{points[0].model}{f', dense {_short(dense.mean)}' if dense else ''}", loc="left", fontsize=9)


def _heights(points: Sequence[Point], methods: list[str]) -> dict[Point, float]:
    """The settings of a method lie around its line, evenly."""
    by_method = [[point for point in points if point.method == method] for method in methods]
    step = 0.84 / max(map(len, by_method), default=1)
    return {
        point: line + step * (index - (len(group) - 1) / 2)
        for line, group in enumerate(by_method)
        for index, point in enumerate(group)
    }


def _draw_dense(axes: Axes, dense: Point) -> None:
    axes.axvspan(dense.mean - dense.half_width, dense.mean + dense.half_width, color="0.9", linewidth=0)
    axes.axvline(dense.mean, color="0.35", linestyle="--", linewidth=1.2, label="dense")


def _draw_setting(axes: Axes, drawn: dict[Point, float], style: dict[str, Any]) -> None:
    axes.errorbar(
        [point.mean for point in drawn], list(drawn.values()), xerr=[point.half_width for point in drawn],
        elinewidth=1.2, capsize=2.5, **style,
    )  # fmt: skip
    seeds = [(value, at + BELOW) for point, at in drawn.items() if len(point.values) > 1 for value in point.values]
    if seeds:
        axes.plot(*zip(*seeds, strict=True), linestyle="none", marker="|", markersize=4, color=style["color"])


def _label(axes: Axes, drawn: dict[Point, float], colour: str) -> None:
    for point, at in drawn.items():
        axes.annotate(
            _short(point.mean) + point.lacks, (max(point.mean + point.half_width, *point.values), at), xytext=(5, 0),
            textcoords="offset points", verticalalignment="center", fontsize=7.5, color=colour,
        )  # fmt: skip


def _dress(axes: Axes, points: Sequence[Point], methods: list[str]) -> None:
    axes.set_yticks(range(len(methods)), list(map(named, methods)))
    axes.set_ylim(max(1, len(methods)) - 0.5, -0.5)  # the dense model alone has no line
    for line in range(1, len(methods), 2):
        axes.axhspan(line - 0.5, line + 0.5, color="0.965", linewidth=0, zorder=0)
    axes.grid(axis="x", color="0.9")
    axes.set_axisbelow(True)
    axes.margins(x=0.12)
    values = [value for point in points for value in point.values]
    use_log(axes, values, "x")
    if axes.get_xscale() == "log":  # an interval that reaches zero would stretch the axis without end
        axes.set_xlim(left=min(values) / 1.3)


def _short(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"
