"""Tables from your own files, or from an installed package.

A table is a `Table` of experiments.spec at the top of a file, with methods beside it where it wants.  An installed
package offers its own by the entry point group `llm_pruning.tables`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments import papers
from experiments.spec import Table
from experiments.store import own_files
from pruners.interface import plugin
from pruners.interface.suggest import UsageError, unknown

GROUP = "llm_pruning.tables"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # files and artifacts are called by it and more


def find(asked: str) -> Table:
    """The table of a paper, of an installed package, or of `FILE.py` or `FILE.py:NAME`, which is known by its own name
    from then on.

    Raises UsageError for a file that cannot be imported or that does not tell which table is meant, for a name that is
    no folder's and for that of another table.
    """
    file, name = _file_of(asked)
    if file is None:
        for entry in metadata.entry_points(group=GROUP):
            if entry.name == asked and asked not in papers.TABLES:
                found = _of_its_kind(plugin.loaded(entry), f"The entry point {asked}")
                check_name(found.name, f"of the entry point {asked}")
                papers.TABLES[asked] = found
        return papers.find(asked)
    made = plugin.module(file)
    own_files.hold(made)
    plugin.taken(made)
    variables = {key: thing for key, thing in vars(made).items() if isinstance(thing, Table)}
    declared: dict[str, Table] = {}
    for thing in variables.values():
        if declared.setdefault(thing.name, thing) is not thing:
            raise UsageError(f"{file} declares two tables called {thing.name}; give one of them another name.")
    found = _chosen(declared, variables, name, file)
    check_name(found.name, f"in {file}")
    papers.TABLES[found.name] = found
    return found


def named(words: Sequence[str]) -> dict[str, str]:
    """By the names of tables the words that ask for them; UsageError for two tables of one name, or one of `find`'s."""
    made: dict[str, Table] = {}
    found: dict[str, str] = {}
    for word in words:
        table = find(word)
        if made.setdefault(table.name, table) is not table:
            raise UsageError(
                f"{found[table.name]} and {word} both declare a table called {table.name}, and records lie under its "
                "name; give one of them another name."
            )
        found.setdefault(table.name, word)
    return found


def absolute(asked: str) -> str:
    """The same table for a process that runs in another folder."""
    file, name = _file_of(asked)
    return asked if file is None else f"{file.resolve()}{f':{name}' if name else ''}"


def _file_of(asked: str) -> tuple[Path | None, str]:
    path, _, name = asked.partition(".py:")
    if name:
        return Path(f"{path}.py").expanduser(), name
    return (Path(asked).expanduser(), "") if asked.endswith(".py") else (None, "")


def _chosen(declared: dict[str, Table], variables: dict[str, Table], name: str, file: Path) -> Table:
    if not declared:
        raise UsageError(f"{file} declares no table; put a Table of experiments.spec at its top level.")
    if name:
        known = {**variables, **declared}
        if name not in known:
            raise UsageError(unknown(f"table in {file}", name, known))
        return known[name]
    if len(declared) > 1:
        raise UsageError(f"{file} declares {len(declared)} tables; choose one: {file}:{' or '.join(declared)}.")
    return next(iter(declared.values()))


def check_name(name: str, where: str) -> None:
    """UsageError for a table whose name is no folder's or that of a paper's table; `where` it is declared."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"The table {name!r} {where} needs a name that can be a folder: at most 100 letters, digits, '.', '-' and "
            "'_'."
        )
    if name in papers.TABLES and name in papers.PAPERS:
        raise UsageError(f"The table {name} {where} is called like one of the papers' tables; choose another name.")


def _of_its_kind(thing: Any, what: str) -> Table:
    if not isinstance(thing, Table):
        raise UsageError(f"{what} is not a Table of experiments.spec but {type(thing).__name__}.")
    return thing
