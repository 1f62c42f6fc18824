"""Make tables, figures and reports from the records of a table's cells.

python -m analysis table embedded.demo
python -m analysis figure embedded.demo
python -m analysis compare embedded.demo
python -m analysis generation embedded.generation
python -m analysis claims
python -m analysis report
python -m analysis readme
python -m analysis speed embedded.speed
python -m analysis spread embedded.order
python -m analysis frame --out records.parquet
python -m analysis everything flap.perplexity flap.zero_shot
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import figures
from experiments import cli, selection
from experiments.models import catalogue
from experiments.store import atomic

if TYPE_CHECKING:
    from analysis.rows import Row


def main(words: Sequence[str] | None = None) -> int:
    """The exit status."""
    return cli.carry_out(parser().parse_args(words), "Stopped.")


def parser() -> argparse.ArgumentParser:
    top = cli.Parser(prog="python -m analysis", description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    table = commands.add_parser(
        "table",
        help="print a table as Markdown, the paper's numbers alone where none of its cells was run; write .md, .csv "
        "and .tex under the results folder",
    )
    table.set_defaults(command=_table)
    figure = commands.add_parser(
        "figure", help="draw the table's figures (default: its main ones), as .svg and .png under the results folder"
    )
    figure.set_defaults(command=_figure)
    figure.add_argument(
        "--measure",
        type=cli.word,
        metavar="KEY",
        help="protocol key to draw, e.g. wikitext2/test@2048 (default: all that were measured)",
    )
    figure.add_argument(
        "--kind",
        choices=list(figures.KINDS),
        help="kind of figure (default: perplexity by method, otherwise accuracy, masks or numbers)",
    )
    compare = commands.add_parser(
        "compare", help="compare every cell with a baseline: paired differences, intervals, tests"
    )
    compare.set_defaults(command=_compare)
    compare.add_argument(
        "--baseline",
        type=cli.word,
        metavar="LABEL",
        help="cell to compare with (default: the dense model, of this table or another, otherwise the first cell)",
    )
    generation = commands.add_parser("generation", help="show the models' generated text side by side")
    generation.set_defaults(command=_generation)
    speed = commands.add_parser("speed", help="show prefill and decoding time by batch size and prompt length")
    speed.set_defaults(command=_speed)
    spread = commands.add_parser(
        "spread", help="show how far perplexity and mask move with the calibration windows' order, draw and text"
    )
    spread.set_defaults(command=_spread)
    claims = commands.add_parser("claims", help="judge the papers' claims by their numbers and by ours")
    claims.set_defaults(command=_claims)
    report = commands.add_parser(
        "report", help="write all results as one HTML page, report.html under the results folder"
    )
    report.set_defaults(command=_report, variants={})
    report.add_argument(
        "--figures", choices=("few", "all"),
        help="all figures, or only those of results that the papers plot without printing numbers (few); default: "
        "all if there are few records",
    )  # fmt: skip
    readme = commands.add_parser("readme", help="update the README's tables and results from the committed records")
    readme.set_defaults(command=_readme)
    everything = commands.add_parser(
        "everything", help="write the given tables and their figures, the claims and the report"
    )
    everything.set_defaults(command=_everything)
    selection.add_tables(everything)
    cli.add_variant(everything)
    everything.add_argument(
        "--unwritten",
        type=cli.path,
        metavar="FILE",
        help="also write what could not be produced, and why, to this JSON file",
    )
    for command in (table, figure, compare, generation, speed, spread):
        cli.add_table(command)
    frame = commands.add_parser("frame", help="export every record of one or several results folders as one tidy table")
    frame.set_defaults(command=_frame)
    frame.add_argument(
        "--out", type=cli.path, metavar="FILE", help="a .csv or .parquet file (default: CSV to standard output)"
    )
    for command in (table, figure, compare, generation, speed, spread, claims, report, frame, everything):
        command.add_argument(
            "--data-dir",
            type=cli.path,
            default=os.environ.get("PRUNING_DATA_DIR"),
            help="hide numbers measured on texts other than those in this folder (default: $PRUNING_DATA_DIR, "
            "otherwise show all)",
        )
    for command in commands.choices.values():
        several = {"default": Path("results")} if command is readme else {"nargs": "+", "default": [Path("results")]}
        told = "" if command is readme else " (each cell is read from the first that has it; output goes to the first)"
        command.add_argument(
            "--results", type=_folder, metavar="DIR", help=f"results folder (default: results){told}", **several
        )
        command.add_argument("--debug", action="store_true", help="show the full traceback on error")
    return top


def _folder(text: str) -> Path:
    folder = cli.path(text)
    if not folder.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is not a folder; name the one that the cells were run with")
    return folder


def _table(asked: argparse.Namespace) -> None:
    """What the paper prints, alone, where none of these cells was run and it prints any of them."""
    from analysis import compare
    from analysis.rows import NoRecordsError
    from experiments.papers import find

    try:
        _table_of_records(asked)
    except NoRecordsError as error:
        if not any(cell.published for cell in compare.cells(find(asked.table), error.rows)):
            raise
        cli.say_lines([f"{error} The paper's values stand alone."])
        _show(asked, error.rows)


def _table_of_records(asked: argparse.Namespace) -> None:
    _show(asked, _rows(asked))


def _show(asked: argparse.Namespace, made: list[Row]) -> None:
    from analysis.tables import markdown
    from experiments.papers import find

    table, again = find(asked.table), cli.same_cells(asked)
    with _printed(markdown.markdown(table, made, again)):
        paths = markdown.write(table, made, asked.results[0] / _stem(asked), again)
    print(f"Written: {', '.join(map(str, paths))}", file=sys.stderr)


def _figure(asked: argparse.Namespace) -> None:
    from analysis.figures import style
    from experiments.papers import find

    if asked.kind:
        figures.check_key(asked.kind, asked.measure)
    table, made = find(asked.table), _rows(asked)
    for place, (kind, key) in enumerate(_drawn(asked, made)):
        path = asked.results[0] / _stem(asked)
        ending = [kind] if kind != "perplexity" else []
        ending += [_slug(key)] if place and key else []  # the first has the table's own name
        path = path.with_name(".".join([path.name, *ending]))
        figure = figures.draw(kind, table, made, key)
        print(f"Written: {', '.join(map(str, style.save(figure, path)))}", file=sys.stderr)


def _drawn(asked: argparse.Namespace, made: list[Row]) -> list[tuple[str, str | None]]:
    """A kind and a protocol key each: the one that is asked for, or all that there are."""
    from analysis.figures import KINDS

    if asked.kind is None and asked.measure is None:
        return figures.main(made)
    kind = asked.kind or next((kind for kind, key in figures.main(made) if key == asked.measure), "perplexity")
    figures.check_key(kind, asked.measure)
    return [(kind, key) for key in ([asked.measure] if asked.measure else KINDS[kind].keys(made) or [None])]


def _slug(key: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", key).strip("-")


def _compare(asked: argparse.Namespace) -> None:
    from analysis.pages import comparisons
    from experiments.papers import find

    table, made = find(asked.table), _rows(asked)
    against = comparisons.baselines(table, made, asked.results, asked.baseline)
    _write(comparisons.page(table, made, against), asked, "compared")


def _generation(asked: argparse.Namespace) -> None:
    from analysis.pages import generation

    _write(generation.page(generation.continuations(_rows(asked))), asked, "generation")


def _speed(asked: argparse.Namespace) -> None:
    from analysis.pages import speed
    from experiments.papers import find

    _write(speed.page(find(asked.table), _rows(asked), cli.same_cells(asked)), asked, "speed")


def _spread(asked: argparse.Namespace) -> None:
    from analysis.pages import spread
    from experiments.papers import find

    _write(spread.page(find(asked.table), _rows(asked)), asked, "spread")


def _claims(asked: argparse.Namespace) -> None:
    from analysis.claims import statements
    from analysis.tables import markdown

    cli.refuse_absent(asked.data_dir)
    made = statements.frame(asked.results, data_dir=asked.data_dir)
    with _printed(markdown.marked(made, words=list(made.columns))):
        atomic.write(asked.results[0] / "claims.csv", made.to_csv(index=False))


def _report(asked: argparse.Namespace) -> None:
    from analysis.pages import report

    cli.refuse_absent(asked.data_dir)
    path, every = asked.results[0] / "report.html", asked.figures and asked.figures == "all"
    made = report.html(asked.results, data_dir=asked.data_dir, every_figure=every, variants=asked.variants)
    atomic.write(path, made)
    print(f"Written: {path}", file=sys.stderr)


def _readme(asked: argparse.Namespace) -> None:
    from analysis.pages import readme

    print(f"Written: {', '.join(map(str, readme.write(asked.results)))}", file=sys.stderr)


def _everything(asked: argparse.Namespace) -> int:
    """What cannot be written is told, and the rest is written all the same."""
    from analysis.figures.style import UndrawableError
    from analysis.rows import NoRecordsError
    from experiments.errors import sentence

    ones, kinds = selection.each(asked), {"table": _table_of_records, "figures": _figure}
    variants = {one.table: (one.model, one.dtype, one.limit, one.tasks) for one in ones}
    parts = [(f"{what} of {one.table}", write, one) for one in ones for what, write in kinds.items()]
    unwritten: dict[str, str] = {}
    failed = False
    for what, write, one in [*parts, ("claims", _claims, asked), ("report", _report, asked)]:
        told = {"measure": None, "kind": None, "figures": None, "variants": variants}
        try:
            write(argparse.Namespace(**{**vars(one), **told}))
        except (NoRecordsError, UndrawableError) as error:
            unwritten[what] = str(error)
        except Exception as error:  # noqa: BLE001  (one table that cannot be shown keeps no other from it)
            failed = True
            unwritten[what] = sentence(error)
    cli.say_lines([f"{what}: {why}" for what, why in unwritten.items()])
    if asked.unwritten:
        atomic.write(asked.unwritten, json.dumps(unwritten))
    return cli.EXIT_FAILED if failed else 0


def _frame(asked: argparse.Namespace) -> None:
    from analysis import tidy

    if asked.out is not None:
        tidy.refuse_place(asked.out)
    cli.refuse_absent(asked.data_dir)
    made = tidy.frame(*asked.results, data_dir=asked.data_dir)
    if asked.out is None:
        print(made.to_csv(index=False), end="")
    else:
        print(f"Written: {tidy.write(made, asked.out)} ({len(made)} values)", file=sys.stderr)


@contextmanager
def _printed(text: str) -> Iterator[None]:
    """Behind what is written, so that a reader such as `head` stops nothing, and where nothing may be written, too."""
    try:
        yield
    finally:
        print(text)


def _write(text: str, asked: argparse.Namespace, ending: str) -> None:
    path = asked.results[0] / f"{_stem(asked)}.{ending}.md"
    with _printed(text):
        atomic.write(path, text)
    print(f"Written: {path}", file=sys.stderr)


def _rows(asked: argparse.Namespace) -> list[Row]:
    from analysis.rows import rows
    from experiments.papers import find

    cli.refuse_unknown(asked.tasks)
    cli.refuse_absent(asked.data_dir)
    return rows(find(asked.table), asked.results, asked.model, asked.dtype, asked.limit, asked.tasks, asked.data_dir)


def _stem(asked: argparse.Namespace) -> str:
    limit = f"first-{asked.limit}" if asked.limit else None
    tasks = "+".join(asked.tasks)
    parts = (asked.table, catalogue.called(asked.model) if asked.model else None, asked.dtype, limit, tasks)
    return ".".join(part for part in parts if part)


if __name__ == "__main__":
    sys.exit(main())
