"""Generated text of the dense and the pruned models, side by side, from the records alone."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.rows import Row
from experiments.spec import Generation
from pruners.interface.suggest import UsageError

NUMBERS = ("distinct_1", "distinct_2", "repeated_4")


def continuations(rows: Sequence[Row]) -> dict[str, list[dict[str, Any]]]:
    """Each measured cell's continuations by its label; UsageError where the table measured none."""
    found = {
        row.label: measured["continuations"]
        for row in rows
        for what in row.run.measures
        if isinstance(what, Generation) and (measured := row.measure(what.key))
    }
    if not found:
        raise UsageError("No cell of this table generated text; add `Generation()` to a run's measures.")
    return found


def page(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: the mean numbers of every model, then each prompt with all models' continuations beside each other.

    `models` maps a label to its record's continuations.  Raises ValueError where they are not of the same prompts.
    """
    asked = {name: [(row["prompt"], row["decoding"]) for row in rows] for name, rows in models.items()}
    first = next(iter(asked.values()), [])
    if not first or any(prompts != first for prompts in asked.values()):
        raise ValueError("Continuations can be compared only for the same prompts in the same order.")
    parts = ["# Generated text", _means(models).to_markdown(floatfmt=".3f")]
    for at, (prompt, decoding) in enumerate(first):
        texts = pd.DataFrame({name: [_cell(rows[at]["text"])] for name, rows in models.items()})
        parts += [f"## {html.escape(prompt)} ({decoding})", texts.to_markdown(index=False)]
    return "\n\n".join(parts) + "\n"


def _means(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    means = {name: pd.DataFrame(list(rows))[list(NUMBERS)].mean() for name, rows in models.items()}
    return pd.DataFrame(means).T.rename(columns=lambda name: str(name).replace("_", "-"))


def _cell(text: str) -> str:
    return html.escape(text.strip()).replace("|", "\\|").replace("\n", "<br>")
