"""Turns records into tables and figures; never loads a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd


def frame(*results: Path | str, data_dir: Path | None = None) -> pd.DataFrame:
    """Every record of the results folders as one tidy table, a row for each value; see `analysis.tidy.frame`."""
    from analysis import tidy

    return tidy.frame(*results, data_dir=data_dir)
