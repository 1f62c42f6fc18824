"""All results as one self-contained HTML page: tables, verdicts, figures, claims, provenance of every number."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import matplotlib
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from analysis import compare, coverage, figures
from analysis.claims import statements
from analysis.figures import style
from analysis.pages import provenance, spread
from analysis.rows import Folders, NoRecordsError, Row, folders, rows
from analysis.tables import frames, grid
from analysis.tables.grid import Pivot, Verdict
from analysis.tables.notes import notes, title
from experiments import cli, papers
from experiments.spec import Table

TEMPLATE = "report.html"
FEW_CELLS = 600  # with records; of up to so many every figure is drawn, which takes half a minute
Variant = tuple[str | None, str | None, int | None, Sequence[str]]  # model, dtype, limit and tasks
DECLARED: Variant = (None, None, None, ())
NO_VARIANTS: Mapping[str, Variant] = {}
TELLING = ("sparsity", "steps", "parameters", "masks")  # kinds that say what no grid of numbers does


@dataclass(frozen=True)
class Section:
    """One table that has records; `done` counts them, `made` are its rows, `again` the arguments of a command for the
    same cells, `place` is its anchor on the page, `spread` how far other calibration windows move its numbers."""

    name: str
    place: str
    title: str
    published: str | None
    done: int
    counts: str
    pivots: list[Pivot]
    claims: list[Verdict]
    beside: Grid | None
    own: Grid
    spread: Grid | None
    notes: list[str]
    figures: list[Drawn]
    made: list[Row]
    all_drawn: bool
    again: str


@dataclass(frozen=True)
class Drawn:
    """A figure as a data URL, and how wide it must stay for its letters to be read."""

    caption: str
    image: str
    inches: float


@dataclass(frozen=True)
class Grid:
    """`origins` holds, a line, the ids of the records behind it."""

    heads: list[str]
    lines: list[list[str]]
    origins: list[list[str]]


def html(
    root: Folders,
    known_as: Path | None = None,
    data_dir: Path | None = None,
    every_figure: bool | None = None,
    variants: Mapping[str, Variant] = NO_VARIANTS,
) -> str:
    """The page; NoRecordsError where there is no record at all.  Its hints name `root` as a reader knows it.

    With `data_dir` records of other texts than lie there are withheld.  Without `every_figure`, which is the default
    where more than FEW_CELLS cells have records, only what the papers draw and do not print is drawn; the page names
    the command for the others.  `variants` are by table the model, dtype, limit and tasks of cells that are shown, too,
    behind those that the table declares.
    """
    place = known_as or root
    found = [
        (table, variant, made)
        for table in papers.TABLES.values()
        for variant in _variants(table, variants)
        if (made := _rows(table, root, data_dir, variant))
    ]
    done = sum(row.record is not None for _, _, made in found for row in made)
    every = done <= FEW_CELLS if every_figure is None else every_figure
    sections = [_section(table, made, place, every, variant) for table, variant, made in found]
    if not sections:
        where = " or ".join(map(str, folders(root)))
        raise NoRecordsError(f"No record of any table under {where}. Run `python -m experiments run TABLE` first.")
    answered_first = sorted(grid.judged(statements.CLAIMS, root, data_dir), key=lambda one: not one.ours.of)
    sections = [_judged(section, answered_first) for section in sections]
    sections.sort(key=lambda one: not (one.published or one.claims))  # papers' tables and stand-ins first
    shown = {section.name for section in sections}
    return _environment().get_template(TEMPLATE).render(
        sections=sections,
        claims=answered_first,
        methods=_methods(section.made for section in sections),
        provenance=provenance.shared({id: told for section in sections
                                      for id, told in provenance.origins(section.made).items()}),
        left=[_left(table) for table in papers.TABLES.values() if table.name not in shown],
        coverage=coverage.summary(coverage.unmatched(papers.TABLES.values())),
    )  # fmt: skip


def _environment() -> Environment:
    made = Environment(loader=PackageLoader("analysis.pages", "."), autoescape=True, undefined=StrictUndefined,
                       trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    # origins are told in a reader's order
    made.policies["json.dumps_kwargs"] = {"sort_keys": False, "separators": (",", ":")}
    made.globals.update(
        value=grid.value, against=grid.against, ids=provenance.ids, printed=compare.printed, spread_note=spread.NOTE
    )
    return made


def _variants(table: Table, variants: Mapping[str, Variant]) -> list[Variant]:
    """What the table declares, and what else is asked for, unless that means the same cells."""
    asked = variants.get(table.name, DECLARED)
    if not any(asked) or set(papers.runs(table, *asked)) == set(table.runs()):
        return [DECLARED]
    return [DECLARED, asked]


def _rows(table: Table, root: Folders, data_dir: Path | None, variant: Variant) -> list[Row]:
    """None of them where no cell was ever run."""
    try:
        return rows(table, root, *variant, data_dir=data_dir)
    except NoRecordsError:
        return []


def _section(table: Table, made: list[Row], known_as: Folders, every: bool, variant: Variant) -> Section:
    found = compare.cells(table, made)
    again = cli.selection(table.name, folders(known_as)[0], *variant)
    return Section(
        name=table.name,
        place=table.name if variant == DECLARED else f"{table.name}-asked",
        title=title(table, made),
        published=table.published,
        done=sum(row.record is not None for row in made),
        counts=compare.counts(found) if table.published else "",
        pivots=grid.pivots(found),
        claims=[],
        beside=_grid(compare.text(found), [provenance.ids(cell.rows) for cell in found]) if table.published else None,
        own=_grid(frames.text(made), [provenance.ids([row]) for row in made]),
        spread=_spread(made),
        notes=notes(table, made, again),
        again=again,
        figures=list(_figures(table, made, every)),
        made=made,
        all_drawn=every,
    )


def _judged(section: Section, found: Sequence[Verdict]) -> Section:
    """With the claims that its numbers answer: those of what the table declares."""
    declared = section.place == section.name
    return replace(section, claims=grid.about(section.name, found)) if declared else section


def _grid(frame: pd.DataFrame, behind: list[list[str]]) -> Grid:
    lines = [[str(value) for value in line] for line in frame.itertuples(index=False)]
    return Grid([str(head) for head in frame.columns], lines, behind)


def _spread(made: Sequence[Row]) -> Grid | None:
    """Where the order or the text of calibration windows varies; what seeds alone do, ± says."""
    if not spread.tells_more_than_seeds(made):
        return None
    told = spread.lines(made)
    return _grid(pd.DataFrame([line for line, _ in told]), [provenance.ids(cells) for _, cells in told])


def _methods(sections: Iterator[list[Row]]) -> list[str]:
    """What each method does, in the first sentence of its own file."""
    kinds = {type(row.run.method): None for made in sections for row in made if row.run.method is not None}
    said = {(sys.modules[kind.__module__].__doc__ or "").splitlines()[0]: None for kind in kinds}
    return list(said)


def _left(table: Table) -> dict[str, Any]:
    return {"name": table.name, "title": table.title, "count": len(table.runs())}


def _figures(table: Table, made: list[Row], every: bool) -> Iterator[Drawn]:
    """Every figure that there are enough numbers for, or those in which the paper has its numbers."""
    for name, kind in figures.KINDS.items():
        if not every and (table.published or name not in TELLING):
            continue
        for key in kind.keys(made):
            try:
                figure = figures.draw(name, table, made, key)
                yield Drawn(
                    f"{kind.caption}, {key}" if key else kind.caption, _data_url(figure), float(figure.get_figwidth())
                )
            except style.UndrawableError:  # too few numbers yet, which the table shows better
                continue


def svg(figure: Figure) -> str:
    """The same text for the same numbers; letters as letters, not as outlines, and hundredths of a point: small."""
    drawn = io.StringIO()
    with matplotlib.rc_context({**style.STYLE, "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return re.sub(r"(\.\d\d)\d+", r"\1", drawn.getvalue())


def _data_url(figure: Figure) -> str:
    """Percent-encoded: a third shorter than base64, above all where the SVG holds pictures in base64 itself."""
    return "data:image/svg+xml," + quote(svg(figure).replace("\n", " "), safe=" !()*,-./:;=?@[]_{|}~+")
