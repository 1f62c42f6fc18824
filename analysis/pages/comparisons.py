"""Compares every cell of a table with a baseline on the same documents and windows, so that noise is not read as a gap.

Means and perplexities: the difference with a paired bootstrap interval.  Tasks: how many documents only one of the two
models gets right, and McNemar's exact test, its p-values corrected by Holm's method for all tests of the table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.rows import Row, declared, keys
from analysis.tables.frames import columns, measured_on
from eval.answers import read_samples
from eval.intervals import Interval, holm, mcnemar, mean_difference, perplexity_difference
from experiments import papers
from experiments.spec import Perplexity, Run, Table, ZeroShot
from experiments.store import records
from pruners.interface.suggest import UsageError, unknown


@dataclass(frozen=True)
class TaskTest:
    """One task of one row against the baseline; `p` after Holm's correction over the table."""

    label: str
    key: str
    difference: float
    only_here: int
    only_baseline: int
    p: float


def baselines(table: Table, rows: Sequence[Row], roots: Sequence[Path], label: str | None = None) -> dict[str, Row]:
    """By model the row of that label; without one the dense model's, of this table or of another one that has its
    record, or else the first cell of the table that has one, the same for all models where there is such a cell.

    UsageError where no cell of that label has a record.
    """
    if label is None:
        return _dense(table, rows, roots) or _first(rows)
    named = [row for row in rows if row.label.lower() == label.lower()]
    if not named:
        raise UsageError(unknown("baseline", label, [row.label for row in rows]))
    found = {row.run.model: row for row in named if row.record}
    if not found:
        raise UsageError(
            f"{named[0].label} has no record yet, so nothing can be compared with it; run that cell first."
        )
    return found


def _dense(table: Table, rows: Sequence[Row], roots: Sequence[Path]) -> dict[str, Row]:
    """Of every model that is measured, where all have one; of another table that which shares the most measures."""
    asked = {row.run.model: row.run.dtype for row in rows if row.record}
    keys = {what.key for row in rows if row.record for what in row.run.measures}
    found = {row.run.model: row for row in rows if row.is_dense and row.record}
    for other in papers.TABLES.values() if set(asked) - set(found) else ():
        if other.name == table.name or not any(records.folder(root, other.name).is_dir() for root in roots):
            continue
        runs = [run for run in other.runs() if _is_dense_of(run, asked, found)]
        for row in declared(other, roots, runs) if runs else ():
            if row.record and keys & set(row.record.measures):
                found[row.run.model] = row
    return found if not set(asked) - set(found) else {}


def _is_dense_of(run: Run, asked: Mapping[str, str], found: Mapping[str, Row]) -> bool:
    dense = run.method is None and run.recovery is None and not run.quantised
    return dense and run.model not in found and asked.get(run.model) == run.dtype


def _first(rows: Sequence[Row]) -> dict[str, Row]:
    """The first label that all models have a record of, or else each model's first record."""
    done = [row for row in rows if row.record]
    models = {row.run.model for row in done}
    for label in dict.fromkeys(row.label for row in done):
        found = {row.run.model: row for row in reversed(done) if row.label == label}
        if set(found) == models:
            return found
    return {row.run.model: row for row in reversed(done)}


def page(table: Table, rows: Sequence[Row], against: Mapping[str, Row]) -> str:
    """Markdown of the differences and the tests.

    Raises UsageError where no other row was measured, ValueError where two rows, or one and its baseline, were measured
    on other texts or a file of answers is not the one of its record.
    """
    columns(rows)  # refuses other texts under one key
    pairs = _pairs(rows, against)
    _refuse_other_texts(pairs)
    frame, tests = differences(table, pairs), task_tests(table, pairs)
    names = list(dict.fromkeys(base.label for _, base in pairs))
    parts = [
        f"**{table.title}: every cell minus {' or '.join(names)}** (`{table.name}`)",
        frame.to_markdown(index=False),
        *_said(table, pairs),
    ]
    parts.append("In brackets: 95 % interval of a paired bootstrap over windows or documents.")
    if tests:
        parts += [_tests_frame(tests).to_markdown(index=False, disable_numparse=True), _tests_note(tests)]
    return "\n\n".join(parts) + "\n"


Pair = tuple[Row, Row]  # a cell and its baseline


def differences(table: Table, pairs: Sequence[Pair]) -> pd.DataFrame:
    """Cell minus baseline with its interval, one column a perplexity or mean; a dash where one was not measured."""
    lines = []
    several = len({row.seed for row, _ in pairs} - {None}) > 1
    for row, base in pairs:
        values = {"Method": row.method, "Setting": row.setting, "Model": row.run.model_name}
        if several:
            values["Seed"] = "—" if row.seed is None else str(row.seed)
        for what in row.run.measures:
            if (interval := _difference(table, what, row, base)) is not None:
                values[_head(what)] = _text(interval, 100 if isinstance(what, ZeroShot) else 1)
        lines.append(values)
    return pd.DataFrame(lines).fillna("—")


