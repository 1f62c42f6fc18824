"""A table at toy scale, to see every kind of its cells run from end to end minutes before days of computing.

A few cells, each on two short windows, a few steps and documents.  A rehearsed cell says so in its record, whose id is
then another one: no table, figure or claim takes it for a number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

from experiments import papers
from experiments.labels import labels
from experiments.recovery import Instructions
from experiments.spec import Run, Table

RESULTS = Path("results/rehearsal")
AT_MOST = {
    "count": 2, "length": 64, "window": 64, "limit": 2, "new_tokens": 4, "repetitions": 1, "prompts": 1,
    "steps": 4, "stop": 2, "warmup": 1, "batch_size": 2, "micro_batch_size": 1, "held_out": 4,
    "check_every": 2,
}  # fmt: skip
KEPT = {(Instructions, "length")}  # an answer stands behind its prompt, which is longer than a short window
FIRST = {"lengths": 1, "batch_sizes": 1, "rates": 2}
WHOLE = ("limit",)  # None asks for everything
_real: dict[str, Table] = {}


def use(names: Iterable[str], model: str | None = None) -> None:
    """Let these tables, and no others, be their own rehearsals from now on, on another model where one is named."""
    papers.TABLES.update(_real)
    _real.clear()
    for name in names:
        made = rehearsed(papers.TABLES[name], model)
        _real[name], papers.TABLES[name] = papers.TABLES[name], made


def rehearsed(table: Table, model: str | None = None) -> Table:
    """The first cell of every kind, and of every model, at toy scale, under the labels that they have in the table.

    On another `model` the experiment is asked for on that one, as which blocks are pruned may hang on their number.
    """
    runs = papers.runs(table, model)
    kinds: set[Any] = set()
    kept: dict[Run, None] = {}
    named: dict[Run, tuple[str, str]] = {}
    for run, label in zip(runs, labels(runs, table.label), strict=True):
        kind = (type(run.method), _way(run.recovery), run.quantised)
        if kind not in kinds or run.model not in kinds:
            kept[small(run)] = None
            named.setdefault(_pruned(small(run)), label)
        kinds |= {kind, run.model}
    return replace(
        table,
        title=f"Rehearsal of: {table.title}",
        rows=tuple(kept),
        columns=(("",),),
        run=lambda run, _: run,
        published=None,
        label=lambda run: named[_pruned(run)],
    )


def _way(recovery: Any) -> Any:
    """What a recovery trains, and what of it is code of its own."""
    if recovery is None:
        return None
    own = (getattr(recovery, name, None) for name in ("granularity", "inputs", "keep"))
    return type(recovery), recovery.trainable, *own


def small(run: Run) -> Run:
    """The same cell on little text, marked."""
    return replace(
        run,
        windows=_shrunk(run.windows),
        measures=tuple(_shrunk(what) for what in run.measures),
        recovery=_shrunk(run.recovery),
        tuning=replace(run.tuning, grid=_shrunk(run.tuning.grid)) if run.tuning else None,
        rehearsal=True,
    )


def _shrunk(thing: Any) -> Any:
    if thing is None:
        return None
    names = [field.name for field in fields(thing) if (type(thing), field.name) not in KEPT]
    return replace(thing, **{name: _less(name, getattr(thing, name)) for name in names})


def _less(name: str, value: Any) -> Any:
    if name in AT_MOST and type(value) in (int, float):
        return min(value, AT_MOST[name]) if name != "warmup" or value >= 1 else value
    if name in WHOLE and value is None:
        return AT_MOST[name]
    if name in FIRST and isinstance(value, tuple):
        return value[: FIRST[name]]
    return _shrunk(value) if is_dataclass(value) and not isinstance(value, type) else value


def _pruned(run: Run) -> Run:
    """What has a label: the cell whatever its model, its dtype and what is measured."""
    return replace(run, model="any", dtype="float32", measures=())
