"""The papers' own values, read from analysis/published/*.csv (`python -m tools.import_published` makes them)."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path

import pandas as pd

from pruners.interface.suggest import UsageError, unknown

FOLDER = Path(__file__).parent / "published"
Key = tuple[str, str, str, str, str]


@dataclass(frozen=True)
class Published:
    """One cell as its source prints it.

    `value` is in base units (None: printed in words), `rounding` half of its last digit; `protocol` is the key that
    our own number must have (empty: not known).  `caveat` says why it cannot be compared, `note` what else to know.
    """

    paper: str
    table: str
    model: str
    method: str
    setting: str
    dataset: str
    metric: str
    value: float | None
    rounding: float | None
    printed: str
    protocol: str
    source: str
    evidence: str
    caveat: str
    note: str

    @property
    def key(self) -> Key:
        """What one of our cells must agree in."""
        return self.model, self.method, self.setting, self.protocol, self.metric

    @property
    def place(self) -> str:
        return f"{self.paper}: {self.table}"


COLUMNS = tuple(field.name for field in fields(Published))


def papers() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.csv"))


@lru_cache
def read(paper: str, folder: Path = FOLDER) -> tuple[Published, ...]:
    """Every published cell of a paper; UsageError for an unknown paper, ValueError for a table that is not tidy."""
    path = folder / f"{paper}.csv"
    if not path.exists():
        raise UsageError(unknown("paper", paper, sorted(found.stem for found in folder.glob("*.csv"))))
    frame = pd.read_csv(path, keep_default_na=False, na_values={"value": [""], "rounding": [""]})
    if odd := [name for name in [*frame.columns, *COLUMNS] if (name in COLUMNS) != (name in frame.columns)]:
        raise ValueError(f"{path} has wrong columns for published values ({', '.join(odd)}); regenerate it.")
    cells = [_cell(row, path, line) for line, row in enumerate(frame[list(COLUMNS)].to_dict("records"), start=2)]
    refuse_duplicates(cells, path)
    return tuple(cells)


def of(places: str | None) -> list[Published]:
    """The cells of a table's `published`, e.g. `wanda: table 23, table 24`; UsageError for a table nobody printed."""
    if not places:
        return []
    paper, _, named = places.partition(": ")
    known = {cell.table for cell in read(paper)}
    asked = named.split(", ")
    for table in asked:
        if table not in known:
            raise UsageError(unknown(f"table of {paper}", table, known))
    return [cell for cell in read(paper) if cell.table in asked]


def refuse_duplicates(cells: Iterable[Published], path: Path) -> None:
    """ValueError where one cell of one table is printed twice."""
    seen: dict[tuple[str, ...], Published] = {}
    for cell in cells:
        key = (cell.table, *cell.key, cell.dataset, "" if cell.table.startswith("table ") else cell.source)
        if key in seen:
            raise ValueError(f"{path} has the cell {' / '.join(key)} twice ({seen[key].printed} and {cell.printed}).")
        seen[key] = cell


def _cell(row: dict, path: Path, line: int) -> Published:
    for name in ("value", "rounding"):
        try:
            row[name] = None if math.isnan(float(row[name])) else float(row[name])
        except ValueError:
            raise ValueError(f"{path}, line {line}: {name} must be a number or empty; got {row[name]!r}.") from None
    if row["paper"] != path.stem or not row["table"] or not row["metric"]:
        raise ValueError(
            f"{path}, line {line} is not a cell of {path.stem} with its table and metric; regenerate the file."
        )
    return Published(**row)
