"""Perplexity by method, as one figure; and what all figures share: colours, marks, titles, files."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from analysis.rows import Row, keys
from eval.intervals import half_width
from experiments.spec import Table
from experiments.store import atomic
from pruners.suggest import UsageError, unknown

# Okabe and Ito's colours, told apart by colour-blind readers; markers and lines tell them apart in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":", "-.")
LOG_ABOVE = 4.0  # largest over smallest perplexity
LABELLED = 4  # settings of a method whose values still have room beside their marks
BELOW = 0.2  # of a method's height: where the seeds of a mark stand
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.hashsalt": "llm-pruning-tables",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class UndrawableError(ValueError):
    """The records hold too little for this figure, or what it cannot show."""


@dataclass(frozen=True)
class Point:
    """One method at one setting: perplexities by seed, and the length of the bar to each side (0: none)."""

    model: str
    method: str
    setting: str
    values: tuple[float, ...]
    half_width: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)


def perplexity(table: Table, rows: Sequence[Row], key: str | None = None) -> Figure:
    """Methods downwards, perplexity to the right; a panel per model, its dense perplexity as a line.

    Settings have their own colour and marker; several seeds are one mark at their mean.  Raises ValueError if several
    protocol keys were measured and none is asked for, UsageError for a key that nobody measured.
    """
    key = one_key(rows, key, "perplexity")
    found = _points([row for row in rows if row.measure(key)], key)
    pruned = [point for point in found if point.method]
    methods, settings, models = (
        list(dict.fromkeys(getattr(point, name) for point in points))
        for name, points in (("method", pruned), ("setting", pruned), ("model", found))
    )
    most = max((len({p.setting for p in pruned if p.method == method}) for method in methods), default=1)
    height = 0.55 + len(methods) * max(0.36, (0.18 if most <= LABELLED else 0.1) * most + 0.08)
    figure, panels = grid(table.title, len(models), (4.6, max(1.4, height)))
    for axes, model in zip(panels, models, strict=True):
        _draw(axes, [point for point in found if point.model == model], methods, settings, most <= LABELLED)
    for axes in panels[-2:]:
        axes.set_xlabel(f"perplexity, {key} (lower is better)")
    legend(figure, panels, _bars(pruned))
    return figure


def grid(
    title: str, count: int, size: tuple[float, float], across: int = 2, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels of `size` inches, `across` beside each other, under the wrapped title."""
    columns = min(across, count)
    lines = math.ceil(count / columns)
    width = max(6.4, size[0] * columns + 1.4)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, size[1] * lines + 1.3), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False, **({"sharey": True} | options)).flatten().tolist()
        figure.suptitle(wrapped(title, width), x=0.01, horizontalalignment="left", fontsize=10)
    for axes in panels[count:]:
        axes.set_visible(False)
    return figure, panels[:count]


def wrapped(text: str, width: float) -> str:
    """Lines that fit so many inches at 10 points."""
    return textwrap.fill(text, int(13 * width))


def legend(figure: Figure, panels: Iterable[Axes], note: str = "") -> None:
    """One legend below all panels, `note` above its entries."""
    entries = {name: drawn for axes in panels for drawn, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    widest = max(map(len, entries), default=1)
    columns = max(1, min(len(entries), int(13 * figure.get_figwidth() / (widest + 8))))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower left", ncols=columns, frameon=False, fontsize=8.5,
        title=textwrap.fill(note, int(14 * figure.get_figwidth())) or None, title_fontsize=8, alignment="left",
    )  # fmt: skip


def look(index: int, line: bool = True) -> dict[str, Any]:
    """Colour, marker and line of the nth of up to 49; no two are alike."""
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[(index + turn) % len(MARKERS)],
        "markersize": 5,
        "linestyle": LINES[turn % len(LINES)] if line else "none",
    }


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` with the endings .svg and .png; returns both."""
    written = []
    for ending, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 200})):
        target = path.with_name(path.name + ending)
        with atomic.replacing(target) as temporary, matplotlib.rc_context(STYLE):
            figure.savefig(temporary, format=ending[1:], **options)
        written.append(target)
    return written


def one_key(rows: Sequence[Row], key: str | None, quantity: str) -> str:
    """The protocol key to show; ValueError where none was measured or one must be chosen, UsageError if unknown."""
    known = [k for k in keys(rows) if any(quantity in (row.measure(k) or {}) for row in rows)]
    if not known:
        raise UndrawableError(f"No {quantity} in any record, so there is nothing to draw.")
    if key is not None and key not in known:
        raise UsageError(unknown("protocol key", key, known))
    if key is None and len(known) > 1:
        raise ValueError(f"A figure shows one protocol; choose with --measure one of: {', '.join(known)}.")
    return key or known[0]


def use_log(axes: Axes, values: Sequence[float], ways: str = "y") -> None:
    """Logarithmic where the values span more than LOG_ABOVE, with plain numbers on the axis."""
    if not values or min(values) <= 0 or max(values) / min(values) <= LOG_ABOVE:
        return
    steps = (1, 2, 5) if max(values) / min(values) < 300 else (1,)
    for way in ways:
        getattr(axes, f"set_{way}scale")("log")
        axis = getattr(axes, f"{way}axis")
        axis.set_major_locator(LogLocator(subs=steps))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}" if min(values) >= 1 else "{x:g}"))


def _points(rows: Sequence[Row], key: str) -> list[Point]:
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        method = "" if row.is_dense else row.method
        groups.setdefault((row.run.model_name, method, row.setting), []).append(row)
    return [_point(name, [row.measure(key) or {} for row in group]) for name, group in groups.items()]


def _point(name: tuple[str, str, str], measured: Sequence[dict[str, Any]]) -> Point:
    values = tuple(one["perplexity"] for one in measured)
    if len(values) == 1:
        return Point(*name, values, measured[0].get("standard_error") or 0.0)
    return Point(*name, values, half_width(values))


def _bars(points: Sequence[Point]) -> str:
    kinds = {
        "several seeds: mean and its 95 % interval, each seed below it": any(len(p.values) > 1 for p in points),
        "one run: ± 1 standard error over windows": any(len(p.values) == 1 and p.half_width for p in points),
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
        if labelled:
            _label(axes, drawn, COLOURS[index % len(COLOURS)])
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
            _short(point.mean), (max(point.mean + point.half_width, *point.values), at), xytext=(5, 0),
            textcoords="offset points", verticalalignment="center", fontsize=7.5, color=colour,
        )  # fmt: skip


def _dress(axes: Axes, points: Sequence[Point], methods: list[str]) -> None:
    axes.set_yticks(range(len(methods)), [textwrap.fill(method, 26) for method in methods])
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
