"""A table as Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis import compare, significance
from analysis.compare import Cell
from analysis.rows import Row
from analysis.tables import frames, grid, latex
from analysis.tables.grid import Pivot
from analysis.tables.notes import notes, title
from experiments.spec import Table
from experiments.store import atomic

GRID = (
    "Methods by settings: our value (with several seeds, the mean ± half its 95 % interval), then after a "
    "slash the paper's value if it has one."
)
WORDS = ("Method", "Model", "Setting", "Measured", "Verdict")
ENDS = re.compile(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]")  # of lines, as `str.splitlines` knows them
LONG = 30  # lines that a reader can still compare


def write(table: Table, rows: Sequence[Row], path: Path, again: str = "") -> list[Path]:
    """Write `path` with the endings .md, .csv and .tex, and .verdicts.csv for a paper or several seeds to compare.

    `again` are the arguments of `python -m experiments run` for the same cells, for a note on those that are missing.
    """
    texts = {
        ".md": markdown(table, rows, again),
        ".csv": frames.numbers(rows).to_csv(index=False),
        ".tex": tex(table, rows, again),
    }
    found = compare.cells(table, rows)
    if compare.tells_more(found):
        texts[".verdicts.csv"] = compare.frame(found).to_csv(index=False)
    paths = [path.with_name(path.name + ending) for ending in texts]
    for target, text in zip(paths, texts.values(), strict=True):
        atomic.write(target, text)
    return paths


def markdown(table: Table, rows: Sequence[Row], again: str = "") -> str:
    """The paper's shape first, where there is a paper or several seeds; then every cell."""
    found = compare.cells(table, rows)
    shown = [f"{grid.title}:\n\n{marked(grid.text(), grid.bold())}" for grid in _grids(found)]
    if beside := _beside(table, found):
        shown.append(f"**{_heading(table, beside)}**\n\n{marked(*_list(found, beside))}")
    if shown:
        shown.append("**Every cell**")
    shown.append(marked(frames.text(rows), significance.in_rows(rows, significance.best(found))))
    listed = "\n".join(f"- {note}" for note in _notes(table, rows, found, again))
    return "\n\n".join([f"**{title(table, rows)}** (`{table.name}`)", *shown, listed]) + "\n"


def tex(table: Table, rows: Sequence[Row], again: str = "") -> str:
    """`table` environments; the packages that they need stand in the first line."""
    found, label, name = compare.cells(table, rows), f"tab:{table.name}", title(table, rows)
    parts = [
        latex.tables(
            grid.text(), grid.bold(), WORDS, f"{name}; {grid.title}", f"{label}.{index + 1}" if index else label
        )
        for index, grid in enumerate(_grids(found))
    ]
    if beside := _beside(table, found):
        parts.append(latex.tables(*_list(found, beside), WORDS, _heading(table, beside), f"{label}.verdicts"))
    caption, own = (f"{name}: every cell", f"{label}.cells") if parts else (name, label)
    every = latex.tables(frames.text(rows), significance.in_rows(rows, significance.best(found)), WORDS, caption, own)
    return "\n".join([latex.NEEDS, *parts, every, latex.notes(_notes(table, rows, found, again), label)])


def _grids(found: Sequence[Cell]) -> list[Pivot]:
    """None where every cell is one run without a paper, and the list of them is short."""
    return grid.pivots(found) if _is_wide(found) else []


def _is_wide(found: Sequence[Cell]) -> bool:
    return compare.tells_more(found) or len(found) > LONG


def _beside(table: Table, found: Sequence[Cell]) -> list[Cell]:
    """What stands beside the paper, or what a grid does not show of several seeds."""
    if not compare.tells_more(found):
        return []
    if table.published:
        return list(found)
    return [cell for cell in found if len(cell.rows) > 1 and not grid.is_headline(cell)]


def _list(found: Sequence[Cell], listed: Sequence[Cell]) -> tuple[pd.DataFrame, pd.DataFrame]:
    return compare.text(listed), significance.in_cells(listed, significance.best(found))


def _notes(table: Table, rows: Sequence[Row], found: Sequence[compare.Cell], again: str) -> list[str]:
    grid = [GRID] if _grids(found) else []
    beside = [compare.NOTE] if any(cell.published and cell.half_width for cell in found) else []
    marks = [significance.NOTE] if significance.competes(found) else []
    return [*grid, *beside, *notes(table, rows, again), *marks]


def _heading(table: Table, found: Sequence[compare.Cell]) -> str:
    if not table.published:
        return "Other means over seeds with 95 % intervals"
    return f"Beside the paper ({table.published}): {compare.counts(found)}."


def marked(frame: pd.DataFrame, bold: pd.DataFrame | None = None, words: Sequence[str] = WORDS) -> str:
    """A frame of text as Markdown, bold where `bold` has a column and is True; columns in `words` stand left."""
    sides = ["left" if name in words else "right" for name in frame.columns]
    shown = frame.map(_in_a_cell)
    for name, best_of in () if bold is None else bold.items():
        shown[name] = [f"**{text}**" if best else text for text, best in zip(shown[name], best_of, strict=True)]
    shown.columns = pd.Index([_in_a_cell(name) for name in shown.columns])
    return shown.to_markdown(index=False, colalign=sides, disable_numparse=True)


def _in_a_cell(text: str) -> str:
    """Bars and ends of lines would end the cell."""
    return ENDS.sub(" ", text).replace("|", "\\|")
