"""Perplexity by method, as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from analysis.rows import Row, keys
from experiments import files
from experiments.spec import Table
from pruners.suggest import unknown

# Okabe and Ito's colours, told apart by colour-blind readers; markers tell settings apart in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = "osD^vP"
LOG_ABOVE = 4.0  # largest over smallest perplexity
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.hashsalt": "llm-pruning-tables",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def perplexity(table: Table, rows: Sequence[Row], key: str | None = None) -> Figure:
    """Methods downwards, perplexity to the right; a panel per model, its dense perplexity as a line.

    Settings have their own colour and marker.  Raises ValueError if several protocol keys were measured and none is
    asked for, LookupError for a key that nobody measured.
    """
    key = _one_key(rows, key)
    measured = [row for row in rows if row.measure(key)]
    methods = list(dict.fromkeys(row.method for row in measured if row.run.method is not None))
    settings = list(dict.fromkeys(row.setting for row in measured if row.run.method is not None))
    models = list(dict.fromkeys(row.run.model for row in measured))
    with matplotlib.rc_context(STYLE):
        size = (1.6 + 4.8 * len(models), 1.7 + 0.42 * max(2, len(methods)))
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
        for axes, model in zip(panels, models, strict=True):
            _draw(axes, [row for row in measured if row.run.model == model], methods, settings, key)
            axes.set_title(f"{table.title}: {Path(model).name}", loc="left", fontsize=10, pad=24)
        figure.supxlabel(f"perplexity, {key}\nbars: ± 1 standard error over windows; lower is better", fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path` with the endings .svg and .png; returns both."""
    written = []
    for ending, options in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 200})):
        target = path.with_name(path.name + ending)
        with files.replacing(target) as temporary, matplotlib.rc_context(STYLE):
            figure.savefig(temporary, format=ending[1:], **options)
        written.append(target)
    return written


def _one_key(rows: Sequence[Row], key: str | None) -> str:
    known = [k for k in keys(rows) if any("perplexity" in (row.measure(k) or {}) for row in rows)]
    if key is not None and key not in known:
        raise LookupError(unknown("protocol key", key, known))
    if key is None and len(known) != 1:
        raise ValueError(
            f"A figure shows one protocol; choose with --measure one of: {', '.join(known)}."
            if known
            else "No perplexity was measured, so there is nothing to draw."
        )
    return key or known[0]


def _draw(axes: Axes, rows: Sequence[Row], methods: list[str], settings: list[str], key: str) -> None:
    for row in rows:
        if row.run.method is None:
            _draw_dense(axes, *_value(row, key))
    for index, setting in enumerate(settings):
        shift = 0.24 * (index - (len(settings) - 1) / 2)
        drawn = [row for row in rows if row.setting == setting and row.run.method is not None]
        heights = [methods.index(row.method) + shift for row in drawn]
        _draw_setting(axes, [_value(row, key) for row in drawn], heights, index, setting)
    _dress(axes, [_value(row, key)[0] for row in rows], methods)


def _draw_dense(axes: Axes, value: float, error: float) -> None:
    axes.axvspan(value - error, value + error, color="0.9", linewidth=0)
    axes.axvline(value, color="0.35", linestyle="--", linewidth=1.2, label=f"dense ({_short(value)})")


def _draw_setting(
    axes: Axes, values: list[tuple[float, float]], heights: list[float], index: int, setting: str
) -> None:
    colour = COLOURS[index % len(COLOURS)]
    axes.errorbar(
        [value for value, _ in values], heights, xerr=[error for _, error in values], label=setting, color=colour,
        linestyle="none", marker=MARKERS[index % len(MARKERS)], markersize=5, elinewidth=1.2, capsize=2.5,
    )  # fmt: skip
    for (value, error), height in zip(values, heights, strict=True):
        axes.annotate(
            _short(value), (value + error, height), xytext=(5, 0), textcoords="offset points",
            verticalalignment="center", fontsize=7.5, color=colour,
        )  # fmt: skip


def _dress(axes: Axes, values: list[float], methods: list[str]) -> None:
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    if max(values) / min(values) > LOG_ABOVE:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.margins(x=0.12)
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=4, borderaxespad=0.2, fontsize=8.5)


def _short(value: float) -> str:
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def _value(row: Row, key: str) -> tuple[float, float]:
    found = row.measure(key) or {}
    return found["perplexity"], found.get("standard_error") or 0.0
