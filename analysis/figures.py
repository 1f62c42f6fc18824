"""Perplexity by method, as one figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from analysis.rows import Row, keys
from experiments import files
from experiments.spec import Table
from pruners.suggest import unknown

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # Okabe and Ito: safe for colour-blind eyes
MARKERS = "osD^vP"
LOG_ABOVE = 4.0  # largest over smallest perplexity
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.hashsalt": "llm-pruning-tables",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def perplexity(table: Table, rows: Sequence[Row], key: str | None = None) -> Figure:
    """Methods downwards, perplexity to the right, one colour and marker per setting, the dense model as a line.

    Raises ValueError if several protocol keys were measured and none is asked for, LookupError for an unknown key.
    """
    key = _one_key(rows, key)
    measured = [row for row in rows if row.measure(key)]
    with matplotlib.rc_context(STYLE):
        pruned = [row for row in measured if row.run.method is not None]
        methods = list(dict.fromkeys(row.method for row in pruned))
        figure = Figure(figsize=(6.4, 1.5 + 0.42 * max(2, len(methods))), layout="constrained")
        axes = figure.subplots()
        _draw_dense(axes, measured, key)
        for index, setting in enumerate(dict.fromkeys(row.setting for row in pruned)):
            _draw_setting(axes, [row for row in pruned if row.setting == setting], methods, index, key)
        _dress(axes, table, measured, methods, key)
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
        raise ValueError(f"A figure shows one protocol; choose with --measure one of: {', '.join(known) or 'none'}.")
    return key or known[0]


def _draw_dense(axes: Axes, measured: Sequence[Row], key: str) -> None:
    for row in measured:
        if row.run.method is None:
            value, error = _value(row, key)
            axes.axvspan(value - error, value + error, color="0.9", linewidth=0)
            axes.axvline(value, color="0.35", linestyle="--", linewidth=1.2, label=f"dense ({value:.2f})")


def _draw_setting(axes: Axes, rows: Sequence[Row], methods: list[str], index: int, key: str) -> None:
    values, errors = zip(*(_value(row, key) for row in rows), strict=True)
    heights = [methods.index(row.method) + 0.16 * (index - 0.5) for row in rows]
    axes.errorbar(
        values, heights, xerr=errors, linestyle="none", capsize=3, markersize=6,
        color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], label=rows[0].setting,
    )  # fmt: skip


def _dress(axes: Axes, table: Table, measured: Sequence[Row], methods: list[str], key: str) -> None:
    values = [_value(row, key)[0] for row in measured]
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.set_xlabel(f"perplexity, {key} (bars: ± 1 standard error over windows; left is better)")
    axes.set_title(table.title, loc="left", fontsize=10)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    if max(values) / min(values) > LOG_ABOVE:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _value(row: Row, key: str) -> tuple[float, float]:
    found = row.measure(key) or {}
    return found["perplexity"], found.get("standard_error", 0.0)
