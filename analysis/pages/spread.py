"""How far a method's perplexity and mask move with the order of its calibration windows, their draw and their text.

The order moves nothing but rounding, so differences within its spread mean nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from typing import Any

import pandas as pd

from analysis.rows import Row
from analysis.tables.markdown import marked
from analysis.tables.notes import title
from experiments.labels import setting
from experiments.measures.asked import MaskSample
from experiments.spec import Perplexity, Table, Windows
from pruners.interface.suggest import UsageError

AXES = {"order": "order of the windows", "seed": "draw of the windows", "corpus": "text"}
FIXED = {"seed": "seed {}", "order": "order {}", "count": "{} windows", "length": "{} tokens each"}
NOTE = (
    "Each line compares cells that differ in this alone, with what they share beside it. Masks agree where both keep a "
    "weight or both remove it (of structured methods: a row of queries, keys, values, gate or up), at places that are "
    "the same in every cell: mean and lowest of all pairs; 1 where the masks are equal in every bit, — where they were "
    "not kept."
)


def page(table: Table, rows: Sequence[Row]) -> str:
    """Markdown; UsageError where no two measured cells differ in their calibration windows alone."""
    told = [line for line, _ in lines(rows)]
    if not told:
        raise UsageError(
            f"No two measured cells of {table.name} differ only in the order, draw or text of their calibration "
            "windows; run more of them, or another table (embedded.order, embedded.sources)."
        )
    frame = marked(pd.DataFrame(told), words=list(told[0]))
    return "\n\n".join([f"**{title(table, rows)}** (`{table.name}`)", frame, NOTE]) + "\n"


def tells_more_than_seeds(rows: Sequence[Row]) -> bool:
    """Whether any two cells differ in the order or the text of their windows alone: what seeds do, ± says."""
    return any(axis != "seed" for axis, *_ in _along(rows))


def lines(rows: Sequence[Row]) -> list[tuple[dict[str, str], list[Row]]]:
    """Each with the cells that it compares; none where no two measured cells differ in their windows alone.

    A model that all have in common stands in the title, a protocol in the head of the perplexities.
    """
    told = [
        line for axis, cells, group in _along(rows) for line in _told(cells, AXES[axis], _fixed(cells[0], axis, group))
    ]
    same = [name for name in ("Model", "Measured") if len({line[name] for line, _ in told}) == 1]
    heads = {"Perplexity": f"perplexity {told[0][0]['Measured']}"} if "Measured" in same else {}
    return [
        ({heads.get(name, name): text for name, text in line.items() if name not in same}, cells)
        for line, cells in told
    ]


def _alike(rows: Sequence[Row]) -> list[list[Row]]:
    """Measured cells that differ in their windows alone."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        if row.record and row.run.windows:
            groups.setdefault(replace(row.run, windows=None), []).append(row)
    return list(groups.values())


def _along(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row], list[Row]]]:
    """An axis, cells that differ in it alone, and all that differ from them in their windows alone."""
    for group in _alike(rows):
        for axis in AXES:
            along: dict[str, list[Row]] = {}
            for row in group:
                along.setdefault(repr(_without(row.run.windows, axis)), []).append(row)
            yield from ((axis, cells, group) for cells in along.values() if len(cells) > 1)


def _told(cells: list[Row], words: str, fixed: str) -> Iterator[tuple[dict[str, str], list[Row]]]:
    first = cells[0]
    for what in first.run.measures:
        if isinstance(what, Perplexity):
            line = {
                "Model": first.run.model_name,
                "Method": " / ".join(dict.fromkeys(row.method for row in cells)),
                "Setting": setting(first.run.method),
                "What varies": words,
                "At": fixed,
                "Cells": str(len(cells)),
                **_perplexities(what.key, cells),
                "Masks agree": _agreement(cells),
            }
            yield line, cells


def _fixed(row: Row, axis: str, group: Sequence[Row]) -> str:
    """What these cells share of their windows, where others of the group have something else."""
    here, everywhere = _without(row.run.windows, axis), [_without(one.run.windows, axis) for one in group]
    moving = [name for name in here if len({repr(one[name]) for one in everywhere}) > 1]
    return ", ".join(FIXED.get(name, "{}").format(here[name]) for name in moving if here[name] is not None) or "—"


def _without(windows: Windows | None, axis: str) -> dict[str, Any]:
    return {name: value for name, value in asdict(windows).items() if name != axis} if windows else {}


def _perplexities(key: str, along: Sequence[Row]) -> dict[str, str]:
    found = [told["perplexity"] for row in along if (told := row.measure(key))]
    mean = statistics.fmean(found)
    return {
        "Measured": key,
        "Perplexity": f"{mean:,.3f}",
        "Lowest to highest": f"{min(found):,.3f} to {max(found):,.3f}",
        "Standard deviation, %": f"{100 * statistics.stdev(found) / mean:.3f}",
    }


def _agreement(along: Sequence[Row]) -> str:
    from eval.mask_sample import agreement

    key = next((what.key for what in along[0].run.measures if isinstance(what, MaskSample)), "")
    masks = [told for row in along if (told := row.measure(key))]
    shares = [agreement(*pair) for pair in combinations(masks, 2)]
    known = [share for share in shares if share is not None]
    return f"{statistics.fmean(known):.5f}, {min(known):.5f}" if known else "—"
