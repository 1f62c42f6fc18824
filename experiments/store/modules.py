"""Our own modules: where they lie, what each imports of us, and their text without what changes no number.

Of a package's `__init__.py` only those imports are followed whose names are used, so that who uses a part of it hangs
on nothing else.  Comments, docstrings and blank lines do not count.
"""

from __future__ import annotations

import ast
import io
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGES = ("pruners", "eval")
AROUND = ("experiments", "analysis", "slurm")  # ours, and no part of a number's code
HOLDING = (ast.stmt, ast.excepthandler, ast.match_case)


def reached(names: Iterable[str]) -> list[str]:
    """These modules and all of ours that they import, sorted."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += _imports(name)
    return sorted(found)


@cache
def _imports(name: str) -> tuple[str, ...]:
    path = _path(name)
    # what a package gathers is not used by who uses a part of it
    return () if path is None or path.name == "__init__.py" else tuple(imported(_text(name), name))


def imported(text: str, module: str) -> Iterator[str]:
    """Modules of ours that this text imports; of a package's names, those where the names that are used are defined."""
    for node in import_statements(text):
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, module)
            if package(source) in PACKAGES:
                for alias in node.names:
                    yield from _defining(source, alias.name)
            continue
        for alias in node.names:
            if package(alias.name) in PACKAGES:
                yield from _used(text, alias)


def _used(text: str, alias: ast.alias) -> Iterator[str]:
    """What `import package` or `import package.module` brings: of a package, the attributes that are read."""
    path = _path(alias.name)
    if path is not None and path.name != "__init__.py":
        yield alias.name
        return
    name = alias.asname or alias.name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == name:
            yield from _defining(alias.name, node.attr)


def _defining(source: str, name: str) -> Iterator[str]:
    """The module that `from source import name` reads."""
    path = _path(source)
    if path is None:
        return
    if path.name != "__init__.py":
        yield source
    elif _path(f"{source}.{name}") is not None:
        yield f"{source}.{name}"
    else:
        for node in import_statements(_text(source)):
            if isinstance(node, ast.ImportFrom) and package(node.module or "") in PACKAGES:
                for alias in node.names:
                    if name in ("*", alias.asname or alias.name):
                        yield from _defining(str(node.module), alias.name)
        yield source


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    parent = module.split(".")[: -node.level]
    return ".".join([*parent, *([node.module] if node.module else [])])


@cache
def import_statements(text: str) -> tuple[ast.Import | ast.ImportFrom, ...]:
    return tuple(node for node in _statements(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom))


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The tree, every statement in it and what else holds statements; no expressions, of which there are far more."""
    waiting = [tree]
    while waiting:
        yield (node := waiting.pop())
        waiting += [part for part in ast.iter_child_nodes(node) if isinstance(part, HOLDING)]


def folder(package: str) -> Path | None:
    """Where a package of ours lies."""
    spec = find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


@cache
def _path(module: str) -> Path | None:
    """The file of one of our modules; None where there is none, as for a name that a module defines."""
    package, *rest = module.split(".")
    if (place := folder(package)) is None:
        return None
    place = place.joinpath(*rest)
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)


@cache  # as this process has imported it, whatever is edited while it runs
def _text(module: str) -> str:
    path = _path(module)
    return path.read_text(encoding="utf-8") if path else ""


@cache
def source(module: str) -> str:
    path = _path(module)
    return plain(_text(module), definitions_only=path is not None and path.name == "__init__.py")


@cache
def plain(text: str, definitions_only: bool = False) -> str:
    """Without comments, docstrings and blank lines, the same in every version of Python; of a package's file only what
    it defines, for it names everything."""
    lines = io.StringIO(text).readlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column] + "\n"
    tree = ast.parse(text)
    for first, last in _docstrings(tree):
        if lines[first - 1].lstrip()[:1] not in ("d", "c", "a"):  # not behind `def`, `class` or `async` on their line
            lines[first - 1 : last] = [""] * (last - first + 1)
    if definitions_only:
        defined = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        lines = [line for node in defined for line in lines[_first_line(node) - 1 : node.end_lineno]]
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _first_line(node: ast.FunctionDef | ast.ClassDef) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])


def _docstrings(tree: ast.AST) -> Iterator[tuple[int, int]]:
    """First and last line of each."""
    for node in _statements(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            text = first.value.value if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) else None
            if isinstance(text, str):
                yield first.lineno, first.end_lineno or first.lineno


def package(name: str) -> str:
    return name.partition(".")[0]
