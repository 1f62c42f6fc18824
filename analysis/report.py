"""All results as one HTML page that needs nothing else: tables, verdicts, figures, claims, origin of every number."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from analysis import charts, claims, figures, inside, tables, unmatched, verdicts
from analysis.notes import notes, title
from analysis.rows import Row, rows
from analysis.verdicts import Cell
from experiments import tables as declared
from experiments.spec import Table

TEMPLATE = "report.html"


@dataclass(frozen=True)
class Section:
    """One table that has records: frames as (heads, lines), figures as data URLs, origins as JSON."""

    name: str
    title: str
    published: str | None
    counts: str
    own: Grid
    beside: Grid | None
    notes: list[str]
    figures: list[tuple[str, str]]


@dataclass(frozen=True)
class Grid:
    """`details` holds, a line, the whole origin of its number as JSON; empty where there is none."""

    heads: list[str]
    lines: list[list[str]]
    details: list[str]


def html(root: Path) -> str:
    """The page; LookupError where there is no record at all."""
    sections = [section for table in declared.TABLES.values() if (section := _section(table, root))]
    if not sections:
        raise LookupError(f"No record of any table under {root}. Run `python -m experiments run TABLE` first.")
    shown = {section.name for section in sections}
    left = [table for table in declared.TABLES.values() if table.name not in shown]
    environment = Environment(
        loader=PackageLoader("analysis", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template(TEMPLATE).render(
        sections=sections,
        claims=_grid(claims.frame(root)),
        left=[(table.name, table.title, len(table.runs()), table.missing) for table in left],
        unmatched=unmatched.summary(unmatched.unmatched(declared.TABLES.values())),
    )


def _section(table: Table, root: Path) -> Section | None:
    try:
        made = rows(table, root)
    except LookupError:  # never run
        return None
    found = verdicts.cells(table, made)
    return Section(
        name=table.name,
        title=title(table, made),
        published=table.published,
        counts=verdicts.counts(found) if table.published else "",
        own=_grid(tables.text(made), [_origin(row) for row in made]),
        beside=_grid(verdicts.text(found), [_source(cell) for cell in found]) if verdicts.tells_more(found) else None,
        notes=notes(table, made),
        figures=list(_figures(table, made, found)),
    )


def _grid(frame: pd.DataFrame, details: list[str] | None = None) -> Grid:
    lines = [[str(value) for value in line] for line in frame.itertuples(index=False)]
    return Grid([str(head) for head in frame.columns], lines, details or [""] * len(lines))


def _origin(row: Row) -> str:
    """The record without what is long: enough to make it again."""
    if row.record is None:
        return row.failure.message if row.failure else ""
    record: dict[str, Any] = row.record.model_dump(include={"id", "spec", "data", "cost", "made_by", "sha256"})
    measured = {key: _short(value) for key, value in row.record.measures.items()}
    return json.dumps({**record, "measures": measured}, indent=1)


def _source(cell: Cell) -> str:
    ids = [row.record.id for row in cell.rows if row.record]
    printed = asdict(cell.published) if cell.published else None
    return json.dumps({"records": ids, "protocol": cell.key, "printed": printed}, indent=1)


def _short(measured: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in measured.items() if not isinstance(value, list | dict)}


def _figures(table: Table, made: list[Row], found: list[Cell]) -> Iterator[tuple[str, str]]:
    """(caption, data URL) of every figure that there are enough numbers for."""
    keys = dict.fromkeys(cell.key for cell in found if cell.metric == "perplexity" and cell.ours is not None)
    drawings: list[tuple[str, Callable[[], Figure]]] = [
        (f"Perplexity by method, {key}", partial(figures.perplexity, table, made, key)) for key in keys
    ]
    drawings += [
        ("Perplexity by sparsity", lambda: charts.by_sparsity(table, found)),
        ("Ours against the paper's", lambda: charts.against_paper(table, found)),
        ("Heads and channels kept in each block", lambda: inside.kept(table, made)),
        ("Loss while retraining", lambda: inside.losses(table, made)),
        ("Mean accuracy by parameters", lambda: inside.by_parameters(table, found)),
        ("Time and memory", lambda: charts.cost(table, made)),
    ]
    for caption, draw in drawings:
        try:
            yield caption, _data_url(draw())
        except ValueError:  # too few numbers yet, which the table shows better
            continue


def _data_url(figure: Figure) -> str:
    drawn = io.BytesIO()
    with matplotlib.rc_context(figures.STYLE):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(drawn.getvalue()).decode()}"
