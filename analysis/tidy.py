"""Every record of one or several results folders as one tidy table: a row for each measured value.

import analysis
frame = analysis.frame("results", "/data/of-a-colleague")
frame[frame.metric == "perplexity"].groupby(["model", "label", "setting"]).value.agg(["mean", "std"])
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.tables.frames import QUANTITIES
from experiments import papers
from experiments.labels import distinct, labels, seed_of
from experiments.store import found, records
from experiments.store.keys import run_key, stable_key
from experiments.store.records import Record
from pruners.interface.suggest import UsageError

Labels = Mapping[str, tuple[str, str]]
WRITERS = {".csv": "to_csv", ".parquet": "to_parquet"}


def frame(*results: Path | str, data_dir: Path | None = None) -> pd.DataFrame:
    """A row for each value of each trustworthy record under the results folders (default: `results`).

    Columns: `results` (the folder), `table`, `id`; `label` and `setting`, the paper's words for the cell (empty for a
    table that is not declared here); `model`, `dtype`, `method` and its hyperparameters `method.NAME`; `recovery` and
    its fields `recovery.NAME`; calibration `windows.NAME`; `seed`; `sparsity` (the share removed); `measure` (the
    protocol key), `metric`, `value`, `standard_error` (in the value's unit); the cell's cost, `seconds` and
    `peak_bytes`; `device`, `commit`, `dirty`, `code` (digest of the source that made it, if recorded), `made_at`.

    Rehearsals are left out, with `data_dir` also records of other texts than lie there.  Raises FileNotFoundError for a
    folder without records.
    """
    rows = [row for root in results or ("results",) for row in _folder(Path(root), data_dir)]
    return pd.DataFrame(rows)


def write(made: pd.DataFrame, path: Path) -> Path:
    """As CSV or Parquet, by the name's ending; UsageError for another one and for a folder that is not there."""
    refuse_place(path)
    getattr(made, WRITERS[path.suffix])(path, index=False)
    return path


def refuse_place(path: Path) -> None:
    if path.suffix not in WRITERS:
        raise UsageError(f"{path} ends in {path.suffix or 'nothing'}; a table is written as {' or '.join(WRITERS)}.")
    if not path.parent.is_dir():
        raise UsageError(f"{path} would lie in {path.parent}, which is no folder; make it, or correct the path.")


def _folder(root: Path, data_dir: Path | None) -> Iterator[dict[str, Any]]:
    for folder in records.folders(root):
        known = _labels(folder.name)
        for record in records.load(root, folder.name).values():
            if record.spec.get("rehearsal") or (data_dir and found.other_data(record, data_dir)):
                continue
            yield from _values(record, {"results": str(root), **_cell(record, known)})


def _labels(table: str) -> Labels:
    """By `stable_key` what a reader calls each declared cell of the table; empty for a table of another project."""
    declared = papers.TABLES.get(table)
    if declared is None:
        return {}
    runs = declared.runs()
    return dict(zip(map(run_key, runs), distinct(runs, labels(runs, declared.label)), strict=True))


def _cell(record: Record, known: Labels) -> dict[str, Any]:
    spec, made_by = record.spec, record.made_by
    label, setting = known.get(stable_key(spec), ("", ""))
    windows = spec["windows"] or {}
    return {
        "table": record.table,
        "id": record.id,
        "label": label,
        "setting": setting,
        "model": spec["model"]["name"],
        "dtype": spec["dtype"],
        **_flat("method", spec["method"] or {"name": "dense"}),
        **_flat("recovery", spec.get("recovery") or {}),
        **{f"windows.{name}": value for name, value in windows.items()},
        "seed": seed_of(spec),
        "sparsity": record.sparsity,
        "seconds": record.cost.seconds.get("total"),
        "peak_bytes": record.cost.peak_bytes,
        "device": made_by.device,
        "commit": made_by.commit,
        "dirty": made_by.dirty,
        "made_at": made_by.at,
    }


def _flat(name: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """A described method or recovery: its name, then its hyperparameters, nested ones as JSON."""
    values = {f"{name}.{key}": json.dumps(v) if isinstance(v, dict | list) else v for key, v in described.items()}
    return {name: values.pop(f"{name}.name", None), **values}


def _values(record: Record, cell: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for key, measured in record.measures.items():
        for quantity in QUANTITIES:
            if measured.get(quantity.name) is not None:
                error = measured.get(quantity.error) if quantity.error else None
                yield {
                    **cell,
                    "measure": key,
                    "metric": quantity.name,
                    "value": measured[quantity.name],
                    "standard_error": error,
                }
