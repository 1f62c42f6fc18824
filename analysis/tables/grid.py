"""A table in its paper's layout: methods as rows, settings as columns, means over seeds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from analysis import compare, significance
from analysis.claims.judge import Answer, Claim, Ours, on_ours, on_paper, scopes
from analysis.compare import Cell
from analysis.rows import Folders, Row
from analysis.tables.frames import MISSING, QUANTITIES

SIDE_BY_SIDE = 4  # columns that leave room for a figure beside them


@dataclass(frozen=True)
class Pivot:
    """One quantity under one protocol key; `lines` hold a method and its cells, None where it has no such cell.

    `marked` names the cells that are the best of their column beyond doubt.
    """

    key: str
    metric: str
    heads: list[str]
    lines: list[tuple[str, list[Cell | None]]]
    marked: set[significance.Name]

    @property
    def title(self) -> str:
        """E.g. perplexity wikitext2/test@128."""
        return next(quantity.title for quantity in QUANTITIES if quantity.name == self.metric).format(self.key)

    @property
    def is_wide(self) -> bool:
        return len(self.heads) > SIDE_BY_SIDE

    @property
    def has_paper(self) -> bool:
        return any(_printed(cell) for _, found in self.lines for cell in found)

    @property
    def is_begun(self) -> bool:
        return any(value(cell) != MISSING for _, found in self.lines for cell in found)

    def is_best(self, cell: Cell | None) -> bool:
        return cell is not None and significance.name(cell) in self.marked

    def text(self) -> pd.DataFrame:
        """Ours, and behind a stroke the paper's where it prints any of them."""
        told = [[method, *(_beside(cell, self.has_paper) for cell in found)] for method, found in self.lines]
        return pd.DataFrame(told, columns=["Method", *self.heads])

    def bold(self) -> pd.DataFrame:
        """True where `text` shows the best of its column."""
        return pd.DataFrame([[self.is_best(cell) for cell in found] for _, found in self.lines], columns=self.heads)


@dataclass(frozen=True)
class Verdict:
    """One sentence of a paper with its three answers; `noisy` counts only what noise leaves no doubt about."""

    claim: Claim
    paper: Answer
    ours: Answer
    noisy: Answer


def pivots(found: Sequence[Cell]) -> list[Pivot]:
    """One a perplexity and a mean accuracy of which anything is known, by us, by the paper or of a cell on its way.

    The dense model, which has no setting, stands in every column.
    """
    shown = [cell for cell in found if cell.fold == "mean" and is_headline(cell)]
    every = [
        _pivot(key, metric, [cell for cell in shown if (cell.key, cell.metric) == (key, metric)])
        for key, metric in dict.fromkeys((cell.key, cell.metric) for cell in shown)
    ]
    return [pivot for pivot in every if pivot.has_paper or pivot.is_begun]


def value(cell: Cell | None) -> str:
    """Ours with its 95 % interval over seeds, or over documents for an accuracy; how far it is where it is not done."""
    if cell is None:
        return MISSING
    if cell.ours is None:
        return _unfinished(cell.rows)
    spread = cell.half_width_of_mean
    return _number(cell.ours, cell) + ("" if spread is None else f" ± {_number(spread, cell)}")


def _beside(cell: Cell | None, paper: bool) -> str:
    return f"{value(cell)} / {_printed(cell) or MISSING}" if paper else value(cell)


def _printed(cell: Cell | None) -> str:
    paper = cell.published if cell else None
    return compare.printed(paper.value, cell) if cell and paper and paper.value is not None else ""


def judged(claims: Sequence[Claim], root: Folders, data_dir: Path | None = None) -> list[Verdict]:
    ours = Ours(root, data_dir)
    return [Verdict(claim, on_paper(claim), on_ours(claim, ours), on_ours(claim, ours, noise=True)) for claim in claims]


def about(table: str, found: Sequence[Verdict]) -> list[Verdict]:
    """Those that our records of this table answer."""
    return [one for one in found if one.ours.of and table in {place.table for place in _answering(one)}]


def against(answer: Answer) -> str:
    """Which of several comparisons hold, without the model that `where` names; empty for a single one."""
    return answer.told(f"{answer.where} ") if answer.of + answer.without > 1 else ""


def _answering(verdict: Verdict) -> Iterator:
    models = verdict.ours.where.split(", ")
    for places, _ in scopes(verdict.claim):
        yield from (place for place in places if set(models) & set(place.models))


def is_headline(cell: Cell) -> bool:
    return cell.metric == "perplexity" or (cell.metric == "score" and cell.key.startswith("mean."))


def _pivot(key: str, metric: str, cells: Sequence[Cell]) -> Pivot:
    columns = list(dict.fromkeys((cell.model, cell.setting) for cell in cells if not cell.is_dense))
    columns = columns or list(dict.fromkeys((cell.model, cell.setting) for cell in cells))
    several = len({model for model, _ in columns}) > 1
    heads = [" ".join(part for part in (model if several else "", setting) if part) for model, setting in columns]
    at = {(cell.method, *column): cell for cell in reversed(cells) for column in _columns(cell, columns)}
    methods = dict.fromkeys(cell.method for cell in cells)
    lines = [(method, [at.get((method, *column)) for column in columns]) for method in methods]
    return Pivot(key, metric, heads, lines, significance.best(cells))


def _columns(cell: Cell, columns: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    if cell.is_dense:
        return [column for column in columns if column[0] == cell.model]
    return [(cell.model, cell.setting)]


def _unfinished(rows: Sequence[Row]) -> str:
    done = sum(row.record is not None for row in rows)
    if any(row.state == "failed" for row in rows):
        return "failed"
    return f"{done} of {len(rows)} runs" if 0 < done < len(rows) else MISSING


def _number(number: float | None, cell: Cell) -> str:
    if number is None:
        return MISSING
    scale, digits = (100, 1) if cell.metric in compare.PERCENT else (1, 2 if (cell.ours or 0) < 1000 else 0)
    return f"{scale * number:,.{digits}f}"
