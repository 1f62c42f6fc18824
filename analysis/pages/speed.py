"""Timings of a table: prefill and decode for every shape, with quartiles, against the bandwidth lower bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pandas as pd

from analysis.rows import Row
from analysis.tables.markdown import marked
from analysis.tables.measured_notes import notes
from analysis.tables.notes import title
from experiments.spec import Efficiency, Table
from pruners.interface.suggest import UsageError


def page(table: Table, rows: Sequence[Row], again: str = "") -> str:
    """Markdown, one line a cell and shape; UsageError where the table timed nothing.

    `again` are the arguments of a command about the same cells, for notes.
    """
    lines = [line for row in rows for line in _lines(row)]
    if not lines:
        raise UsageError(f"No cell of {table.name} was timed; add `Efficiency()` to a run's measures.")
    frame = marked(pd.DataFrame(lines), words=list(lines[0]))
    return "\n\n".join([f"**{title(table, rows)}** (`{table.name}`)", frame, _listed(rows, again or table.name)]) + "\n"


def _lines(row: Row) -> list[dict[str, str]]:
    measured = [row.measure(what.key) or {} for what in row.run.measures if isinstance(what, Efficiency)]
    return [_line(row, timing, run) for found in measured if (timing := found.get("timing")) for run in timing["runs"]]


def _line(row: Row, timing: dict[str, Any], run: dict[str, Any]) -> dict[str, str]:
    return {
        "Cell": row.name,
        "Batch": str(run["batch"]),
        "Prompt": str(run["length"]),
        "Prefill, ms": _spread(run["prefill_s"]),
        "Prefill, tokens/s": f"{run['prefill_tokens_per_s']:,.0f}",
        "Decode, ms/step": _spread(run["decode_s"]),
        "Bandwidth lower bound, ms/step": f"{1000 * timing['decode_bound_s']:,.1f}",
        "Decode / bandwidth bound at that time": _to_bound(run),
        "Decode, tokens/s": f"{run['decode_tokens_per_s']:,.1f}",
        "Peak memory, GB": "—" if run["peak_bytes"] is None else f"{run['peak_bytes'] / 1e9:,.2f}",
    }


def _to_bound(run: dict[str, Any]) -> str:
    if "decode_to_bound" not in run:  # in records of before
        return "—"
    median, low, high = (f"{run['decode_to_bound'][name]:,.2f}" for name in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]{' (noisy)' if run['noisy'] else ''}"


def _spread(seconds: dict[str, float]) -> str:
    median, low, high = (f"{1000 * seconds[name]:,.1f}" for name in ("median", "q1", "q3"))
    return f"{median} [{low}, {high}]"


def _listed(rows: Sequence[Row], again: str) -> str:
    return "\n".join(f"- {note}" for note in notes(rows, again))
