"""Which code makes a number: digests of the source that a method, a recovery and a measure are made of.

A digest covers the module of a class and of its bases, and every module of `pruners` and `eval` that these import,
directly or through others, as the files stand on disk when they are first asked for: committed, changed or new.  Of a
package's `__init__.py` it covers `pruners.prune` and what else is defined there, and follows only those of its imports
whose names are used, so that a method's digest says nothing of other methods.  Comments, docstrings and blank lines do
not count.  Not covered: what `experiments` does around them (texts and windows stand in a key by their tokens),
imports by a name that is only known at run time, and other packages, whose versions a record keeps.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import secrets
import sys
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from experiments import measures, provenance
from experiments.recovery import Retraining
from experiments.spec import Run

PACKAGES = ("pruners", "eval")
DRIVER = "pruners"  # its `prune` and `gather` call every method
RETRAINING = ("pruners.retrain.finetune", "pruners.retrain.held_out")
DIGITS = 16
HOLDING = (ast.stmt, ast.excepthandler, ast.match_case)
LIBRARIES = ("torch", "transformers")  # what our code runs on


def of(run: Run) -> dict[str, Any]:
    """Of everything that makes the numbers of this run, for its record."""
    return {
        "method": method(run.method),
        "recovery": recovery(run.recovery),
        "measures": {what.key: measure(what) for what in run.measures},
        **_file(run.method),
        **({"quantised": _modules(["eval.int8"])} if run.quantised else {}),
    }


def _file(thing: Any) -> dict[str, Any]:
    """Name and SHA-256 of the file that declares a method of one's own."""
    kind = type(thing)
    if thing is None or kind.__module__.partition(".")[0] in PACKAGES or not (path := inspect.getsourcefile(kind)):
        return {}
    return {"file": {Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest()}}


def made_by(recorded: dict[str, Any], run: Run) -> str:
    """By which code a record was made: `same`, `other`, or `unknown` where it does not say."""
    return "unknown" if not recorded else "same" if recorded == of(run) else "other"


def method(thing: Any) -> str | None:
    """Of a pruning method with the statistics that it gathers; None of none."""
    return None if thing is None else _digest({**_classes(type(thing)), DRIVER: _source(DRIVER)})


def recovery(thing: Any) -> str | None:
    if thing is None:
        return None
    return _modules(RETRAINING) if isinstance(thing, Retraining) else _digest(_classes(type(thing)))


def measure(what: Any) -> str:
    return _modules(measures.code_of(what))


def packages() -> dict[str, str]:
    """Versions of the libraries that our code runs on: a cache of another version is not believed."""
    return {name: provenance.version(name) for name in LIBRARIES}


def _modules(names: Iterable[str]) -> str:
    return _digest({name: _source(name) for name in _reached(names)})


def _classes(kind: type[Any]) -> dict[str, str]:
    """By module the source of a class, its bases and what they import."""
    found: dict[str, str] = {}
    for part in kind.__mro__:
        name = part.__module__
        if name.partition(".")[0] in PACKAGES:
            found |= {reached: _source(reached) for reached in _reached([name])}
        elif name.partition(".")[0] not in sys.stdlib_module_names or name == "__main__":
            text = _elsewhere(part)
            found |= {name: _plain(text), **{reached: _source(reached) for reached in _reached(_imported(text, name))}}
    return found


def _elsewhere(kind: type[Any]) -> str:
    """The source of a class that is none of ours: its file, its cell of a notebook, or a text that equals no other."""
    try:
        path = inspect.getsourcefile(kind)
        return Path(path).read_text(encoding="utf-8") if path else inspect.getsource(kind)
    except (OSError, TypeError):
        return f"unknown = {secrets.token_hex()!r}"


def _digest(sources: dict[str, str]) -> str:
    text = "\0".join(f"{name}\0{source}" for name, source in sorted(sources.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _reached(names: Iterable[str]) -> list[str]:
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
    return () if path is None or path.name == "__init__.py" else tuple(_imported(_text(name), name))


def _imported(text: str, module: str) -> Iterator[str]:
    """Modules of ours that this text imports; of a package's names, those where the names that are used are defined."""
    for node in _import_statements(text):
        if isinstance(node, ast.ImportFrom):
            source = _absolute(node, module)
            if source.partition(".")[0] in PACKAGES:
                for alias in node.names:
                    yield from _defining(source, alias.name)
            continue
        for alias in node.names:
            if alias.name.partition(".")[0] in PACKAGES:
                yield from _used(text, alias)


@cache
def _import_statements(text: str) -> tuple[ast.Import | ast.ImportFrom, ...]:
    return tuple(node for node in _statements(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom))


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """The tree, every statement in it and what else holds statements; no expressions, of which there are far more."""
    waiting = [tree]
    while waiting:
        yield (node := waiting.pop())
        waiting += [part for part in ast.iter_child_nodes(node) if isinstance(part, HOLDING)]


def _absolute(node: ast.ImportFrom, module: str) -> str:
    if not node.level:
        return node.module or ""
    parent = module.split(".")[: -node.level]
    return ".".join([*parent, *([node.module] if node.module else [])])


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
        for node in _import_statements(_text(source)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PACKAGES:
                for alias in node.names:
                    if name in ("*", alias.asname or alias.name):
                        yield from _defining(str(node.module), alias.name)
        yield source


@cache
def _path(module: str) -> Path | None:
    """The file of one of our modules; None where there is none, as for a name that a module defines."""
    package, *rest = module.split(".")
    if (place := folder(package)) is None:
        return None
    place = place.joinpath(*rest)
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)


def folder(package: str) -> Path | None:
    """Where a package of ours lies."""
    spec = find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


@cache  # as this process has imported it, whatever is edited while it runs
def _text(module: str) -> str:
    path = _path(module)
    return path.read_text(encoding="utf-8") if path else ""


@cache
def _source(module: str) -> str:
    path = _path(module)
    return _plain(_text(module), definitions_only=path is not None and path.name == "__init__.py")


@cache
def _plain(text: str, definitions_only: bool = False) -> str:
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
