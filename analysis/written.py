"""A table as Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis import best, latex, tables, verdicts
from analysis.notes import notes, title
from analysis.rows import Row
from experiments import files
from experiments.spec import Table

WORDS = ("Method", "Model", "Setting", "Measured", "Verdict")


def write(table: Table, rows: Sequence[Row], path: Path) -> list[Path]:
    """Write `path` with the endings .md, .csv and .tex, and .verdicts.csv for a paper or several seeds to compare."""
    texts = {
        ".md": markdown(table, rows),
        ".csv": tables.numbers(rows).to_csv(index=False),
        ".tex": tex(table, rows),
    }
    found = verdicts.cells(table, rows)
    if verdicts.tells_more(found):
        texts[".verdicts.csv"] = verdicts.frame(found).to_csv(index=False)
    paths = [path.with_name(path.name + ending) for ending in texts]
    for target, text in zip(paths, texts.values(), strict=True):
        files.write(target, text)
    return paths


def markdown(table: Table, rows: Sequence[Row]) -> str:
    found = verdicts.cells(table, rows)
    marked = best.best(found)
    listed = "\n".join(f"- {note}" for note in _notes(table, rows, found))
    own = _markdown(tables.text(rows), best.in_rows(rows, marked))
    text = f"**{title(table, rows)}** (`{table.name}`)\n\n{own}\n\n{listed}\n"
    if not verdicts.tells_more(found):
        return text
    return f"{text}\n**{_heading(table, found)}**\n\n{_markdown(verdicts.text(found), best.in_cells(found, marked))}\n"


def tex(table: Table, rows: Sequence[Row]) -> str:
    """`table` environments; the packages that they need stand in the first line."""
    found = verdicts.cells(table, rows)
    marked, label = best.best(found), f"tab:{table.name}"
    parts = [
        latex.NEEDS,
        latex.tables(tables.text(rows), best.in_rows(rows, marked), WORDS, title(table, rows), label),
        latex.notes(_notes(table, rows, found), label),
    ]
    if verdicts.tells_more(found):
        beside, label = best.in_cells(found, marked), f"{label}.verdicts"
        parts.append(latex.tables(verdicts.text(found), beside, WORDS, _heading(table, found), label))
    return "\n".join(parts)


def _notes(table: Table, rows: Sequence[Row], found: Sequence[verdicts.Cell]) -> list[str]:
    return [*notes(table, rows), *([best.NOTE] if best.competes(found) else [])]


def _heading(table: Table, found: Sequence[verdicts.Cell]) -> str:
    if not table.published:
        return "Means over seeds with 95 % intervals."
    return f"Beside the paper ({table.published}): {verdicts.counts(found)}."


def _markdown(frame: pd.DataFrame, marked: pd.DataFrame) -> str:
    sides = ["left" if name in WORDS else "right" for name in frame.columns]
    shown = frame.copy()
    for name in marked.columns:
        shown[name] = [
            f"**{text}**" if is_best else text for text, is_best in zip(frame[name], marked[name], strict=True)
        ]
    return shown.to_markdown(index=False, colalign=sides, disable_numparse=True)
