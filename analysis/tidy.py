"""Every record of one or several results folders as one tidy table: a row for each measured value.

import analysis
frame = analysis.frame("results", "/data/of-a-colleague")
cell = ["table", "model", "dtype", "label", "setting", "measure"]
frame[frame.metric == "perplexity"].groupby(cell).value.agg(["mean", "std"])
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.rows import folders, holder, merged, tell_apart
from analysis.tables.frames import QUANTITIES
from experiments import papers
from experiments.labels import SETTINGS, distinct, labels, seed_of
from experiments.spec import Run
from experiments.store import code, found, records
from experiments.store.described import describe, digest
from experiments.store.keys import run_key, stable_key
from experiments.store.records import Record
from pruners.interface.suggest import UsageError
from pruners.weights import storage

Words = tuple[str, str]
Declared = dict[str, dict[Words, Run]]  # by the keys of a spec; of several words it is none's
WRITERS = {".csv": "to_csv", ".parquet": "to_parquet"}


def frame(*results: Path | str, data_dir: Path | None = None) -> pd.DataFrame:
    """A row for each value of each trustworthy record under the results folders (default: `results`); a record that
    several have is read from the first of them.

    Columns: `results` (the folder), `table`, `id`; `label` and `setting`, the paper's words for the cell, on whatever
    model and in whatever dtype (its method with every hyperparameter where no table here declares it); `model`,
    `dtype`, `method` and its hyperparameters `method.NAME`; `recovery` and its fields `recovery.NAME`; calibration
    `windows.NAME`; `seed`; `sparsity` (the share removed); `measure` (the protocol key), `metric`, `value`,
    `standard_error` (in the value's unit); the cell's cost, `seconds` and `peak_bytes`; `device`, `commit`, `dirty`,
    `code` (by which code of its method and measures it was made: `same` as here, `other`, or `unknown`: not recorded,
    or of a cell that no table here declares with these measures, e.g. one run with `--limit`), `made_at`.

    Rehearsals are left out, with `data_dir` also records of other texts than lie there and of learning rates that are
    by now chosen anew.  Raises FileNotFoundError for a folder without records.
    """
    roots = folders([Path(root) for root in results or ("results",)])
    tables = dict.fromkeys(folder.name for root in roots for folder in records.folders(root))
    return pd.DataFrame([row for table in tables for row in _table(table, roots, data_dir)])


def write(made: pd.DataFrame, path: Path) -> Path:
    """As CSV or Parquet, by the name's ending; UsageError for another one and for a folder that is not there.

    Whole or not at all; StorageError where the disk refuses.
    """
    refuse_place(path)
    with storage.replacing(path, "name another file") as temporary:
        getattr(made, WRITERS[path.suffix])(temporary, index=False)
    return path


def refuse_place(path: Path) -> None:
    if path.suffix not in WRITERS:
        raise UsageError(f"{path} ends in {path.suffix or 'nothing'}; a table is written as {' or '.join(WRITERS)}.")
    if not path.parent.is_dir():
        raise UsageError(f"{path} would lie in {path.parent}, which is no folder; make it, or correct the path.")


def _table(table: str, roots: Sequence[Path], data_dir: Path | None) -> Iterator[dict[str, Any]]:
    stored = {root: records.load(root, table) for root in roots}
    tell_apart(stored)
    known = functools.cache(functools.partial(_declared, table))
    for record in merged(stored).values():
        root = holder(record, stored)
        if root is None or record.spec.get("rehearsal"):
            continue
        words, run = _whose(record, known)
        if not (data_dir and _outdated(record, run, root, data_dir)):
            yield from _values(record, {"results": str(root), **_cell(record, words, run)})


def _outdated(record: Record, run: Run | None, root: Path, data_dir: Path) -> bool:
    anew = run is not None and found.chosen_anew(record, run, root, data_dir)
    return anew or bool(found.other_data(record, data_dir))


def _declared(table: str, model: str | None = None) -> Declared:
    """Each declared cell of the table, or the same cells on another model, with what a reader calls it; empty for a
    table of another project, and for a model that its cells cannot be had of."""
    declared = papers.TABLES.get(table)
    try:
        runs = declared.runs(model) if declared and model else declared.runs() if declared else []
    except ValueError:  # a folder of which only the name is known
        runs = []
    found: Declared = {}
    for run, words in zip(runs, distinct(runs, labels(runs, declared.label if declared else None)), strict=True):
        for key in [run_key(run), *_keys(run.spec())]:
            found.setdefault(key, {})[words] = run
    return found


def _keys(spec: Mapping[str, Any]) -> list[str]:
    """Of a cell on any model and in any dtype, and of that whatever is measured."""
    left = ("model", "dtype"), ("model", "dtype", "measures")
    return [digest({name: told for name, told in spec.items() if name not in names}) for names in left]


def _whose(record: Record, known: Callable[..., Declared]) -> tuple[Words, Run | None]:
    """What a reader calls the cell, and as which it is declared, on whatever model and whatever is measured."""
    spec = record.spec
    tries = [(known(), stable_key(spec))]
    tries += [(found, key) for key in _keys(spec) for found in (known(spec["model"]["name"]), known())]
    for declared, key in tries:
        if len(named := declared.get(key, {})) == 1:
            return next(iter(named.items()))
    return _own_words(record), None


def _code(record: Record, run: Run | None) -> str:
    if run is None or [describe(what) for what in run.measures] != record.spec["measures"]:
        return "unknown"
    return code.made_by(record.code, run)


def _own_words(record: Record) -> Words:
    """Of a cell that is declared elsewhere: its method's name and hyperparameters, and what follows pruning."""
    spec = record.spec
    method = spec["method"] or {"name": "dense"}
    told = [f"{name}={value}" for name, value in method.items() if name not in ("name", "seed", *SETTINGS)]
    after = [spec.get("recovery", {}).get("name"), spec.get("quantised")]
    setting = method.get("pattern") or (f"{100 * record.achieved.get('asked', 0):g} %" if spec["method"] else "")
    return " ".join([method["name"], *told, *(f"+ {name}" for name in after if name)]), setting


def _cell(record: Record, words: Words, run: Run | None) -> dict[str, Any]:
    spec, made_by = record.spec, record.made_by
    label, setting = words
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
        "code": _code(record, run),
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
