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

from analysis.rows import Row, called, declared, keys
from analysis.tables.frames import MISSING, columns, drawn_as, measured_on
from analysis.tables.markdown import marked
from eval.answers import read_samples
from eval.intervals import Interval, holm, mcnemar, mean_difference, perplexity_difference
from experiments import papers
from experiments.labels import beside_model
from experiments.measures.asked import OpenAnswers
from experiments.spec import Perplexity, Run, Table, ZeroShot
from experiments.store import records
from pruners.interface.suggest import UsageError, unknown

Baselines = Mapping[str, Sequence[Row]]  # by model the rows of one label, which differ in their seeds
Pair = tuple[Row, Row]  # a cell and its baseline
WORDS = ("Method", "Setting", "Model", "Task")


@dataclass(frozen=True)
class TaskTest:
    """One task of a cell against its baseline; `p` after Holm's correction over the table."""

    pair: Pair
    key: str
    difference: float
    only_here: int
    only_baseline: int
    p: float


def baselines(table: Table, rows: Sequence[Row], roots: Sequence[Path], label: str | None = None) -> Baselines:
    """By model the rows of that label, one a seed, or that of one seed (`Wanda 50 %, seed 1`); without a label the
    dense model's, of this table or of another one that has its record, or else those of the first label of the table
    that has one, the same for all models where there is such a cell.

    UsageError where no cell of that label has a record.
    """
    if label is None:
        return {model: [row] for model, row in _dense(table, rows, roots).items()} or _first(rows)
    named = [row for row in rows if label.lower() in _names(row)]
    if not named:
        known = dict.fromkeys(name for row in rows for name in (row.label, row.name))
        raise UsageError(unknown("baseline", label, list(known)))
    found = _by_model(named)
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


def _first(rows: Sequence[Row]) -> Baselines:
    """The first label that all models have a record of, or else each model's first record."""
    every = _by_model(rows)
    for label in dict.fromkeys(row.label for row in rows):
        found = _by_model([row for row in rows if row.label == label])
        if set(found) == set(every):
            return found
    return {model: found[:1] for model, found in every.items()}


def _names(row: Row) -> set[str]:
    return {name.lower() for name in (row.label, row.name, beside_model(row.name, row.run.model_name))}


