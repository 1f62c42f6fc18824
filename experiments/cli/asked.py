"""Turns parsed options into tables, cells and settings, and back into the arguments of another command."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.cli.options import RESULTS
from experiments.data import sources
from experiments.measures import zero_shot

if TYPE_CHECKING:
    from experiments.callbacks import Watcher
    from experiments.cells import Cell
    from experiments.settings import Settings

# of the tables at hand, what they were asked for by and options before all others
_SOURCES: dict[str, tuple[str, list[str]]] = {}


def resolve(asked: argparse.Namespace) -> None:
    """Make methods and tables from outside the repository known.

    `table` is then the table's own name and `source` what it was asked for by; of several `tables`, `sources` holds
    what each was asked for by, by its own name.
    """
    several = hasattr(asked, "tables")
    files, source = getattr(asked, "plugin", []), getattr(asked, "source", None) or getattr(asked, "table", None)
    if not files and not source and not several:
        return
    from experiments.own import tables
    from experiments.store import own_files
    from pruners.interface import plugin

    plugin.use(files)
    for file in files:
        own_files.hold(plugin.module(file))
    plugins = [str(file) for file in files]
    options = ["--plugin", *plugins] if plugins else []
    options += ["--rehearse"] if getattr(asked, "rehearse", False) else []
    if source:
        asked.source, asked.table = source, tables.find(source).name
        _SOURCES[asked.table] = (source, options)
    elif several:
        asked.sources = tables.named(_named(asked))
        _SOURCES.update({name: (word, options) for name, word in asked.sources.items()})
    _rehearse(asked)


def _rehearse(asked: argparse.Namespace) -> None:
    """Put rehearsals in the place of the tables where that is asked for."""
    if not getattr(asked, "rehearse", False):
        return
    from experiments.selection import rehearsal

    rehearsal.use(asked.sources if hasattr(asked, "sources") else [asked.table], getattr(asked, "model", None))
    asked.no_dense_gate = True
    folders = [asked.results] if isinstance(asked.results, Path) else asked.results
    if [folder.resolve() for folder in folders] == [RESULTS.resolve()]:
        place = rehearsal.RESULTS.resolve() if folders[0].is_absolute() else rehearsal.RESULTS
        asked.results = place if isinstance(asked.results, Path) else [place]


def forget() -> None:
    """The command is over, and the process may go on to another one."""
    _SOURCES.clear()
    if (rehearsal := sys.modules.get("experiments.selection.rehearsal")) is not None:
        rehearsal.use(())


def _named(asked: argparse.Namespace) -> list[str]:
    from experiments import papers
    from pruners.interface.suggest import UsageError

    if getattr(asked, "idle", False) and not asked.tables and not asked.all:
        return []  # means those that were begun
    if bool(asked.tables) == asked.all:
        raise UsageError(
            "--all means every table; leave out the table names."
            if asked.all
            else "Name one or several tables, or give --all."
        )
    return list(papers.TABLES) if asked.all else list(asked.tables)


def selection(
    table: str,
    results: Path,
    model: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    data_dir: Path | None = None,
) -> str:
    """The arguments, quoted for a shell, by which any command finds the same cells again, the table first."""
    source, before = _SOURCES.get(table, (table, []))
    return shlex.join([source, *before, *_options(model, dtype, limit, tasks, data_dir), *_results(results)])


def same_cells(asked: argparse.Namespace) -> str:
    """As `selection`, of the cells of this command; of several results folders in the first."""
    results = asked.results if isinstance(asked.results, Path) else asked.results[0]
    return selection(asked.table, results, asked.model, asked.dtype, asked.limit, asked.tasks, asked.data_dir)


def same_tables(asked: argparse.Namespace) -> str:
    """The arguments, quoted for a shell, by which another command is about the same cells of the same tables."""
    sources = ["--all"] if asked.all else list(asked.sources.values())
    before = next(iter(_SOURCES[name][1] for name in asked.sources), [])
    options = _options(asked.model, asked.dtype, asked.limit, asked.tasks, asked.data_dir)
    lists = {"--method": asked.method, "--only": asked.only}
    chosen = [word for name, values in lists.items() if values for word in (name, *values)]
    return shlex.join([*sources, *before, *options, *chosen, *_results(asked.results)])


def _options(
    model: str | None, dtype: str | None, limit: int | None, tasks: Sequence[str], data_dir: Path | None
) -> list[str]:
    told = {"--model": model, "--dtype": dtype, "--limit": limit, "--data-dir": data_dir}
    options = [word for name, value in told.items() if value for word in (name, str(value))]
    return [*options, *(["--tasks", *tasks] if tasks else [])]


def _results(folder: Path) -> list[str]:
    return [] if folder.resolve() == RESULTS.resolve() else ["--results", str(folder)]


def declared(asked: argparse.Namespace) -> list[Cell]:
    """Every cell of one table on the model, in the format and with the tasks that are asked for."""
    from experiments import cells, papers

    table = papers.find(asked.table)
    refuse_absent(asked.data_dir)
    refuse_unknown(asked.tasks)
    runs = papers.runs(table, asked.model, asked.dtype, asked.limit, asked.tasks)
    return cells.cells(runs, table)


def settings(asked: argparse.Namespace, found: Sequence[Cell] = ()) -> Settings:
    """`found` are the cells whose models are kept, if any are."""
    from experiments.own import saved
    from experiments.settings import Settings

    folder = getattr(asked, "save_models", None)
    return Settings(
        asked.results,
        asked.device,
        asked.batch_size,
        asked.data_dir,
        dense_gate=not asked.no_dense_gate,
        again=asked.again,
        save=saved.places(list(found), folder, asked.table) if folder else {},
        weights=asked.weights,
    )


def watchers(asked: argparse.Namespace, table: str) -> list[Watcher]:
    if asked.wandb is None:
        return []
    from experiments.wandb_callback import Wandb  # wandb takes a second to import

    return [Wandb(asked.wandb, table, asked.results)]


def refuse_absent(data_dir: Path | None) -> None:
    """UsageError for a data folder that is not there, before every cell would meet that."""
    from pruners.interface.suggest import UsageError

    folder = zero_shot.folder(data_dir)
    if folder and not folder.is_dir():
        name = "--data-dir" if data_dir else sources.DATA_DIR
        raise UsageError(
            f"{name} {folder} is not a folder; name an existing one, or leave it out to read from the Hub."
        )


def refuse_unknown(tasks: Sequence[str]) -> None:
    """UsageError, before any work, for names that lm-eval does not know, and for tasks without an accuracy to show."""
    from experiments import protocols

    if tasks:
        zero_shot.check(protocols.named(tasks))
