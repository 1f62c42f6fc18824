"""Retraining by step: the loss, and the perplexity where the schedule was stopped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from matplotlib.figure import Figure

from analysis.figures.style import (
    LINES,
    UndrawableError,
    canvas,
    first_of_each,
    grid,
    legend,
    look,
    refuse_few,
    title_of_first,
)
from analysis.rows import Row
from experiments.spec import Table


def losses(table: Table, rows: Sequence[Row]) -> Figure:
    """Loss by step of every retrained cell, a panel a setting; ValueError where none took two steps.

    Of several models and seeds the first.
    """
    done = first_of_each([row for row in rows if _recovery(row)])
    refuse_few(max((len(_curve(row)) for row in done), default=0), "steps of retraining", table)
    settings, methods = (list(dict.fromkeys(getattr(row, name) for row in done)) for name in ("setting", "method"))
    figure, panels = grid(title_of_first(table, done), len(settings), (4.2, 2.8))
    for setting, axes in zip(settings, panels, strict=True):
        for row in (row for row in done if row.setting == setting):
            index = methods.index(row.method)
            style = look(index) | {"marker": "", "linewidth": 1.1, "linestyle": LINES[index % len(LINES)]}
            axes.plot(range(1, len(_curve(row)) + 1), _curve(row), label=row.method, **style)
        axes.set_title(setting, loc="left", fontsize=9)
        axes.set(xlabel="step of retraining", ylabel="loss, nats per token")
        axes.grid(color="0.92")
    legend(figure, panels)
    return figure


def steps(table: Table, rows: Sequence[Row]) -> Figure:
    """Perplexity by the step at which retraining was left, a line a protocol key.

    Of several retrainings the first, each a model, a pruning and a schedule; step 0 is the pruned model.
    UndrawableError for fewer than two steps beside it, or where two cells stand at one.
    """
    retrained = [row for row in rows if row.record and row.run.recovery]
    done = [row for row in rows if row.record and _is_of(row, retrained[0])] if retrained else []
    counted = Counter(map(_step, done))
    refuse_few(sum(step > 0 for step in counted), "steps of retraining", table)
    if twice := [step for step, count in counted.items() if count > 1]:
        raise UndrawableError(f"Several cells of {table.name} are at step {twice[0]}; a line has one value per step.")
    figure, axes = canvas(f"{table.title}: {done[0].run.model_name}")
    keys = [key for key, value in (done[0].record.measures if done[0].record else {}).items() if "perplexity" in value]
    for index, key in enumerate(keys):
        points = sorted((_step(row), (row.measure(key) or {})["perplexity"]) for row in done if row.measure(key))
        axes.plot(*zip(*points, strict=True), label=key, **look(index))
    axes.set(xlabel="step of retraining", ylabel="perplexity")
    axes.legend(frameon=False, fontsize=8)
    return figure


def _curve(row: Row) -> list[float]:
    return row.record.achieved["recovery"]["losses"] if row.record else []


def _step(row: Row) -> int:
    recovery = (row.record.spec.get("recovery") if row.record else None) or {}
    return int(recovery.get("stop", recovery.get("steps", 0)))


def _is_of(row: Row, first: Row) -> bool:
    """Whether the row is a step of this retraining, or the pruned model from which it went out."""
    here, there = row.run.spec(), first.run.spec()
    schedules = [{**(spec.pop("recovery", None) or {}), "stop": None} for spec in (here, there)]
    return {**here, "measures": None} == {**there, "measures": None} and schedules[0] in ({"stop": None}, schedules[1])


def _recovery(row: Row) -> bool:
    return row.record is not None and "losses" in (row.record.achieved.get("recovery") or {})
