"""Frames of text as LaTeX: booktabs, shrunk where wider than the line, cut into as many `table`s as pages ask for."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence

import pandas as pd

from analysis.tables.frames import MISSING

NEEDS = "% needs \\usepackage{array,booktabs,graphicx}\n"
LINES = 40  # of a table in \small on one page, with its caption
COLUMNS = 11  # of numbers on one line, shrunk to about half
LONG = 30  # characters that fit a column of \LONG_WIDTH
LONG_WIDTH = "4.6cm"
TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "—": "---", "-": "-{}", "−": "$-$", "×": r"$\times$", "·": r"$\cdot$", "†": r"$\dagger$"},
    **{"–": "--", "≤": r"$\leq$", "≥": r"$\geq$"},
    **{"<": "$<$", ">": "$>$", "|": r"\textbar{}", '"': "''", "[": "{[}", "*": "{*}"},
}
EUROPEAN = 0x180  # the code point behind Latin Extended-A
STACKED = r" \\ "
NEGATIVE = re.compile(r"-[\d.]")
BREAK = re.compile(r".+?(?: |(?=@)|(?=\.[a-z])|$)")  # where the head of a column may be broken


def escaped(text: str) -> str:
    """For pdflatex without more packages; a letter that it has no glyph for as its code point."""
    sign, rest = ("$-$", text[1:]) if NEGATIVE.match(text) else ("", text)
    return sign + "".join(TEX.get(letter) or _plain(letter) for letter in " ".join(rest.split()))


def bold(text: str) -> str:
    return rf"\textbf{{{text}}}"


def tables(frame: pd.DataFrame, marked: pd.DataFrame, words: Sequence[str], caption: str, label: str) -> str:
    """`marked` says what is bold; columns in `words` stand left; only the first part has the caption and the label.

    Where more columns can be marked than a page has room for, they are cut too, and each part keeps the rows with a
    value in it.
    """
    first = rf"\caption{{{escaped(caption)}}}" + "\n" + rf"\label{{{label}}}"
    later = rf"\par Table~\ref{{{label}}}, continued"
    parts = [part for block in _blocks(frame, marked) for part in _tabulars(block, marked, words)]
    return "\n".join(_table(part, later if index else first) for index, part in enumerate(parts))


def notes(sentences: Sequence[str], label: str) -> str:
    """A paragraph, as it may be longer than a page has room below a table."""
    listed = " ".join(escaped(sentence) for sentence in sentences)
    return rf"{{\footnotesize\raggedright\noindent Notes to Table~\ref{{{label}}}. {listed}\par}}" + "\n"


def _blocks(frame: pd.DataFrame, marked: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The frame by at most COLUMNS of its marked columns, beside all others; more than one without its empty rows."""
    names = list(marked.columns)
    count = max(1, math.ceil(len(names) / COLUMNS))
    size = math.ceil(len(names) / count)
    for part in range(count):
        shown = names[part * size : (part + 1) * size]
        kept = frame.drop(columns=[name for name in names if name not in shown])
        yield kept if count == 1 else kept[(kept[shown] != MISSING).any(axis=1)]


def _tabulars(frame: pd.DataFrame, marked: pd.DataFrame, words: Sequence[str]) -> Iterator[str]:
    """One `tabular` a page."""
    made = frame.map(escaped)
    for name in frame.columns.intersection(marked.columns):
        made[name] = made[name].map(bold).where(marked.loc[frame.index, name], made[name])
    sides = "".join(_side(frame[name], name in words) for name in frame.columns)
    made.columns = pd.Index([_head(name, frame[name], "l" if name in words else "r") for name in frame.columns])
    for _, page in made.groupby(_pages(frame)):
        yield page.to_latex(index=False, column_format=sides)


def _table(tabular: str, caption: str) -> str:
    return (
        f"\\begin{{table}}[tp]\n\\centering\\small\n{caption}\n\\par\\medskip\n\\sbox0{{%\n{tabular.strip()}%\n}}%\n"
        "\\ifdim\\wd0>\\linewidth\\resizebox{\\linewidth}{!}{\\usebox0}\\else\\usebox0\\fi\n\\end{table}\n"
    )


def _pages(frame: pd.DataFrame) -> pd.Series:
    """By row the number of its part; parts are of about equal length."""
    lines = frame.map(len).max(axis=1).floordiv(LONG).add(1)
    parts = math.ceil(lines.sum() / LINES)
    return (lines.cumsum() - lines).mul(parts).floordiv(lines.sum())


def _side(column: pd.Series, left: bool) -> str:
    if not left:
        return "r"
    return rf">{{\raggedright\arraybackslash}}p{{{LONG_WIDTH}}}" if column.map(len).max() > LONG else "l"


def _head(name: str, column: pd.Series, side: str) -> str:
    """Broken where it is longer than what stands below it."""
    width = max(column.map(len).max(), 10)
    lines = [""]
    for piece in BREAK.findall(name):
        if lines[-1] and len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    made = [escaped(line) for line in lines]
    return made[0] if len(made) == 1 else rf"\shortstack[{side}]{{{STACKED.join(made)}}}"


def _plain(sign: str) -> str:
    """As it is where any LaTeX of today has it: ASCII, and Europe's letters in UTF-8."""
    known = sign.isascii() or (sign.isalpha() and ord(sign) < EUROPEAN)
    return sign if known and sign.isprintable() else f"$<$U+{ord(sign):04X}$>$"
