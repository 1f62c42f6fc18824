"""Readable names of a cell: a method's label (`GBLM l1`) and its setting (`50 %`, `2:4`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

from experiments import recovery
from experiments.spec import Run

SETTINGS = ("sparsity", "pattern", "ratio", "target_parameters")


def labels(runs: Sequence[Run], label: Callable[[Run], tuple[str, str]] | None = None) -> list[tuple[str, str]]:
    """(method, setting) of every run, in the words of `label` where a table has them.

    Otherwise a hyperparameter is named where it differs from its default or between the table's runs of the same
    method.
    """
    if label:
        return [label(run) for run in runs]
    varying = _varying([run.method for run in runs if run.method is not None])
    return [(_method(run.method, varying) + _stages(run), setting(run.method)) for run in runs]


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
    """Of what is drawn for a cell: its calibration text, its groups, or the order of its training text."""
    if run.windows and run.windows.sampling != "first":
        return run.windows.seed
    if getattr(run.method, "importance", None) == "random":
        return int(run.method.seed)
    return getattr(run.recovery, "seed", None)


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
    return [field for field in fields(method) if field.name not in SETTINGS]


def _value(name: str, value: Any) -> str:
    return value if isinstance(value, str) else f"{name}={value}"
