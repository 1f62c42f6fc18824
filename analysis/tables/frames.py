"""Rows as a data frame of numbers (CSV) and as text for a reader (Markdown, LaTeX).

One column holds one protocol key: numbers of different windows, texts or limits never stand in the same column.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from analysis.rows import Row, keys

MISSING = "—"
OTHER_CODE = "†"


@dataclass(frozen=True)
class Quantity:
    """A number that a measure may hold, the name of its standard error there, and how both are printed.

    `title` is the head of its column ({} is the protocol key), `scale` the factor into its unit, `quartiles` the names
    of the fields printed beside a median.
    """

    name: str
    error: str | None = None
    digits: int = 2
    title: str = "{}"
    scale: float = 1
    quartiles: tuple[str, ...] = ()


QUANTITIES = (
    Quantity("perplexity", "standard_error", title="perplexity {}"),
    Quantity("score", "standard_error", digits=1, title="{}, %", scale=100),
    Quantity("parameters", digits=1, title="parameters, M", scale=1e-6),
    Quantity("macs", digits=2, title="MACs, G", scale=1e-9),
    Quantity("decode_s", digits=1, title="decode, ms/step", scale=1e3, quartiles=("decode_q1_s", "decode_q3_s")),
    Quantity("decode_bound_s", digits=1, title="bandwidth lower bound, ms/step", scale=1e3),
    Quantity(
        "decode_to_bound",
        digits=2,
        title="decode / bandwidth bound at that time",
        quartiles=("decode_to_bound_q1", "decode_to_bound_q3"),
    ),
    Quantity("column_dispersion", digits=1, title="column overdispersion"),
    Quantity("exact_share", digits=1, title="answers equal to dense, %", scale=100),
    Quantity("first_difference", digits=1, title="tokens before first difference"),
    Quantity("learning_rate", digits=5, title="learning rate"),
    Quantity("pruning_s", digits=1, title="pruning, s"),
    Quantity("training_tokens_per_second", digits=0, title="retraining, tokens/s"),
    Quantity("peak_bytes", digits=2, title="peak memory, GB", scale=1e-9),
    Quantity("distinct_2", digits=3, title="distinct 2-grams"),
    Quantity("repeated_4", digits=3, title="repeated 4-grams"),
)


@dataclass(frozen=True)
class Column:
    """One quantity under one protocol key."""

    key: str
    quantity: Quantity

    @property
    def title(self) -> str:
        """For a reader; columns with the same one have another key."""
        return self.quantity.title.format(self.key)

    @property
    def name(self) -> str:
        """For a program."""
        return f"{self.quantity.name} {self.key}"

    def value(self, row: Row) -> float | None:
        return self._field(row, self.quantity.name)

    def error(self, row: Row) -> float | None:
        return self._field(row, self.quantity.error) if self.quantity.error else None

    def text(self, row: Row) -> str:
        value, error = self.value(row), self.error(row)
        if value is None:
            return "failed" if row.state == "failed" else MISSING
        digits = self.quantity.digits if abs(self.quantity.scale * value) < 1000 else 0
        quartiles = [self._print(self._field(row, name), digits) for name in self.quantity.quartiles]
        spread = f" [{', '.join(quartiles)}]" if quartiles else ""
        # all right or all wrong has a standard error of 0, which would say that it is certain
        return self._print(value, digits) + (f" ± {self._print(error, digits)}" if error else spread)

    def _print(self, value: float | None, digits: int) -> str:
        return MISSING if value is None else f"{self.quantity.scale * value:,.{digits}f}"

    def _field(self, row: Row, name: str) -> float | None:
        return (row.measure(self.key) or {}).get(name)


def columns(rows: Sequence[Row]) -> list[Column]:
    """A column per protocol key and quantity; raises ValueError where one key was measured on different texts."""
    for key in keys(rows):
        _refuse_mixed_texts(rows, key)
    return [
        Column(key, quantity)
        for key in keys(rows)
        for quantity in QUANTITIES
        if any(quantity.name in (row.measure(key) or {}) for row in rows)
    ]


def shown(rows: Sequence[Row]) -> list[Column]:
    """The columns for a reader: of several metrics of a task, the one that its protocol reports."""
    wanted = {key for row in rows for what in row.run.measures for key in what.keys}
    found = [column for column in columns(rows) if column.key in wanted]
    titles = Counter(column.title for column in found)
    return [
        replace(column, quantity=replace(column.quantity, title=f"{column.title} ({{}})"))
        if titles[column.title] > 1
        else column
        for column in found
    ]


def numbers(rows: Sequence[Row]) -> pd.DataFrame:
    """Every cell with its numbers unrounded; what is missing is empty."""
    found = columns(rows)
    return pd.DataFrame([_numbers(row, found) for row in rows])


def text(rows: Sequence[Row]) -> pd.DataFrame:
    """What a reader sees; columns that would say the same in every row are left to the notes."""
    found = shown(rows)
    several = len({row.run.model for row in rows}) > 1
    drawn = len({(row.run.model, row.label) for row in rows}) < len(rows)
    return pd.DataFrame(
        [
            {
                "Method": f"{row.method} {OTHER_CODE}" if row.is_dated else row.method,
                **({"Model": row.run.model_name} if several else {}),
                "Setting": row.setting,
                **({"Seed": drawn_as(row)} if drawn else {}),
                "Sparsity": _share(row),
                **{column.title: column.text(row) for column in found},
            }
            for row in rows
        ]
    )


def _numbers(row: Row, found: Sequence[Column]) -> dict[str, Any]:
    achieved = row.record.achieved if row.record else {}
    values: dict[str, Any] = {}
    for column in found:
        values[column.name] = column.value(row)
        if column.quantity.error:
            values[f"{column.name} {column.quantity.error}"] = column.error(row)
    return {
        "method": row.method,
        "setting": row.setting,
        "seed": row.seed,
        "order": row.draw[1],
        "model": row.run.model_name,
        "dtype": row.run.dtype,
        "id": row.record.id if row.record else None,
        "state": row.state,
        "code": row.code,
        "asked": achieved.get("asked"),
        "sparsity": row.record.sparsity if row.record else None,
        **values,
        "failure": row.failure.message if row.failure and not row.record else None,
    }


def drawn_as(row: Row) -> str:
    """Its seed, with the order of its windows where that is not as they were drawn."""
    seed, order = row.draw
    parts = [str(seed)] * (seed is not None) + [f"order {order}"] * (order is not None)
    return ", ".join(parts) or MISSING


def _share(row: Row) -> str:
    if row.record is None:
        return MISSING
    return f"{100 * row.record.sparsity:.2f} %"


def measured_on(row: Row, key: str) -> tuple[str, str] | None:
    """`tokens` or `documents`, and their digest; None where none was recorded."""
    measured = row.measure(key) or {}
    what = "tokens" if "token_sha256" in measured else "documents"
    found = measured.get("token_sha256") or measured.get("documents_sha256")
    return (what, found) if found else None


def _refuse_mixed_texts(rows: Sequence[Row], key: str) -> None:
    seen: dict[tuple[str, str], str] = {}
    for row in rows:
        if (told := measured_on(row, key)) is None:
            continue
        what, found = told
        before = seen.setdefault((row.run.model, key), found)
        if before != found:
            raise ValueError(
                f"{row.label} and the rows above it were measured on different {what} under the same key "
                f"{key} ({found[:12]} and {before[:12]}); rerun the table with a single --data-dir."
            )
