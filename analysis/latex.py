"""Frames of text as LaTeX: booktabs, shrunk where wider than the line, cut into as many `table`s as pages ask for."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pandas as pd

NEEDS = "% needs \\usepackage{array,booktabs,graphicx}\n"
LINES = 40  # of a table in \small on one page, with its caption
LONG = 30  # characters that fit a column of \LONG_WIDTH
LONG_WIDTH = "4.6cm"
TEX = {
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"±": r"$\pm$", "—": "---", "-": "-{}", "−": "$-$", "×": r"$\times$", "·": r"$\cdot$"},
    **{"<": "$<$", ">": "$>$", "|": r"\textbar{}", '"': "''", "[": "{[}", "*": "{*}"},
}
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
    """`marked` says what is bold; columns in `words` stand left; only the first part has the caption and the label."""
    made = frame.map(escaped)
    for name in marked.columns:
        made[name] = [bold(text) if is_best else text for text, is_best in zip(made[name], marked[name], strict=True)]
    sides = "".join(_side(frame[name], name in words) for name in frame.columns)
    heads = [_head(name, frame[name], "l" if name in words else "r") for name in frame.columns]
    made.columns = pd.Index(heads)
    parts = [part.to_latex(index=False, column_format=sides) for _, part in made.groupby(_pages(frame))]
    first = rf"\caption{{{escaped(caption)}}}" + "\n" + rf"\label{{{label}}}"
    later = rf"\par Table~\ref{{{label}}}, continued"
    return "\n".join(_table(part, later if index else first) for index, part in enumerate(parts))


def notes(sentences: Sequence[str], label: str) -> str:
    """A paragraph, as it may be longer than a page has room below a table."""
    listed = " ".join(escaped(sentence) for sentence in sentences)
    return rf"{{\footnotesize\raggedright\noindent Notes to Table~\ref{{{label}}}. {listed}\par}}" + "\n"


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
    return sign if sign.isascii() and sign.isprintable() else f"$<$U+{ord(sign):04X}$>$"
