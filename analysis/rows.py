"""A table's rows: every declared cell beside its record, its failure, or nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import records, tables
from experiments.labels import full, labels
from experiments.records import Failure, Record
from experiments.spec import Run, Table, digest

logger = logging.getLogger(__name__)

COST = "cost"


@dataclass(frozen=True)
class Row:
    """`method` and `setting` are what a reader calls the cell."""

    method: str
    setting: str
    run: Run
    record: Record | None
    failure: Failure | None

    @property
    def state(self) -> str:
        return "done" if self.record else "failed" if self.failure else "missing"

    @property
    def label(self) -> str:
        return full((self.method, self.setting))

    @property
    def is_dense(self) -> bool:
        return self.run.method is None

    @property
    def partial(self) -> list[str]:
        """The corpora of which only a part was at hand."""
        data = self.record.data if self.record else {}
        return [name for name, source in data.items() if source.get("complete") is False]

    @property
    def seed(self) -> int | None:
        """What tells rows with the same words apart."""
        windows = self.run.windows if self.run.calibrates else None
        if windows and windows.sampling != "first":
            return windows.seed
        if getattr(self.run.method, "importance", None) == "random":
            return self.run.method.seed
        return getattr(self.run.recovery, "seed", None)

    def measure(self, key: str) -> dict[str, Any] | None:
        """What was measured under this very protocol key, if anything.

        `COST` is what the cell itself took: hours of retraining, of all processes together.
        """
        if self.record and key == COST:
            recovery = self.record.achieved.get("recovery") or {}
            seconds, processes = recovery.get("seconds"), recovery.get("processes", 1)
            return {"retraining_hours": processes * seconds / 3600} if seconds is not None else None
        return self.record.measures.get(key) if self.record else None


def rows(
    table: Table,
    root: Path,
    model: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    tasks: Sequence[str] = (),
) -> list[Row]:
    """One row per declared cell, in the table's order; raises LookupError if none was ever run."""
    made = declared(table, root, tables.runs(table, model, dtype, limit, tasks))
    if all(row.state == "missing" for row in made):
        raise LookupError(_nothing(table, root, [row.run for row in made]))
    return made


def declared(table: Table, root: Path, runs: Sequence[Run]) -> list[Row]:
    """One row for each of the table's `runs`, in their order, whether or not any has a record."""
    done, broken = _newest(records.load(root, table.name)), _newest(records.load_failures(root, table.name))
    return [
        Row(method, setting, run, done.get(_key(run.spec())), broken.get(_key(run.spec())))
        for run, (method, setting) in zip(runs, labels(runs, table.label), strict=True)
    ]


def keys(made: Iterable[Row]) -> list[str]:
    """The protocol keys that were measured, in order of appearance."""
    return list(dict.fromkeys(key for row in made if row.record for key in row.record.measures))


def _newest(stored: Mapping[str, Any]) -> dict[str, Any]:
    """By spec without the model's exact identity, which only the machine that has the model knows."""
    newest: dict[str, Any] = {}
    for item in sorted(stored.values(), key=lambda item: item.at if isinstance(item, Failure) else item.made_by.at):
        before = newest.get(_key(item.spec))
        if before is not None and isinstance(item, Record):
            logger.warning(
                "%s and %s differ only in the version of the model; the newer, %s, is shown.",
                before.id, item.id, item.id,
            )  # fmt: skip
        newest[_key(item.spec)] = item
    return newest


def _key(spec: dict[str, Any]) -> str:
    # A folder's place is no part of what it is.
    return digest({**spec, "model": Path(spec["model"]["name"]).name})


def _nothing(table: Table, root: Path, runs: list[Run]) -> str:
    if table.missing:
        return f"{table.name} has no records and cannot run yet. It needs {table.missing}."
    asked = ", ".join(sorted({_protocol(run.spec(), [m.key for m in run.measures]) for run in runs}))
    found = records.load(root, table.name).values()
    other = sorted({_protocol(record.spec, list(record.measures)) for record in found})
    hint = f" Its records there are of {'; '.join(other)}." if other else ""
    return (
        f"No record of {table.name} for {asked} under {records.folder(root, table.name)}.{hint} "
        f"Run `python -m experiments run {table.name}`, or name another --results, --model or --dtype."
    )


def _protocol(spec: dict[str, Any], measured: list[str]) -> str:
    return f"{spec['model']['name']} in {spec['dtype']} at {' '.join(measured)}"
