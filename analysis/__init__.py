"""Records into tables and figures; no model is ever loaded here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def frame(*results: Path | str, data_dir: Path | None = None) -> pd.DataFrame:
    """Every record of the results folders as one tidy table, a row for each value; see `analysis.tidy.frame`."""
    from analysis import tidy

    return tidy.frame(*results, data_dir=data_dir)
