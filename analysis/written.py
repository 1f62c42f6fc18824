"""A table as Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis import best, latex, summary, tables, verdicts
from analysis.notes import notes, title
from analysis.rows import Row
from analysis.summary import Pivot
from analysis.verdicts import Cell
from experiments import files
from experiments.spec import Table

GRID = (
    "Methods by settings: ours, a mean over seeds with half its 95 % interval where there are several, and behind a "
    "stroke the paper's value where it has one."
)
WORDS = ("Method", "Model", "Setting", "Measured", "Verdict")


def write(table: Table, rows: Sequence[Row], path: Path, again: str = "") -> list[Path]:
    """Write `path` with the endings .md, .csv and .tex, and .verdicts.csv for a paper or several seeds to compare.

    `again` are the arguments of `python -m experiments run` for the same cells, for a note on those that are missing.
    """
    texts = {
        ".md": markdown(table, rows, again),
        ".csv": tables.numbers(rows).to_csv(index=False),
        ".tex": tex(table, rows, again),
    }
    found = verdicts.cells(table, rows)
    if verdicts.tells_more(found):
        texts[".verdicts.csv"] = verdicts.frame(found).to_csv(index=False)
    paths = [path.with_name(path.name + ending) for ending in texts]
    for target, text in zip(paths, texts.values(), strict=True):
        files.write(target, text)
    return paths


def markdown(table: Table, rows: Sequence[Row], again: str = "") -> str:
    """The paper's shape first, where there is a paper or several seeds; then every cell."""
    found = verdicts.cells(table, rows)
    shown = [f"{grid.title}:\n\n{marked(grid.text(), grid.bold())}" for grid in _grids(found)]
    if beside := _beside(table, found):
        shown.append(f"**{_heading(table, beside)}**\n\n{marked(*_list(found, beside))}")
    if shown:
        shown.append("**Every cell**")
    shown.append(marked(tables.text(rows), best.in_rows(rows, best.best(found))))
    listed = "\n".join(f"- {note}" for note in _notes(table, rows, found, again))
    return "\n\n".join([f"**{title(table, rows)}** (`{table.name}`)", *shown, listed]) + "\n"


def tex(table: Table, rows: Sequence[Row], again: str = "") -> str:
    """`table` environments; the packages that they need stand in the first line."""
    found, label, name = verdicts.cells(table, rows), f"tab:{table.name}", title(table, rows)
    parts = [
        latex.tables(
            grid.text(), grid.bold(), WORDS, f"{name}; {grid.title}", f"{label}.{index + 1}" if index else label
        )
        for index, grid in enumerate(_grids(found))
    ]
    if beside := _beside(table, found):
        parts.append(latex.tables(*_list(found, beside), WORDS, _heading(table, beside), f"{label}.verdicts"))
    caption, own = (f"{name}: every cell", f"{label}.cells") if parts else (name, label)
    every = latex.tables(tables.text(rows), best.in_rows(rows, best.best(found)), WORDS, caption, own)
    return "\n".join([latex.NEEDS, *parts, every, latex.notes(_notes(table, rows, found, again), label)])


def _grids(found: Sequence[Cell]) -> list[Pivot]:
    """None where every cell is one run without a paper."""
    return summary.pivots(found) if verdicts.tells_more(found) else []


def _beside(table: Table, found: Sequence[Cell]) -> list[Cell]:
    """What stands beside the paper, or what a grid does not show of several seeds."""
    if not verdicts.tells_more(found):
        return []
    return [cell for cell in found if table.published or not summary.is_headline(cell)]


def _list(found: Sequence[Cell], listed: Sequence[Cell]) -> tuple[pd.DataFrame, pd.DataFrame]:
    return verdicts.text(listed), best.in_cells(listed, best.best(found))


def _notes(table: Table, rows: Sequence[Row], found: Sequence[verdicts.Cell], again: str) -> list[str]:
    grid = [GRID] if verdicts.tells_more(found) else []
    return [*grid, *notes(table, rows, again), *([best.NOTE] if best.competes(found) else [])]


def _heading(table: Table, found: Sequence[verdicts.Cell]) -> str:
    if not table.published:
        return "Other means over seeds with 95 % intervals"
    return f"Beside the paper ({table.published}): {verdicts.counts(found)}."


def marked(frame: pd.DataFrame, bold: pd.DataFrame, words: Sequence[str] = WORDS) -> str:
    """A frame of text as Markdown, bold where `bold` has a column and is True; columns in `words` stand left."""
    sides = ["left" if name in words else "right" for name in frame.columns]
    shown = frame.map(lambda text: text.replace("|", "\\|"))
    for name in bold.columns:
        shown[name] = [f"**{text}**" if best else text for text, best in zip(shown[name], bold[name], strict=True)]
    return shown.to_markdown(index=False, colalign=sides, disable_numparse=True)
