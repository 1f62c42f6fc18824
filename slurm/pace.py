"""Time that cells really take, from records: measured over estimated seconds, by kind of cell, on one GPU type.

A profile that names its `card` asks for MARGIN times the median of ENOUGH records or more of the same kind of cell,
whatever their table and model; for other kinds for `estimate.SAFETY` times the estimate.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from experiments import cells, papers
from experiments.cells import Cell
from experiments.store import records
from experiments.store.records import Record
from slurm import estimate
from slurm.profile import Profile

MARGIN = 1.5
ENOUGH = 3


def measured(profile: Profile, root: Path) -> tuple[Profile, list[str]]:
    """The profile with what records under `root` tell of its card, and a line for each kind of cell that they tell of.

    Records of starts that were broken off count only what came after, so they are left out.
    """
    if profile.card is None:
        return profile, []
    ratios: dict[str, list[float]] = defaultdict(list)
    for cell, record in _made(root):
        if profile.card.lower() in record.made_by.device.lower() and not record.resumed:
            expected = estimate.seconds([cell], profile, record.made_by.processes)
            ratios[estimate.kind(cell)].append(record.cost.seconds["total"] / expected)
    times = {kind: MARGIN * median(found) for kind, found in ratios.items() if len(found) >= ENOUGH}
    lines = [
        f"Time limit for {kind}: {times[kind]:.2g} times the estimate, {MARGIN} x the median of "
        f"{len(ratios[kind])} records "
        f"on {profile.card}."
        for kind in sorted(times)
    ]
    return profile.with_times(times), lines


def _made(root: Path) -> Iterator[tuple[Cell, Record]]:
    """The cells of the papers' tables that have a record."""
    for name, table in papers.TABLES.items():
        if known := records.load(root, name) if records.folder(root, name).is_dir() else {}:
            found = cells.cells(table.runs(), table)
            yield from ((cell, known[cell.id]) for cell in found if cell.id in known)
