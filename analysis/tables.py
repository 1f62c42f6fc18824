"""Rows as a data frame of numbers (CSV) and as text for a reader (Markdown, LaTeX).

One column holds one protocol key: numbers of different windows, texts or limits never stand in the same column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.rows import Row, keys

MISSING = "—"


@dataclass(frozen=True)
class Quantity:
    """A number that a measure may hold, the name of its standard error there, and its digits in print."""

    name: str
    error: str | None = None
    digits: int = 2


QUANTITIES = (Quantity("perplexity", "standard_error"),)


@dataclass(frozen=True)
class Column:
    """One quantity under one protocol key."""

    key: str
    quantity: Quantity

    @property
    def title(self) -> str:
        return f"{self.quantity.name} {self.key}"

    def value(self, row: Row) -> float | None:
        return self._field(row, self.quantity.name)

    def error(self, row: Row) -> float | None:
        return self._field(row, self.quantity.error) if self.quantity.error else None

    def text(self, row: Row) -> str:
        value, error, digits = self.value(row), self.error(row), self.quantity.digits
        if value is None:
            return "failed" if row.state == "failed" else MISSING
        digits = digits if abs(value) < 1000 else 0
        return f"{value:,.{digits}f}" + (f" ± {error:,.{digits}f}" if error is not None else "")

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


def numbers(rows: Sequence[Row]) -> pd.DataFrame:
    """Every cell with its numbers unrounded; what is missing is empty."""
    found = columns(rows)
    return pd.DataFrame([_numbers(row, found) for row in rows])


def text(rows: Sequence[Row]) -> pd.DataFrame:
    """What a reader sees; columns that would say the same in every row are left to the notes."""
    found = columns(rows)
    several = len({row.run.model for row in rows}) > 1
    return pd.DataFrame(
        [
            {
                "Method": row.method,
                **({"Model": Path(row.run.model).name} if several else {}),
                "Setting": row.setting,
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
        values[column.title] = column.value(row)
        if column.quantity.error:
            values[f"{column.title} {column.quantity.error}"] = column.error(row)
    return {
        "method": row.method,
        "setting": row.setting,
        "model": row.run.model,
        "dtype": row.run.dtype,
        "id": row.record.id if row.record else None,
        "state": row.state,
        "asked": achieved.get("asked"),
        "sparsity": achieved.get("sparsity"),
        **values,
        "failure": row.failure.message if row.failure and not row.record else None,
    }


def _share(row: Row) -> str:
    if row.record is None:
        return MISSING
    return f"{100 * row.record.achieved['sparsity']:.2f} %"


def _refuse_mixed_texts(rows: Sequence[Row], key: str) -> None:
    seen: dict[tuple[str, str], str] = {}
    for row in rows:
        token_hash = (row.measure(key) or {}).get("token_sha256")
        if token_hash is None:
            continue
        before = seen.setdefault((row.run.model, key), token_hash)
        if before != token_hash:
            raise ValueError(
                f"{row.label} was measured on other tokens than the rows above it although both say {key} "
                f"({token_hash[:12]} and {before[:12]}); run the table again with one --data-dir."
            )
