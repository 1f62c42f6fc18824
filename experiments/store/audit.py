"""Checks that the records of a results folder, a colleague's for instance, are valid, and which cells they fill.

python -m experiments check-records DIR
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments import papers
from experiments.store import records
from experiments.store.keys import run_key, stable_key
from experiments.store.records import BadRecordError, Failure, Record


@dataclass
class Audit:
    """`faults` are sentences, one a file that cannot be believed or a value that cannot be; `filled` counts, by table,
    the declared cells that have a record, of how many; `strange` are tables that are not declared here, with how many
    records each."""

    records: int = 0
    faults: list[str] = field(default_factory=list)
    filled: dict[str, tuple[int, int]] = field(default_factory=dict)
    strange: dict[str, int] = field(default_factory=dict)


def audit(root: Path) -> Audit:
    """Of every record under `root`; FileNotFoundError where there is none."""
    found = Audit()
    for folder in records.folders(root):
        believed = [record for path in _paths(folder) if (record := _believed(path, found)) is not None]
        found.records += len(believed)
        for record in believed:
            found.faults += [f"{folder.name}/{record.id}: {fault}" for fault in faults(record)]
        _fill(found, folder.name, believed)
    return found


def faults(record: Record) -> Iterator[str]:
    """What cannot be in a record that this program made, a sentence each."""
    if not 0 <= record.achieved.get("sparsity", 0.0) <= 1:
        yield f"a sparsity of {record.achieved['sparsity']}, which is not between 0 and 1."
    for key, measured in record.measures.items():
        yield from (f"{key}: {fault}" for fault in _impossible(measured))
    if not record.measures:
        yield "nothing was measured."
    if record.made_by.commit is None:
        yield "made by code without a known commit."


def _impossible(measured: Mapping[str, Any]) -> Iterator[str]:
    value = measured.get("perplexity")
    if value is not None and not (math.isfinite(value) and value >= 1):
        yield f"a perplexity of {value}; it is 1 or more."
    elif value is not None and (windows := measured.get("nll_per_window")):
        mean = math.exp(sum(windows) / len(windows))
        if not math.isclose(mean, value, rel_tol=1e-3):
            yield f"a perplexity of {value:.4f}, but its own windows give {mean:.4f}."
    if (score := measured.get("score")) is not None and not 0 <= score <= 1:
        yield f"an accuracy of {score}, which is not between 0 and 1."


def _paths(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if not path.name.endswith(Failure.suffix))


def _believed(path: Path, found: Audit) -> Record | None:
    try:
        return records.read(path)
    except BadRecordError as error:
        found.faults.append(f"{path.parent.name}/{path.name}: {str(error).partition(': ')[2] or error}")
        return None


def _fill(found: Audit, name: str, believed: list[Record]) -> None:
    table = papers.TABLES.get(name)
    if table is None:
        found.strange[name] = len(believed)
        return
    asked, had = [run_key(run) for run in table.runs()], {stable_key(record.spec) for record in believed}
    found.filled[name] = (sum(key in had for key in asked), len(asked))
