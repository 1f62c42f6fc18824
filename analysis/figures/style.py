"""What all figures share: colours, panels, legends, scales, and writing the files."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from analysis.rows import Row, keys
from experiments.spec import Table
from experiments.store import atomic
from pruners.interface.suggest import UsageError, unknown

# Okabe and Ito's colours, told apart by colour-blind readers; markers and lines tell them apart in grey print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
LINES = ("-", "--", ":", "-.")
LINE = 0.15  # inches of a line of a label
LOG_ABOVE = 4.0  # largest over smallest perplexity
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "svg.hashsalt": "llm-pruning-tables",
    "axes.spines.top": False,
    "axes.spines.right": False,
}


class UndrawableError(ValueError):
    """The records hold too little for this figure, or what it cannot show."""


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


def named(method: str) -> str:
    """As a label beside an axis, in lines that leave room for the axis."""
    return textwrap.fill(method, 26)


def room(label: str) -> float:
    """Inches that the lines of such a label take."""
    return LINE * (label.count("\n") + 1) + 0.06


def wrapped(text: str, width: float) -> str:
    """Lines that fit so many inches at 10 points."""
    return textwrap.fill(text, int(13 * width))


def legend(figure: Figure, panels: Iterable[Axes], note: str = "") -> None:
    """One legend below all panels, `note` above its entries; its lines make the figure higher, not the panels lower."""
    entries = {name: drawn for axes in panels for drawn, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    widest = max(map(len, entries), default=1)
    columns = max(1, min(len(entries), int(13 * figure.get_figwidth() / (widest + 8))))
    figure.set_figheight(figure.get_figheight() + 0.18 * max(0, math.ceil(len(entries) / columns) - 1))
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
        raise UndrawableError(f"No record has {quantity}, so there is nothing to draw.")
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


def canvas(title: str, size: tuple[float, float] = (6.4, 4.0)) -> tuple[Figure, Axes]:
    """One panel under its wrapped title."""
    figure, (axes,) = grid(title, 1, (size[0] - 1.4, size[1] - 1.3))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    return figure, axes


def refuse_few(count: int, what: str, table: Table) -> None:
    if count < 2:
        raise UndrawableError(
            f"A figure of {table.name} needs at least two {what} and there {'is' if count == 1 else 'are'} {count}; "
            "run more of its cells."
        )


def first_of_each(rows: Sequence[Row]) -> list[Row]:
    """Of the first model, and of the runs that differ in their seed the first."""
    found: dict[tuple[str, str], Row] = {}
    for row in (row for row in rows if row.run.model == rows[0].run.model):
        found.setdefault((row.method, row.setting), row)
    return list(found.values())


def title_of_first(table: Table, done: Sequence[Row]) -> str:
    return f"{table.title}: {done[0].run.model_name}"
