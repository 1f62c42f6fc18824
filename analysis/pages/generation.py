"""Generated text of the dense and the pruned models, side by side, from the records alone."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import pandas as pd

from analysis.rows import Row
from analysis.tables.frames import MISSING
from analysis.tables.markdown import ENDS, marked
from experiments.spec import Generation
from pruners.interface.suggest import UsageError

NUMBERS = ("distinct_1", "distinct_2", "repeated_4")
MARKS = re.compile(r"[\\`*_\[\]~]")  # what Markdown would read as such


def continuations(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Each measured cell's continuations by its name; UsageError where the table measured none."""
    found = {
        row.name: measured["continuations"]
        for row in rows
        for what in row.run.measures
        if isinstance(what, Generation) and (measured := row.measure(what.key))
    }
    if not found:
        raise UsageError("No cell of this table generated text; add `Generation()` to a run's measures.")
    return found


def page(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: the mean numbers of every model, then each prompt with all models' continuations beside each other.

    `models` maps a name to its record's continuations.  Raises ValueError where they are not of the same prompts.
    """
    asked = {name: [(row["prompt"], row["decoding"]) for row in rows] for name, rows in models.items()}
    first = next(iter(asked.values()), [])
    if not first or any(prompts != first for prompts in asked.values()):
        raise ValueError("Continuations can be compared only for the same prompts in the same order.")
    parts = ["# Generated text", marked(_means(models), words=("Cell",))]
    for at, (prompt, decoding) in enumerate(first):
        texts = pd.DataFrame({name: [_plain(rows[at]["text"].strip())] for name, rows in models.items()})
        parts += [f"## {_plain(prompt)} ({decoding})", marked(texts, words=list(models))]
    return "\n\n".join(parts) + "\n"


def _means(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    heads = {number: number.replace("_", "-") for number in NUMBERS}
    return pd.DataFrame(
        [
            {"Cell": name, **{head: _mean(rows, number) for number, head in heads.items()}}
            for name, rows in models.items()
        ]
    )


def _mean(rows: Sequence[Mapping[str, Any]], number: str) -> str:
    """Over the continuations that are long enough to have one."""
    known = [row[number] for row in rows if row[number] is not None]
    return f"{fmean(known):.3f}" if known else MISSING


def _plain(text: str) -> str:
    """On one line, with nothing in it that a reader of Markdown or HTML would take for a mark."""
    return ENDS.sub("<br>", MARKS.sub(r"\\\g<0>", html.escape(text)))
