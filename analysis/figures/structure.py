"""Figures of what pruning left inside: heads and channels by block, retraining curves, accuracy by parameters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.compare import Cell
from analysis.figures.perplexity import LINES, UndrawableError, grid, legend, look
from analysis.figures.sweeps import canvas, refuse_few
from analysis.rows import Row
from experiments.spec import Table


def kept(table: Table, rows: Sequence[Row]) -> Figure:
    """Heads and MLP channels that stay in each block, as shares of the dense block, a line of panels a setting.

    Of several models and seeds the first; ValueError for one block.
    """
    done = _first([row for row in rows if _structure(row)])
    blocks = max((len(_told(row)["after"]["blocks"]) for row in done), default=0)
    refuse_few(blocks, "blocks of a structured model", table)
    settings, methods = (list(dict.fromkeys(getattr(row, name) for row in done)) for name in ("setting", "method"))
    figure, panels = grid(_title(table, done), 2 * len(settings), (3.6, 2.2), sharex=True)
    for index, axes in enumerate(panels):
        setting, kind = settings[index // 2], ("heads", "channels")[index % 2]
        for row in (row for row in done if row.setting == setting):
            shares = _shares(row, kind)
            line = methods.index(row.method)
            marks = {"markevery": (line % len(shares), len(methods)), "linestyle": LINES[line % len(LINES)]}
            axes.plot(range(len(shares)), shares, label=row.method, **look(line) | marks)  # equal lines stay visible
        axes.set_title(f"{kind} kept at {setting}, %", loc="left", fontsize=9)
        axes.set_ylim(-3, 103)
        axes.grid(color="0.92")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in panels[-2:]:
        axes.set_xlabel("block")
    legend(figure, panels)
    return figure


def losses(table: Table, rows: Sequence[Row]) -> Figure:
    """Loss by step of every retrained cell, a panel a setting; ValueError where none took two steps.

    Of several models and seeds the first.
    """
    done = _first([row for row in rows if _recovery(row)])
    refuse_few(max((len(_curve(row)) for row in done), default=0), "steps of retraining", table)
    settings, methods = (list(dict.fromkeys(getattr(row, name) for row in done)) for name in ("setting", "method"))
    figure, panels = grid(_title(table, done), len(settings), (4.2, 2.8))
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
        raise UndrawableError(f"Several cells of {table.name} stand at step {twice[0]}; a line has one value a step.")
    figure, axes = canvas(f"{table.title}: {done[0].run.model_name}")
    keys = [key for key, value in (done[0].record.measures if done[0].record else {}).items() if "perplexity" in value]
    for index, key in enumerate(keys):
        points = sorted((_step(row), (row.measure(key) or {})["perplexity"]) for row in done if row.measure(key))
        axes.plot(*zip(*points, strict=True), label=key, **look(index))
    axes.set(xlabel="step of retraining", ylabel="perplexity")
    axes.legend(frameon=False, fontsize=8)
    return figure


def by_parameters(table: Table, found: Sequence[Cell]) -> Figure:
    """Mean accuracy over the parameters that are left, a marker a method; ValueError for fewer than two cells."""
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in found:
        size = _parameters(cell.rows[0])
        if cell.metric == "score" and cell.key.startswith("mean.") and cell.ours is not None and size:
            points.setdefault(cell.method, []).append((size / 1e9, 100 * cell.ours))
    refuse_few(sum(map(len, points.values())), "mean accuracies of models with known sizes", table)
    figure, axes = canvas(table.title)
    for index, (method, pairs) in enumerate(points.items()):
        axes.plot(*zip(*sorted(set(pairs)), strict=True), label=method, **look(index))
    axes.set(xlabel="parameters, billions", ylabel="mean accuracy, %")
    legend(figure, [axes])
    return figure


def _first(rows: Sequence[Row]) -> list[Row]:
    """Of the first model, and of the runs that differ in their seed the first."""
    found: dict[tuple[str, str], Row] = {}
    for row in (row for row in rows if row.run.model == rows[0].run.model):
        found.setdefault((row.method, row.setting), row)
    return list(found.values())


def _title(table: Table, done: Sequence[Row]) -> str:
    return f"{table.title}: {done[0].run.model_name}"


def _told(row: Row) -> dict[str, Any]:
    return row.record.achieved["structure"] if row.record else {}


def _shares(row: Row, kind: str) -> list[float]:
    pairs = zip(_told(row)["before"]["blocks"], _told(row)["after"]["blocks"], strict=False)
    return [100 * after[kind] / before[kind] for before, after in pairs if before[kind]]


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


def _structure(row: Row) -> bool:
    return row.record is not None and bool(row.record.achieved.get("structure"))


def _recovery(row: Row) -> bool:
    return row.record is not None and "losses" in (row.record.achieved.get("recovery") or {})


def _parameters(row: Row) -> float | None:
    if row.record is None:
        return None
    counted = (measured.get("parameters") for measured in row.record.measures.values())
    left = row.record.achieved["structure"]["after"]["size"]["model"] if _structure(row) else None
    return next((count for count in counted if count), left)
