"""What public functions and settings accept, declared in their annotations; a wrong value gets one sentence.

A parameter or field says it with a type below, `batch_size: Count`.  `arguments` checks a function's whenever it is
called, `fields` a dataclass's from its `__post_init__`.  A number of numpy's is taken for Python's own.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import numpy as np

from pruners.interface.suggest import unknown

P = ParamSpec("P")
R = TypeVar("R")
SHOWN = 60  # characters of a value


@dataclass(frozen=True)
class Rule:
    """`words` complete the sentence "batch_size is ..."; a value is one of `types` and `holds`."""

    words: str
    types: tuple[type, ...]
    holds: Callable[[Any], bool] = lambda value: True

    def checked(self, name: str, value: Any) -> Any:
        """The value; raises TypeError for one of another type, ValueError for one out of range."""
        value = value.item() if isinstance(value, np.generic) else value
        if not isinstance(value, self.types) or (isinstance(value, bool) and bool not in self.types):
            raise TypeError(f"{name} is {self.words}; got {typed(value)}.")
        if not self.holds(value):
            raise ValueError(f"{name} is {self.words}; got {shown(value)}.")
        return value

    @property
    def or_none(self) -> Rule:
        holds = self.holds
        return replace(
            self,
            words=f"None or {self.words}",
            types=(*self.types, type(None)),
            holds=lambda value: value is None or holds(value),
        )


def whole(least: int, most: int | None = None) -> Rule:
    words = f"{least} or more" if most is None else f"{least} to {most:,}"
    return Rule(f"a whole number, {words}", (int,), lambda value: least <= value and (most is None or value <= most))


def instance(kind: type[Any], words: str) -> Rule:
    return Rule(words, (kind,))


@dataclass(frozen=True)
class _Several(Rule):
    """A tuple or list whose items keep a rule; it becomes a tuple, which can be hashed."""

    each: Rule = Rule("", ())
    counts: tuple[int, ...] = ()

    def checked(self, name: str, value: Any) -> Any:
        found = super().checked(name, value)
        if found is None:
            return None
        try:
            items = tuple(self.each.checked("", item) for item in found)
        except (TypeError, ValueError):
            items = None
        if items is None or (self.counts and len(items) not in self.counts):
            raise ValueError(f"{name} is {self.words}; got {shown(value)}.")
        return items


def several(each: Rule, words: str, count: int | None = None) -> Rule:
    """A tuple or list whose items keep a rule, made a tuple."""
    return _Several(words, (tuple, list), each=each, counts=() if count is None else (count,))


def _is_path(path: str | os.PathLike[str]) -> bool:
    return bool(os.fspath(path)) and "\0" not in str(path)


def _is_folder(path: str | os.PathLike[str]) -> bool:
    return _is_path(path) and (not os.path.exists(path) or os.path.isdir(path))


Flag = Annotated[bool, Rule("True or False", (bool,))]
Text = Annotated[str, Rule("text that is not empty", (str,), lambda value: bool(value.strip()))]
Count = Annotated[int, whole(1)]
Number = Annotated[int, whole(0)]
Whole = Annotated[int, Rule("a whole number", (int,))]
Seed = Annotated[int, whole(0, 2**63 - 1)]
Counts = Annotated[tuple[int, ...], several(whole(1), "a tuple of whole numbers, each 1 or more")]
Texts = Annotated[
    tuple[str, ...],
    several(Rule("", (str,), lambda value: bool(value.strip())), "a tuple of texts, none of them empty"),
]
Share = Annotated[float, Rule("the share removed, a number in [0, 1)", (int, float))]  # select.check_share: its range
Probability = Annotated[float, Rule("a probability, a number in [0, 1)", (int, float), lambda value: 0 <= value < 1)]
Positive = Annotated[float, Rule("a positive number that is finite", (int, float), lambda value: 0 < value < math.inf)]
Finite = Annotated[float, Rule("a finite number, 0 or more", (int, float), lambda value: 0 <= value < math.inf)]
PLAIN = Rule(
    "text, a finite number, True, False, None or a tuple of them, which a record can hold",
    (str, int, float, bool, type(None)),
    lambda value: not isinstance(value, float) or math.isfinite(value),
)
PathLike = Annotated[
    Path, Rule("the path of a file", (str, os.PathLike), lambda path: _is_path(path) and not os.path.isdir(path))
]
AnyPath = Annotated[Path, Rule("a path", (str, os.PathLike), _is_path)]
Folder = Annotated[Path, Rule("the path of a folder, which may be new", (str, os.PathLike), _is_folder)]
FUNCTION = Rule("a function to be called", (Callable,))  # type: ignore[arg-type]


def arguments(function: Callable[P, R]) -> Callable[P, R]:
    """The function, refusing arguments that it does not have or that break the rules of its annotations."""

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        found = bound(function, *args, **kwargs)
        return function(*found.args, **found.kwargs)

    return checked


def bound(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> inspect.BoundArguments:
    """The arguments with which the function may be called; TypeError or ValueError for others."""
    signature, name = inspect.signature(function), function.__qualname__
    for asked in kwargs:
        if asked not in signature.parameters:
            raise TypeError(unknown(f"argument of {name}", asked, signature.parameters))
    try:
        found = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{name}: {error}.") from None
    for asked, rule in _rules(function).items():
        if asked in found.arguments:
            found.arguments[asked] = rule.checked(f"{name}: {asked}", found.arguments[asked])
    return found


def fields(thing: Any) -> None:
    """Check the fields of a dataclass, frozen or not."""
    kind: Any = type(thing)
    for name, rule in _rules(kind).items():
        value = getattr(thing, name)
        found = rule.checked(f"{kind.__name__}: {name}", value)
        if found is not value:
            object.__setattr__(thing, name, found)


def choice(name: str, value: Any, known: Iterable[str]) -> None:
    """ValueError with the nearest names for a value that is not known."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(unknown(name, value, known))


def mapping(name: str, value: Any, words: str) -> None:
    """TypeError for what has no keys."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} is {words}; got {typed(value)}.")


def shown(value: Any) -> str:
    """On one line, and not long."""
    text = " ".join(repr(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def typed(value: Any) -> str:
    """The value with its type, e.g. `'8' (str)`; of a class that it is one."""
    if isinstance(value, type):
        return f"the class {value.__name__} itself"
    return "None" if value is None else f"{shown(value)} ({type(value).__name__})"


@functools.cache
def _rules(thing: Any) -> dict[str, Rule]:
    hints = typing.get_type_hints(thing, include_extras=True)
    found = {name: _rule(hint) for name, hint in hints.items() if name != "return"}
    return {name: rule for name, rule in found.items() if rule}


def _rule(hint: Any) -> Rule | None:
    """That of an annotation, also of one that None may stand for."""
    for part in (hint, *typing.get_args(hint)):
        for said in getattr(part, "__metadata__", ()):
            if isinstance(said, Rule):
                return said.or_none if type(None) in typing.get_args(hint) else said
    return None
