"""Which code makes a number: digests of the source that a method, a recovery and a measure are made of.

A digest covers the module of a class and of its bases, and every module of `pruners` and `eval` that these import,
directly or through others, as the files stand on disk when they are first asked for: committed, changed or new.  Of a
package's `__init__.py` it covers `pruners.prune` and what else is defined there, and follows only those of its imports
whose names are used, so that a method's digest says nothing of other methods.  Of a class that is none of ours, a
method's or one that stands in a field of a method or of a recovery, it covers every module that its own imports, too,
directly or through others, but for what is installed.  Comments, docstrings and blank lines do not count.  Not covered:
what `experiments` does around them (texts and windows stand in a key by their tokens), imports by a name that is only
known at run time, and installed packages, whose versions a record keeps.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import secrets
import sys
import tokenize
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import decode_source, find_spec
from pathlib import Path
from typing import Any

from experiments import measures, provenance
from experiments.recovery import Retraining
from experiments.spec import Run

PACKAGES = ("pruners", "eval")
AROUND = ("experiments", "analysis", "slurm")  # ours, and no part of a number's code
INSTALLED = {"site-packages", "dist-packages"}
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
        **_file(run.method, run.recovery),
        **({"quantised": _modules(["eval.int8"])} if run.quantised else {}),
    }


def _file(*things: Any) -> dict[str, Any]:
    """Name and SHA-256 of every file of one's own that a method or a recovery is made of."""
    found: dict[str, Path] = {}
    for kind in (kind for thing in things for kind in _own_kinds(thing)):
        for name, path in _imported_by(kind).items():
            folders = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
            found["/".join([*folders, path.name])] = path
        if (declaring := _declaring(kind)) is not None:
            found[declaring.name] = declaring
    return {"file": {name: hashlib.sha256(_bytes(path)).hexdigest() for name, path in found.items()}} if found else {}


def made_by(recorded: dict[str, Any], run: Run) -> str:
    """By which code a record was made: `same`, `other`, or `unknown` where it does not say."""
    return "unknown" if not recorded else "same" if recorded == of(run) else "other"


def method(thing: Any) -> str | None:
    """Of a pruning method with the statistics that it gathers; None of none."""
    return None if thing is None else _digest({**_classes(type(thing)), **_own(thing), DRIVER: _source(DRIVER)})


def recovery(thing: Any) -> str | None:
    if thing is None:
        return None
    ours = _sources(RETRAINING) if isinstance(thing, Retraining) else _classes(type(thing))
    return _digest({**ours, **_own(thing)})


def measure(what: Any) -> str:
    return _modules(measures.code_of(what))


def packages() -> dict[str, str]:
    """Versions of the libraries that our code runs on: a cache of another version is not believed."""
    return {name: provenance.version(name) for name in LIBRARIES}


def _modules(names: Iterable[str]) -> str:
    return _digest(_sources(names))


def _sources(names: Iterable[str]) -> dict[str, str]:
    """By name the sources of modules of ours and of all that they import."""
    return {name: _source(name) for name in _reached(names)}


def _own(thing: Any) -> dict[str, str]:
    return {name: text for kind in _own_kinds(thing) for name, text in _classes(kind).items()}


def _own_kinds(thing: Any) -> Iterator[type[Any]]:
    """The classes that are none of ours, of a thing and of the dataclasses in its fields."""
    return (kind for kind in _kinds(thing) if _package(kind.__module__) not in PACKAGES + AROUND)


def _kinds(thing: Any) -> Iterator[type[Any]]:
    if is_dataclass(thing) and not isinstance(thing, type):
        yield type(thing)
        parts: Iterable[Any] = [getattr(thing, field.name) for field in fields(thing)]
    else:
        parts = thing.values() if isinstance(thing, Mapping) else thing if isinstance(thing, list | tuple) else ()
    for part in parts:
        yield from _kinds(part)


def _classes(kind: type[Any]) -> dict[str, str]:
    """By module the source of a class, its bases and what they import."""
    found: dict[str, str] = {}
    for part in kind.__mro__:
        name = part.__module__
        if _package(name) in PACKAGES:
            found |= _sources([name])
        elif _package(name) not in sys.stdlib_module_names or name == "__main__":
            texts = {name: _elsewhere(part), **{name: _read(path) for name, path in _imported_by(part, kind).items()}}
            for module, text in texts.items():
                found |= {module: _plain(text), **_sources(_imported(text, module))}
    return found


def _elsewhere(kind: type[Any]) -> str:
    """The source of a class that is none of ours: its file, its cell of a notebook, or a text that equals no other."""
    try:
        path = _declaring(kind)
        return _read(path) if path else inspect.getsource(kind)
    except (OSError, TypeError):
        return f"unknown = {secrets.token_hex()!r}"


def _declaring(kind: type[Any]) -> Path | None:
    """The file that declares a class."""
    try:
        path = inspect.getsourcefile(kind)
    except TypeError:
        return None
    return Path(path) if path and Path(path).is_file() else None


def _imported_by(kind: type[Any], user: type[Any] | None = None) -> dict[str, Path]:
    """By name the files of one's own that the module of a class imports, directly or through others.

    What is installed is followed within the package of `user` alone, whose classes are asked for; the class's own.
    """
    home = _package((user or kind).__module__)
    name, found = kind.__module__, dict[str, Path]()
    waiting = list(_named(_elsewhere(kind), getattr(sys.modules.get(name), "__package__", None) or ""))
    while waiting:
        module = waiting.pop()
        if module in (name, *found) or (spec := _spec_of_own(module, home)) is None:
            continue
        found[module] = Path(str(spec.origin))
        waiting += _named(_read(found[module]), str(spec.parent))
    return found


@cache
def _named(text: str, package: str) -> tuple[str, ...]:
    """Every module that a text of this package may import, with the packages that they lie in."""
    named = []
    for node in _import_statements(text):
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
    package = _package(name)
    if not package or package in sys.stdlib_module_names or package in PACKAGES + AROUND:
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


def _package(name: str) -> str:
    return name.partition(".")[0]


@cache  # as this process has imported it, whatever is edited while it runs
def _bytes(path: Path) -> bytes:
    return path.read_bytes()


def _read(path: Path) -> str:
    """The text of a module of one's own; of one that is compiled or no Python, a text that changes with it."""
    content = _bytes(path)
    try:
        text = decode_source(content) if path.suffix == ".py" else ""
        ast.parse(text)
    except (SyntaxError, ValueError):  # what its user does not import, or catches the error of
        text = ""
    return text or f"compiled = {hashlib.sha256(content).hexdigest()!r}"


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
            if _package(source) in PACKAGES:
                for alias in node.names:
                    yield from _defining(source, alias.name)
            continue
        for alias in node.names:
            if _package(alias.name) in PACKAGES:
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
            if isinstance(node, ast.ImportFrom) and _package(node.module or "") in PACKAGES:
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
