"""Figures of what pruning left inside: heads and channels by block, retraining curves, accuracy by parameters."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.charts import canvas, look, refuse_few
from analysis.figures import STYLE
from analysis.rows import Row
from analysis.verdicts import Cell
from experiments.spec import Table


def kept(table: Table, rows: Sequence[Row]) -> Figure:
    """Heads and MLP channels that stay in each block, as shares of the dense block; ValueError for one block."""
    done = {row.label: row.record.achieved["structure"] for row in rows if row.record and _structure(row)}
    blocks = max((len(told["after"]["blocks"]) for told in done.values()), default=0)
    refuse_few(blocks, "blocks of a structured model", table)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 5.0), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
    for axes, kind in zip(panels, ("heads", "channels"), strict=True):
        for index, (label, told) in enumerate(done.items()):
            pairs = zip(told["before"]["blocks"], told["after"]["blocks"], strict=False)
            shares = [100 * after[kind] / before[kind] for before, after in pairs if before[kind]]
            axes.plot(range(len(shares)), shares, label=label, **look(index))
        axes.set(ylabel=f"{kind} kept, %", ylim=(-3, 103))
        axes.grid(color="0.92")
    panels[0].set_title(table.title, loc="left", fontsize=10)
    panels[0].legend(frameon=False, fontsize=8)
    panels[1].set_xlabel("block")
    panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def losses(table: Table, rows: Sequence[Row]) -> Figure:
    """Loss by step of every retrained cell; ValueError where none took two steps."""
    curves = {row.label: row.record.achieved["recovery"]["losses"] for row in rows if row.record and _recovery(row)}
    refuse_few(max(map(len, curves.values()), default=0), "steps of retraining", table)
    figure, axes = canvas(table.title)
    for index, (label, curve) in enumerate(curves.items()):
        axes.plot(range(1, len(curve) + 1), curve, label=label, color=look(index)["color"], linewidth=1.2)
    axes.set(xlabel="step of retraining", ylabel="loss, nats per token")
    axes.legend(frameon=False, fontsize=8)
    return figure


def steps(table: Table, rows: Sequence[Row]) -> Figure:
    """Perplexity by the step at which retraining was left, a line a protocol key; ValueError for fewer than two steps.

    Of several models and methods the first; step 0 is the pruned model.
    """
    pruned = [row for row in rows if row.record and row.run.method is not None]
    done = [row for row in pruned if (row.run.model, row.method) == (pruned[0].run.model, pruned[0].method)]
    refuse_few(len({_step(row) for row in done}), "steps of retraining", table)
    figure, axes = canvas(f"{table.title}: {Path(done[0].run.model).name}")
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
    axes.legend(frameon=False, fontsize=8)
    return figure


def _step(row: Row) -> int:
    recovery = (row.record.spec.get("recovery") if row.record else None) or {}
    return int(recovery.get("stop", recovery.get("steps", 0)))


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
