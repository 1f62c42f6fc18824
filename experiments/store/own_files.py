"""Files of one's own that a class is made of: the one that declares it, and all that this one imports.

Directly or through others, but for Python's modules, ours and what is installed.  Imports by a name that is only known
at run time are not followed.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import secrets
import sys
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import decode_source, find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from experiments.store import modules

INSTALLED = {"site-packages", "dist-packages"}


def declaring(kind: type[Any]) -> Path | None:
    """The file that declares a class."""
    try:
        path = inspect.getsourcefile(kind)
    except TypeError:
        return None
    return Path(path) if path and Path(path).is_file() else None


def text_of(kind: type[Any]) -> str:
    """The source of a class that is none of ours: its file, its cell of a notebook, or a text that equals no other."""
    try:
        path = declaring(kind)
        return read(path) if path else inspect.getsource(kind)
    except (OSError, TypeError):
        return f"unknown = {secrets.token_hex()!r}"


def imported_by(kind: type[Any], user: type[Any] | None = None) -> dict[str, Path]:
    """By name the files of one's own that the module of a class imports, directly or through others.

    What is installed is followed within the package of `user` alone, whose classes are asked for; the class's own.
    """
    return _imported(kind.__module__, text_of(kind), modules.package((user or kind).__module__))


def hold(made: ModuleType) -> None:
    """Read now a module of one's own that has just been imported, with all that it imports, so that what is edited
    later is not taken for what runs."""
    _imported(made.__name__, read(Path(str(made.__file__))), modules.package(made.__name__))


def _imported(name: str, text: str, home: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    waiting = list(_named(text, getattr(sys.modules.get(name), "__package__", None) or ""))
    while waiting:
        module = waiting.pop()
        if module in (name, *found) or (spec := _spec_of_own(module, home)) is None:
            continue
        found[module] = Path(str(spec.origin))
        waiting += _named(read(found[module]), str(spec.parent))
    return found


@cache
def _named(text: str, package: str) -> tuple[str, ...]:
    """Every module that a text of this package may import, with the packages that they lie in."""
    named = []
    for node in modules.import_statements(text):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
            continue
        parts = package.split(".")
        above = parts[: len(parts) + 1 - node.level] if node.level else []
        source = ".".join([*above, *([node.module] if node.module else [])])
        named += [f"{source}.{alias.name}" for alias in node.names]
    split = [name.split(".") for name in named]
    return tuple(dict.fromkeys(".".join(parts[: n + 1]) for parts in split for n in range(len(parts))))


def _spec_of_own(name: str, home: str) -> ModuleSpec | None:
    """Where a module of one's own lies; None for one of Python's, of ours or of an installed package but `home`."""
    package = modules.package(name)
    if not package or package in sys.stdlib_module_names or package in modules.PACKAGES + modules.AROUND:
        return None
    spec = _spec(name)
    if spec is None or not spec.has_location or not Path(str(spec.origin)).is_file():
        return None
    return spec if package == home or not INSTALLED & set(Path(str(spec.origin)).parts) else None


def _spec(name: str) -> ModuleSpec | None:
    """Of a module that need not be imported yet, and is not imported by this."""
    if name in sys.modules:
        return getattr(sys.modules[name], "__spec__", None)
    package = name.rpartition(".")[0]
    if not package:
        return find_spec(name)
    above = _spec(package)
    places = above.submodule_search_locations if above else None
    return PathFinder.find_spec(name, list(places)) if places else None


@cache  # as this process has imported it, whatever is edited while it runs
def bytes_of(path: Path) -> bytes:
    return path.read_bytes()


def read(path: Path) -> str:
    """The text of a module of one's own; of one that is compiled or no Python, a text that changes with it."""
    content = bytes_of(path)
    try:
        text = decode_source(content) if path.suffix == ".py" else ""
        ast.parse(text)
    except (SyntaxError, ValueError):  # what its user does not import, or catches the error of
        text = ""
    return text or f"compiled = {hashlib.sha256(content).hexdigest()!r}"
