"""A table as Markdown, LaTeX (booktabs) and CSV."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from analysis import tables
from analysis.notes import notes, title
from analysis.rows import Row
from experiments import files
from experiments.spec import Table

TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "—": "---", "-": "-{}", "<": "$<$", ">": "$>$"},
}


def write(table: Table, rows: Sequence[Row], path: Path) -> list[Path]:
    """Write `path` with the endings .md, .csv and .tex; returns all three."""
    texts = {
        ".md": markdown(table, rows),
        ".csv": tables.numbers(rows).to_csv(index=False),
        ".tex": latex(table, rows),
    }
    paths = [path.with_name(path.name + ending) for ending in texts]
    for target, text in zip(paths, texts.values(), strict=True):
        files.write(target, text)
    return paths


def markdown(table: Table, rows: Sequence[Row]) -> str:
    frame = tables.text(rows)
    sides = ["left" if name in ("Method", "Model") else "right" for name in frame.columns]
    body = frame.to_markdown(index=False, colalign=sides, disable_numparse=True)
    listed = "\n".join(f"- {note}" for note in notes(table, rows))
    return f"**{title(table, rows)}** (`{table.name}`)\n\n{body}\n\n{listed}\n"


def latex(table: Table, rows: Sequence[Row]) -> str:
    """A `table` environment; needs \\usepackage{booktabs}."""
    frame = tables.text(rows).map(_escaped)
    caption = ". ".join([title(table, rows), " ".join(notes(table, rows))])
    return frame.rename(columns=_escaped).to_latex(
        index=False,
        column_format="".join("l" if name in ("Method", "Model") else "r" for name in frame.columns),
        caption=_escaped(caption),
        label=f"tab:{table.name}",
        position="t",
    )


def _escaped(text: str) -> str:
    return "".join(TEX.get(sign, sign) for sign in text)
