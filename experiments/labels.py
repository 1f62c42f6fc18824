"""Readable names of a cell: a method's label (`GBLM l1`) and its setting (`50 %`, `2:4`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from itertools import chain
from typing import Any

from experiments import recovery
from experiments.data.sources import SOURCES
from experiments.spec import Run
from experiments.store.described import digest
from pruners.interface import checks
from pruners.interface.suggest import UsageError

SETTINGS = ("sparsity", "pattern", "ratio", "target_parameters")
COLUMNS = ("model", "windows", "measures", "dtype", *(f"method.{name}" for name in SETTINGS))  # what a setting tells
COUNTED = {"count": "window", "length": "token"}
REORDERED = "windows reordered"
WRITTEN = [name for name, source in SOURCES.items() if source.written]  # drawn by a model, however it is sampled


def labels(runs: Sequence[Run], label: Callable[[Run], tuple[str, str]] | None = None) -> list[tuple[str, str]]:
    """(method, setting) of every run, in the words of `label` where a table has them.

    Otherwise a hyperparameter is named where it differs from its default or between the table's runs of the same
    method.  UsageError for words that are no such pair.
    """
    if label:
        return [_pair(label(run)) for run in runs]
    varying = _varying([run.method for run in runs if run.method is not None])
    return [(_method(run.method, varying) + _stages(run), setting(run.method)) for run in runs]


def _pair(words: Any) -> tuple[str, str]:
    if not isinstance(words, tuple) or len(words) != 2 or not all(isinstance(word, str) for word in words):
        raise UsageError(f"label gives two texts, for the method and its setting; got {checks.typed(words)}.")
    return words


def distinct(runs: Sequence[Run], named: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """`named`, and where several experiments on one model have the same name, what differs between them behind it."""
    alike: dict[tuple[str, tuple[str, str]], list[int]] = {}
    for place, (run, name) in enumerate(zip(runs, named, strict=True)):
        alike.setdefault((run.model_name, name), []).append(place)
    told = list(named)
    for places in alike.values():
        if len({experiment(runs[place]) for place in places}) > 1:
            fields = [_fields(runs[place]) for place in places]
            differ = [name for name in dict.fromkeys(chain(*fields)) if len({repr(f.get(name)) for f in fields}) > 1]
            for place, values in zip(places, fields, strict=True):
                told[place] = _named(runs[place], named[place], {name: values.get(name) for name in differ})
    return told


def experiment(run: Run) -> str:
    """Equal for runs that differ in nothing but their seeds, and so are draws of one number."""
    return digest({**_seedless(run.spec()), "model": run.model})  # folders of one name are several models


def _seedless(told: Any) -> Any:
    """Of reordered windows every order, of which the one as drawn is none."""
    if isinstance(told, dict):
        kept = {name: _seedless(value) for name, value in told.items() if name != "seed"}
        return {**kept, "order": REORDERED} if "corpus" in kept and kept.get("order") is not None else kept
    return [_seedless(value) for value in told] if isinstance(told, list) else told


def _fields(run: Run) -> dict[str, Any]:
    """What tells experiments apart, by names such as `windows.count`."""
    told = {**_seedless(run.spec()), "model": run.model}
    keys = [[what.key] if what.key in what.keys else what.keys for what in run.measures]
    told["measures"] = {key: key for key in chain(*keys)}
    return dict(_leaves("", told))


def _leaves(name: str, told: Any) -> Iterator[tuple[str, Any]]:
    if not isinstance(told, dict):
        yield name, told
        return
    for part, value in told.items():
        yield from _leaves(f"{name}.{part}" if name else part, value)


def _named(run: Run, name: tuple[str, str], differing: dict[str, Any]) -> tuple[str, str]:
    method, setting = [name[0]], [name[1]]
    for field, value in differing.items():
        of_setting = {field, field.partition(".")[0]} & set(COLUMNS) and run.method is not None
        (setting if of_setting else method).append(_said(field, value))
    return ", ".join(filter(None, method)), ", ".join(filter(None, setting))


def _said(field: str, value: Any) -> str:
    """E.g. `16 windows` or `learning rate 0.01`; empty for what a run does not have."""
    stage, _, name = field.partition(".")
    if value is None or value is False:
        return ""
    if stage == "windows":
        return f"{value} {COUNTED[name]}{'s' * (value != 1)}" if name in COUNTED else str(value)
    if value is True:
        return (name or stage).replace(".", " ").replace("_", " ")
    words = "" if stage == "measures" else name.removesuffix("name").replace(".", " ").replace("_", " ")
    return " ".join(filter(None, [words.strip(), str(value)]))


def _stages(run: Run) -> str:
    """What follows pruning."""
    return recovery.label(run.recovery) + (" + LLM.int8" if run.quantised else "")


def setting(method: Any) -> str:
    """`2:4` for a pattern, otherwise the asked share, e.g. `50 %`; empty for the dense model."""
    if pattern := getattr(method, "pattern", None):
        return str(pattern)
    return "" if method is None else f"{100 * method.asked:g} %"


def calibration(run: Run) -> str:
    """E.g. `c4/train 128 x 2048 documents, seed 0`; `none` where no text is read."""
    windows = run.windows
    if not windows or not run.calibrates:
        return "none"
    order = "" if windows.order is None else f", order {windows.order}"
    return f"{windows.corpus} {windows.count} x {windows.length} {windows.sampling}, seed {windows.seed}{order}"


def full(label: tuple[str, str]) -> str:
    """Both parts as one, e.g. `GBLM l1 50 %`."""
    return " ".join(part for part in label if part)


def seed(run: Run) -> int | None:
    """Of what is drawn for a cell: its calibration text, its groups or mask, or the order of its training text."""
    return seed_of(run.spec())


def seed_of(spec: Mapping[str, Any]) -> int | None:
    """The same of a run as its record tells it."""
    part = drawn_part(spec)
    return None if part is None else int(spec[part]["seed"])


def drawn_part(spec: Mapping[str, Any]) -> str | None:
    """Of which part of the spec the seed is; None of a cell for which nothing is drawn."""
    windows, method, after = (spec.get(part) or {} for part in ("windows", "method", "recovery"))
    if windows and (windows["sampling"] != "first" or windows["corpus"] in WRITTEN):
        return "windows"
    if "seed" in method and method.get("importance", "random") == "random":
        return "method"
    return "recovery" if after.get("seed") is not None else None


def apart(runs: Sequence[Run], words: Sequence[tuple[str, str]]) -> list[str]:
    """One name a run: its words in full, and where several have the same their models, seeds and orders of windows."""
    named = [full(label) for label in words]
    for tell in (lambda run: run.model_name, _seeded, _ordered):
        same: dict[str, set[str]] = {}
        for name, run in zip(named, runs, strict=True):
            same.setdefault(name, set()).add(tell(run))
        named = [
            f"{name}, {tell(run)}" if len(same[name]) > 1 and tell(run) else name
            for name, run in zip(named, runs, strict=True)
        ]
    return named


def beside_model(label: str, model: str) -> str:
    """As `apart`, for a reader who sees the model beside it."""
    return label.replace(f", {model}", "", 1)


def _seeded(run: Run) -> str:
    drawn = seed(run)
    return "" if drawn is None else f"seed {drawn}"


def _ordered(run: Run) -> str:
    return "" if run.windows is None or run.windows.order is None else f"order {run.windows.order}"


def _method(method: Any, varying: set[tuple[type, str]]) -> str:
    if method is None:
        return "Dense"
    shown = [field for field in _hyperparameters(method) if _is_shown(field, method, varying)]
    return " ".join([type(method).__name__, *(_value(field.name, getattr(method, field.name)) for field in shown)])


def _is_shown(field: Field[Any], method: Any, varying: set[tuple[type, str]]) -> bool:
    value = getattr(method, field.name)
    return (type(method), field.name) in varying or (field.default is not MISSING and value != field.default)


def _varying(methods: Sequence[Any]) -> set[tuple[type, str]]:
    seen: dict[tuple[type, str], set[str]] = {}
    for method in methods:
        for field in _hyperparameters(method):
            seen.setdefault((type(method), field.name), set()).add(repr(getattr(method, field.name)))
    return {key for key, values in seen.items() if len(values) > 1}


def _hyperparameters(method: Any) -> list[Field[Any]]:
    return [field for field in fields(method) if field.name not in (*SETTINGS, "seed")]


def _value(name: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{name}={value}"
