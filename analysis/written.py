"""A table as Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from analysis import tables, verdicts
from analysis.notes import notes, title
from analysis.rows import Row
from experiments import files
from experiments.spec import Table

WORDS = ("Method", "Model", "Measured", "Verdict")
TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "—": "---", "-": "-{}", "<": "$<$", ">": "$>$"},
}


def write(table: Table, rows: Sequence[Row], path: Path) -> list[Path]:
    """Write `path` with the endings .md, .csv and .tex, and .verdicts.csv for a paper or several seeds to compare."""
    texts = {
        ".md": markdown(table, rows),
        ".csv": tables.numbers(rows).to_csv(index=False),
        ".tex": latex(table, rows),
    }
    found = verdicts.cells(table, rows)
    if verdicts.tells_more(found):
        texts[".verdicts.csv"] = verdicts.frame(found).to_csv(index=False)
    paths = [path.with_name(path.name + ending) for ending in texts]
    for target, text in zip(paths, texts.values(), strict=True):
        files.write(target, text)
    return paths


def markdown(table: Table, rows: Sequence[Row]) -> str:
    listed = "\n".join(f"- {note}" for note in notes(table, rows))
    own = f"**{title(table, rows)}** (`{table.name}`)\n\n{_markdown(tables.text(rows))}\n\n{listed}\n"
    found = verdicts.cells(table, rows)
    if not verdicts.tells_more(found):
        return own
    return f"{own}\n**{_heading(table, found)}**\n\n{_markdown(verdicts.text(found))}\n"


def latex(table: Table, rows: Sequence[Row]) -> str:
    """`table` environments; need \\usepackage{booktabs}."""
    caption = ". ".join([title(table, rows), " ".join(notes(table, rows))])
    own = _latex(tables.text(rows), caption, f"tab:{table.name}")
    found = verdicts.cells(table, rows)
    if not verdicts.tells_more(found):
        return own
    return own + "\n" + _latex(verdicts.text(found), _heading(table, found), f"tab:{table.name}.verdicts")


def _heading(table: Table, found: Sequence[verdicts.Cell]) -> str:
    if not table.published:
        return "Means over seeds with 95 % intervals."
    return f"Beside the paper ({table.published}): {verdicts.counts(found)}."


def _markdown(frame: pd.DataFrame) -> str:
    sides = ["left" if name in WORDS else "right" for name in frame.columns]
    return frame.to_markdown(index=False, colalign=sides, disable_numparse=True)


def _latex(frame: pd.DataFrame, caption: str, label: str) -> str:
    sides = "".join("l" if name in WORDS else "r" for name in frame.columns)
    return (
        frame.map(_escaped)
        .rename(columns=_escaped)
        .to_latex(index=False, column_format=sides, caption=_escaped(caption), label=label, position="t")
    )


def _escaped(text: str) -> str:
    return "".join(TEX.get(sign, sign) for sign in text)
