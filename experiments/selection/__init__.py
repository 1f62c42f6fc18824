"""The cells that a command applies to: `TABLE...` or `--all`, `--method`, and the terms of `--only`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING

from experiments import cli

if TYPE_CHECKING:
    from experiments.cells import Cell

Asked = list[tuple[argparse.Namespace, "list[Cell]"]]


def add(command: argparse.ArgumentParser) -> None:
    """Tables, what their cells are beyond what they declare, which of them, and where their records lie."""
    add_tables(command)
    cli.add_variant(command)
    command.add_argument(
        "--method",
        nargs="+",
        type=cli.word,
        default=[],
        metavar="NAME",
        help="only these methods; dense is the unpruned model",
    )
    command.add_argument(
        "--only",
        nargs="+",
        type=cli.word,
        default=[],
        metavar="CELL",
        help="only cells with these ids, labels or settings, or model=NAME, seed=N, setting=SPARSITY|PATTERN",
    )
    cli.add_results(command)


def add_tables(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "tables",
        nargs="*",
        type=cli.word,
        metavar="TABLE",
        help="names of tables (see: experiments list), or FILE.py or FILE.py:NAME of your own",
    )
    command.add_argument("--all", action="store_true", help="all tables")
    cli.add_plugin(command)


def each(asked: argparse.Namespace) -> list[argparse.Namespace]:
    """The command for each of its tables, as if it alone had been asked for.

    UsageError where `limit` would cut the tasks of none of them.
    """
    from experiments import papers
    from experiments.spec import ZeroShot
    from pruners.interface.suggest import UsageError

    told = {name: value for name, value in vars(asked).items() if name not in ("tables", "all", "sources")}
    told["several"] = len(asked.sources) > 1
    found = [argparse.Namespace(**told, table=name, source=source) for name, source in asked.sources.items()]
    if len(found) == 1 or not told.get("limit") or told.get("tasks"):
        return found
    for one in found:
        runs = papers.find(one.table).runs()
        one.limit = asked.limit if any(isinstance(what, ZeroShot) for run in runs for what in run.measures) else None
    if not any(one.limit for one in found):
        raise UsageError("None of these tables has zero-shot tasks, to which --limit applies; leave it out.")
    return found


def chosen(asked: argparse.Namespace) -> Asked:
    """By table, the chosen cells in its order; a table of which none is chosen is left out.

    UsageError for a term that no cell of any of the tables answers, and where no cell answers all of them.
    """
    from experiments.selection import terms

    ones = each(asked)
    cells = {one.table: cli.declared(one) for one in ones}
    found = terms.choose(cells, asked.method, asked.only)
    return [(one, found[one.table]) for one in ones if found[one.table]]


def left_out(table: str, reasons: Mapping[str, str]) -> list[str]:
    """A line for each reason why cells of a table are left, `reasons` by label."""
    told: dict[str, list[str]] = {}
    for label, reason in reasons.items():
        told.setdefault(reason, []).append(label)
    return [f"{table}: left out: {'; '.join(labels)}: {reason}" for reason, labels in told.items()]
