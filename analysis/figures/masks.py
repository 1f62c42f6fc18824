"""Mask maps: which weights of each matrix of one block are kept, method by method.

GBLM-Pruner's paper shows that its masks have structure, whole rows and columns that stay or go (Das et al. 2023,
arXiv:2311.04902).  Under each map stands the overdispersion of rows and columns, which is about 1 without structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from analysis.figures.style import STYLE, UndrawableError, one_key, wrapped
from analysis.rows import Row
from experiments.spec import Table

EDGES = (1, 99)  # percentiles of all cells of all maps, where the scale of grey ends
SIDE = 1.15  # inches of a map
GREYS = matplotlib.colormaps["gray"].resampled(8)  # more look the same and make the pictures twice as large
Name = tuple[str, str, str]  # model, method, setting


def masks(table: Table, rows: Sequence[Row], key: str | None = None) -> Figure:
    """A line a method and setting, a column a matrix, one scale of grey; of several seeds the first.

    Maps are squares whatever the shape of their matrix.  Raises ValueError where no mask was recorded or several blocks
    were and none is asked for, UsageError for a key that nobody measured.
    """
    key = one_key(rows, key, "maps")
    told = _told(rows, key)
    maps = {name: {matrix: grey(lines) for matrix, lines in found["maps"].items()} for name, found in told.items()}
    known = dict.fromkeys(matrix for found in told.values() for matrix in found["matrices"])
    matrices = [matrix for matrix in known if any(matrix in found for found in maps.values())]
    if not matrices:
        raise UndrawableError("That block is empty in every model, so it has no masks; measure another block.")
    low, high = np.percentile(np.concatenate([one.ravel() for found in maps.values() for one in found.values()]), EDGES)
    with matplotlib.rc_context(STYLE):
        width = max(6.4, 2.3 + SIDE * len(matrices))
        figure = Figure(figsize=(width, 1.2 + (SIDE + 0.25) * len(told)), layout="constrained")
        panels = figure.subplots(len(told), len(matrices), squeeze=False)
        figure.suptitle(wrapped(f"{table.title}: {_subject(told, key)}", width), x=0.01, ha="left", fontsize=10)
    for line, (name, found) in zip(panels, told.items(), strict=True):
        for axes, matrix in zip(line, matrices, strict=True):
            drawn = _draw(axes, maps[name].get(matrix), (low, max(high, low + 1)))
            axes.set_xlabel(_numbers(found, matrix), fontsize=7)
        line[0].set_ylabel(_words(name, told), fontsize=8.5, rotation=0, ha="right", va="center")
    for axes, matrix in zip(panels[0], matrices, strict=True):
        axes.set_title(matrix.rpartition(".")[2], fontsize=8.5)
    figure.colorbar(drawn, ax=panels, shrink=min(1.0, 3 / len(told)), extend="both", label="weights kept, %")
    return figure


def grey(lines: Sequence[str]) -> np.ndarray:
    """A recorded map, two digits a cell, as percentages [rows, columns]; ValueError where it is none."""
    cells = [[line[at : at + 2] for at in range(0, len(line), 2)] for line in lines]
    if len({len(line) for line in lines}) != 1 or not all(
        len(cell) == 2 and cell.isdecimal() for line in cells for cell in line
    ):
        raise ValueError(
            "A mask map must be lines of equally many two-digit percentages; this record has something else."
        )
    return np.array(cells, dtype=float)


def _told(rows: Sequence[Row], key: str) -> dict[Name, dict[str, Any]]:
    """What was measured of each pruned model, of several seeds the first."""
    told: dict[Name, dict[str, Any]] = {}
    for row in rows:
        measured = row.measure(key)
        if measured and not row.is_dense:
            told.setdefault((row.run.model_name, row.method, row.setting), measured)
    if not told:
        raise UndrawableError("Masks were recorded for the dense model only, which has none; run a pruned cell.")
    return told


def _subject(told: dict[Name, dict[str, Any]], key: str) -> str:
    models = ", ".join(dict.fromkeys(model for model, _, _ in told))
    return f"{models}, {key}. Below each map: overdispersion of its rows and columns (1: no structure)"


def _words(name: Name, told: dict[Name, dict[str, Any]]) -> str:
    model = [name[0]] if len({model for model, _, _ in told}) > 1 else []
    return "\n".join([*name[1:], *model])


def _draw(axes: Axes, shares: np.ndarray | None, limits: tuple[float, float]) -> AxesImage:
    empty = np.full((1, 1), np.nan)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(shares is not None)
    axes.set_box_aspect(1)
    return axes.imshow(
        empty if shares is None else shares, cmap=GREYS, vmin=limits[0], vmax=limits[1], aspect="auto",
        interpolation="none",
    )  # fmt: skip


def _numbers(found: dict[str, Any], matrix: str) -> str:
    if matrix not in found["maps"]:
        return ""
    values = [found["matrices"][matrix][way][found["block"]] for way in ("rows", "columns")]
    rows, columns = ("—" if value is None else f"{value:,.{1 if value < 100 else 0}f}" for value in values)
    return f"rows {rows}\ncolumns {columns}"