def _by_model(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.record:
            found.setdefault(row.run.model, []).append(row)
    return found


def page(table: Table, rows: Sequence[Row], against: Baselines) -> str:
    """Markdown of the differences and the tests; each cell beside the baseline of its own seed, where there is one.

    Raises UsageError where no other row was measured, ValueError where two rows, or one and its baseline, were measured
    on other texts or a file of answers is not the one of its record.
    """
    columns(rows)  # refuses other texts under one key
    pairs = _pairs(rows, against)
    _refuse_other_texts(pairs)
    frame, tests = differences(table, pairs), task_tests(table, pairs)
    names = called(list({id(base): base for _, base in pairs}.values()), [*rows, *(base for _, base in pairs)])
    parts = [f"**{table.title}: every cell minus {names}** (`{table.name}`)"]
    if len(frame.columns) > len(_who(pairs)[0]):
        parts += [marked(frame, words=WORDS), *_said(table, pairs)]
        parts.append("In brackets: 95 % interval of a paired bootstrap over windows or documents.")
    if tests:
        parts += [marked(_tests_frame(tests), words=WORDS), _tests_note(tests)]
    return "\n\n".join([*parts, *_not_compared(pairs, frame, tests)]) + "\n"


def differences(table: Table, pairs: Sequence[Pair]) -> pd.DataFrame:
    """Cell minus baseline with its interval, one column a perplexity or mean; a dash where one was not measured."""
    lines = []
    for (row, base), values in zip(pairs, _who(pairs), strict=True):
        for what in row.run.measures:
            if (interval := _difference(table, what, row, base)) is not None:
                values[_head(what)] = _text(interval, 1 if isinstance(what, Perplexity) else 100)
        lines.append(values)
    return pd.DataFrame(lines).fillna(MISSING)


def _who(pairs: Sequence[Pair]) -> list[dict[str, str]]:
    """A line a pair: the cell, and by seeds where they tell cells or baselines apart."""
    seeds = {"Seed": [drawn_as(row) for row, _ in pairs], "Baseline's seed": [drawn_as(base) for _, base in pairs]}
    drawn = {head: found for head, found in seeds.items() if len({*found} - {MISSING}) > 1}
    return [
        {"Method": row.method, "Setting": row.setting, "Model": row.run.model_name}
        | {head: found[at] for head, found in drawn.items()}
        for at, (row, _) in enumerate(pairs)
    ]


def task_tests(table: Table, pairs: Sequence[Pair]) -> list[TaskTest]:
    """Every task of every cell, tested against the baseline."""
    found = []
    for row, base in pairs:
        for what in (what for what in row.run.measures if isinstance(what, ZeroShot | OpenAnswers)):
            here, there = _scores(table, what, row), _scores(table, what, base)
            found += [_test((row, base), key, here[key], there[key]) for key in here if key in there]
    return [replace(test, p=p) for test, p in zip(found, holm([test.p for test in found]), strict=True)]


def _said(table: Table, pairs: Sequence[Pair]) -> list[str]:
    """Where a baseline is not the table's own dense model."""
    bases = {base.run.model_name: base for _, base in reversed(pairs)}
    lines = [
        f"The dense {model} is taken from `{base.record.table}`."
        for model, base in bases.items()
        if base.is_dense and base.record and base.record.table != table.name
    ]
    if chosen := [f"{base.label} of {model}" for model, base in bases.items() if not base.is_dense]:
        lines.append(f"Compared with {', '.join(chosen)}; --baseline LABEL chooses another cell.")
    others: dict[str, set[str]] = {}
    for row, base in pairs:
        if drawn_as(base) not in (MISSING, drawn_as(row)):
            others.setdefault(_without_pair(row, base), set()).add(drawn_as(base))
    return lines + [f"{who} are compared with its seed {' or '.join(sorted(of))}." for who, of in others.items()]


def _without_pair(row: Row, base: Row) -> str:
    """Which cells are beside a baseline of another seed."""
    if row.label == base.label:
        return "The baseline's other seeds"
    if drawn_as(row) == MISSING:
        return "Cells without a seed"
    what = "an order of windows" if row.seed == base.seed else "a seed"
    return f"Cells of {what} that the baseline does not have"


def _not_compared(pairs: Sequence[Pair], frame: pd.DataFrame, tests: Sequence[TaskTest]) -> list[str]:
    """Which measures were taken of both cells of a pair without values that could be paired."""
    shown = {*frame.columns, *(test.key for test in tests)}
    both = [(what, row, base) for row, base in pairs for what in row.run.measures if what.shown]
    found = dict.fromkeys(
        what.key
        for what, row, base in both
        if row.measure(what.key) and base.measure(what.key) and not shown & {_head(what), *what.keys}
    )
    told = "no values by window or document of both cells are in the records"
    return [f"Not compared, as {told}: {', '.join(found)}."] if found else []


def _pairs(rows: Sequence[Row], against: Baselines) -> list[Pair]:
    """Every other cell with its baseline; where there is none, the baseline's other seeds with its first."""
    bases = {id(row) for found in against.values() for row in found}
    measured = [row for row in rows if row.record and row.run.model in against]
    if others := [row for row in measured if id(row) not in bases]:
        return [(row, _of_its_draw(row, against[row.run.model])) for row in others]
    found = [(row, against[row.run.model][0]) for row in measured if row is not against[row.run.model][0]]
    if not found:
        raise UsageError("No other cell of the table has a record, so there is nothing to compare.")
    return found


def _of_its_draw(row: Row, bases: Sequence[Row]) -> Row:
    alike = [base for same in (drawn_as, lambda row: row.seed) for base in bases if same(base) == same(row)]
    return [*alike, *bases][0]


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
    if isinstance(what, ZeroShot | OpenAnswers) and "score" in here and "score" in there:
        scores = _scores(table, what, row), _scores(table, what, base)
        return mean_difference(*scores) if all(scores) else None
    return None


def _scores(table: Table, what: ZeroShot | OpenAnswers, row: Row) -> dict[str, list[float]]:
    """By protocol key each task's scores of the shown metric, by document in order; a file of them must be the one of
    the record."""
    measured = row.measure(what.key) or {}
    if isinstance(what, OpenAnswers):
        return {what.key: measured["per_document"]} if "per_document" in measured else {}
    if "samples" not in measured:
        return {}
    folder = records.folder(row.folder or Path(), row.record.table if row.record else table.name)
    path = folder / measured["samples"]["file"]
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != measured["samples"]["sha256"]:
        raise ValueError(
            f"{path}, the answers of {row.label}, is missing or was changed; delete its record and rerun the cell."
        )
    scores: dict[str, list[float]] = {}
    by_task: dict[str, list[dict[str, Any]]] = {}
    for sample in read_samples(path):
        by_task.setdefault(sample["task"], []).append(sample)
    for task, metric in what.metrics:
        found = [sample.get(metric) for sample in by_task.get(task, [])]
        if numbers := [score for score in found if isinstance(score, int | float)]:
            scores[what.task_key(task, metric)] = numbers  # a perplexity task has no score of one document
    return scores


def _test(pair: Pair, key: str, here: Sequence[float], there: Sequence[float]) -> TaskTest:
    result = mcnemar(here, there)
    difference = (sum(here) - sum(there)) / len(here)
    return TaskTest(pair, key, difference, result.only_first, result.only_second, result.pvalue)


def _head(what: Any) -> str:
    return f"perplexity {what.key}" if isinstance(what, Perplexity) else f"{what.key}, points"


def _text(interval: Interval, scale: float) -> str:
    value = f"{scale * interval.value:+,.2f}"
    if interval.low is None or interval.high is None:
        return f"{value} ({interval.note})"
    return f"{value} [{scale * interval.low:+,.2f}, {scale * interval.high:+,.2f}]"


def _tests_frame(tests: Sequence[TaskTest]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                **who,
                "Task": test.key,
                "Points": f"{100 * test.difference:+.1f}",
                "Only this cell right": str(test.only_here),
                "Only baseline right": str(test.only_baseline),
                "p (Holm)": f"{test.p:.3g}",
            }
            for test, who in zip(tests, _who([test.pair for test in tests]), strict=True)
        ]
    )


def _tests_note(tests: Sequence[TaskTest]) -> str:
    return f"p: McNemar's exact test, two-sided, corrected by Holm's method for the {len(tests)} tests of this table."