def task_tests(table: Table, pairs: Sequence[Pair]) -> list[TaskTest]:
    """Every task of every cell, tested against the baseline."""
    found = []
    for row, base in pairs:
        for what in (what for what in row.run.measures if isinstance(what, ZeroShot)):
            here, there = _scores(table, what, row), _scores(table, what, base)
            for task, metric in what.metrics:
                if task in here and task in there:
                    found.append(_test(row.label, what.task_key(task, metric), here[task], there[task]))
    return [replace(test, p=p) for test, p in zip(found, holm([test.p for test in found]), strict=True)]


def _said(table: Table, pairs: Sequence[Pair]) -> list[str]:
    """Where a baseline is not the table's own dense model."""
    bases = {base.run.model_name: base for _, base in pairs}
    lines = [
        f"The dense {model} is taken from `{base.record.table}`."
        for model, base in bases.items()
        if base.is_dense and base.record and base.record.table != table.name
    ]
    if chosen := [f"{base.label} of {model}" for model, base in bases.items() if not base.is_dense]:
        lines.append(f"Compared with {', '.join(chosen)}; --baseline LABEL chooses another cell.")
    return lines


def _pairs(rows: Sequence[Row], against: Mapping[str, Row]) -> list[Pair]:
    found = [(row, against[row.run.model]) for row in rows if row.record and row.run.model in against]
    found = [(row, base) for row, base in found if row is not base]
    if not found:
        raise UsageError("No other cell of the table has a record, so there is nothing to compare.")
    return found


def _refuse_other_texts(pairs: Sequence[Pair]) -> None:
    """Of a baseline that is another table's."""
    for row, base in pairs:
        for key in keys([row]):
            here, there = measured_on(row, key), measured_on(base, key)
            if here and there and base.record and here != there:
                raise ValueError(
                    f"{base.label} of {base.record.table}, the baseline, was measured on other {there[0]} than "
                    f"{row.label} under the same key {key} ({there[1][:12]} and {here[1][:12]}); run both with a "
                    "single --data-dir, or name another --baseline."
                )


def _difference(table: Table, what: Any, row: Row, base: Row) -> Interval | None:
    here, there = row.measure(what.key), base.measure(what.key)
    if here is None or there is None:
        return None
    if isinstance(what, Perplexity):
        return perplexity_difference(here["nll_per_window"], there["nll_per_window"])
    if isinstance(what, ZeroShot) and all("score" in one and "samples" in one for one in (here, there)):
        return mean_difference(_scores(table, what, row), _scores(table, what, base))
    return None


def _scores(table: Table, what: ZeroShot, row: Row) -> dict[str, list[float]]:
    """Each task's scores of the shown metric, by document in order; the file must be the one of the record."""
    measured = row.measure(what.key) or {}
    if "samples" not in measured:
        return {}
    folder = records.folder(row.folder or Path(), row.record.table if row.record else table.name)
    path = folder / measured["samples"]["file"]
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != measured["samples"]["sha256"]:
        raise ValueError(
            f"{path}, the answers of {row.label}, is missing or was changed; delete its record and rerun the cell."
        )
    metrics = dict(what.metrics)
    scores: dict[str, list[float]] = {}
    for sample in read_samples(path):
        score = sample.get(metrics.get(sample["task"], ""))
        if isinstance(score, int | float):  # a perplexity task has no score of one document
            scores.setdefault(sample["task"], []).append(score)
    return scores


def _test(label: str, key: str, here: Sequence[float], there: Sequence[float]) -> TaskTest:
    result = mcnemar(here, there)
    difference = (sum(here) - sum(there)) / len(here)
    return TaskTest(label, key, difference, result.only_first, result.only_second, result.pvalue)


def _head(what: Any) -> str:
    return f"{what.key}, points" if isinstance(what, ZeroShot) else f"perplexity {what.key}"


def _text(interval: Interval, scale: float) -> str:
    value = f"{scale * interval.value:+,.2f}"
    if interval.low is None or interval.high is None:
        return f"{value} ({interval.note})"
    return f"{value} [{scale * interval.low:+,.2f}, {scale * interval.high:+,.2f}]"


def _tests_frame(tests: Sequence[TaskTest]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "Cell": [test.label for test in tests],
            "Task": [test.key for test in tests],
            "Points": [f"{100 * test.difference:+.1f}" for test in tests],
            "Only this cell right": [str(test.only_here) for test in tests],
            "Only baseline right": [str(test.only_baseline) for test in tests],
            "p (Holm)": [f"{test.p:.3g}" for test in tests],
        }
    )


def _tests_note(tests: Sequence[TaskTest]) -> str:
    return f"p: McNemar's exact test, two-sided, corrected by Holm's method for the {len(tests)} tests of this table."
