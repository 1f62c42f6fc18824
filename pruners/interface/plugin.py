"""Methods from your own files, or from an installed package.

A method is a frozen dataclass on `pruners.unstructured.Unstructured` or `pruners.structured.Structured`.  It is known
by the name of its class in small letters (`MyMethod`: my_method).  An installed package offers its own by the entry
point group `llm_pruning.methods`, each entry a class.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pruners
from pruners.interface.suggest import UsageError
from pruners.structured import Structured
from pruners.unstructured import Unstructured

GROUP = "llm_pruning.methods"
NONE = (
    "{file} declares no method: a frozen dataclass on pruners.unstructured.Unstructured with a `score`, or on "
    "pruners.structured.Structured."
)


def use(files: Sequence[str | Path] = ()) -> None:
    """Make the methods of these files, and of the installed packages, known by their names.

    Raises UsageError for a file that cannot be imported (with the line) or that holds no method, and for two methods
    of one name.
    """
    for entry in metadata.entry_points(group=GROUP):
        register(loaded(entry), entry.name)
    for file in files:
        if not taken(module(file)):
            raise UsageError(NONE.format(file=file))


def taken(made: ModuleType) -> list[type[Any]]:
    """The methods of a module, known by their names from now on."""
    found = methods(made)
    for kind in found:
        register(kind)
    return found


def register(kind: type[Any], name: str | None = None) -> str:
    """Make a method known by its name, which is returned; UsageError where another one has it."""
    name = name or called(kind)
    known = pruners.METHODS.setdefault(name, kind)
    if known is not kind and _place(known) != _place(kind):
        places = " and ".join(map(_place, (known, kind)))
        raise UsageError(f"Two methods are called {name}, in {places}; give one class another name.")
    pruners.METHODS[name] = kind
    return name


def check(method: Any) -> None:
    """UsageError for a method that is called like a known one and is another, so that both would have one record."""
    kind = type(method)
    known = pruners.METHODS.get(kind.__name__.lower())
    if known is not None and kind not in pruners.METHODS.values() and _place(known) != _place(kind):
        raise UsageError(
            f"{kind.__name__} of {_place(kind)} is called like the method {kind.__name__.lower()} of {_place(known)}; "
            "give its class another name."
        )


def _place(kind: type[Any]) -> str:
    """The file that declares a class, or where there is none its module."""
    try:
        return inspect.getsourcefile(kind) or kind.__module__
    except TypeError:
        return kind.__module__


def methods(made: ModuleType) -> list[type[Any]]:
    """The methods that a module declares itself; UsageError for one that is not a frozen dataclass."""
    own = [thing for thing in vars(made).values() if inspect.isclass(thing) and thing.__module__ == made.__name__]
    found = [kind for kind in own if issubclass(kind, Unstructured | Structured)]
    for kind in found:
        about = vars(kind).get("__dataclass_params__")
        if about is None or not about.frozen:
            raise UsageError(
                f"{kind.__name__} in {made.__file__} is not a frozen dataclass, so its hyperparameters have no record; "
                "put @dataclass(frozen=True) above it."
            )
        if not any(issubclass(other, kind) for other in found if other is not kind) and (lacking := _lacking(kind)):
            raise UsageError(f"{kind.__name__} in {made.__file__} defines no criterion; add {lacking}.")
    return found


def _lacking(kind: type[Any]) -> str:
    """What a method has to say, and this one leaves to its base; empty where it says it, or prunes in its own way."""
    base, name, arguments = (
        (Unstructured, "score", "name, weight, x, dense")
        if issubclass(kind, Unstructured)
        else (Structured, "choose", "model, windows, dense, how")
    )
    own = [
        getattr(kind, part) is not getattr(base, part, None)
        for part in (name, "remove", "prune")
        if hasattr(kind, part)
    ]
    return "" if any(own) else f"a method `{name}(self, {arguments})`"


def called(kind: type[Any]) -> str:
    """The name by which a method is known: MyMethod is my_method, RIA is ria."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower()


def loaded(entry: metadata.EntryPoint) -> Any:
    """What an entry point names; UsageError where it cannot be imported."""
    try:
        return entry.load()
    except Exception as error:  # whatever another package's import raises
        raise UsageError(f"The entry point {entry.name} ({entry.value}) cannot be loaded: {error!r}.") from error


def module(file: str | Path) -> ModuleType:
    """The file, imported once a process; UsageError, with the line, where that fails."""
    path = Path(file).expanduser()
    if not path.is_file():
        raise UsageError(f"{file} is not a file; name a Python file.")
    if path.suffix != ".py":
        raise UsageError(f"{file} is not a Python file, whose name ends in .py.")
    return _imported(path.resolve())


@cache
def _imported(path: Path) -> ModuleType:
    name = f"own_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}"
    if name in sys.modules:  # another file of that name
        name = f"{name}_{sum(other.startswith(name) for other in sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[name] = made  # dataclasses look there for annotations
    try:
        spec.loader.exec_module(made)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception | SystemExit):
            raise
        raise UsageError(_failed(path, error)) from error
    return made


def _failed(path: Path, error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        place, line = error.lineno, str(error.text or "").strip()
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename) == path]
        place, line = (frames[-1].lineno, str(frames[-1].line)) if frames else (None, "")
    where = f" at line {place} ({line})" if place else ""
    said = error.msg if isinstance(error, SyntaxError) else f"{type(error).__name__}: {error}"
    return f"{path} cannot be imported{where}: {said.rstrip('.')}."
