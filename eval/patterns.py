"""Structure in the masks of a pruned model: are whole rows or columns of a matrix kept or removed together?

A mask without structure removes each weight by itself.  The share that a column keeps then varies as a binomial does,
and the overdispersion

    variance over columns of the kept share / (kept * (1 - kept) / rows)

is about 1, likewise for rows.  Above 1 some columns are spared and others given up, whole.  The GBLM-Pruner paper shows
this as pictures of masks (Das et al. 2023, arXiv:2311.04902); the number says how much of it there is.
"""

from __future__ import annotations

from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from eval.matrices import decoder_matrices
from pruners.interface import checks
from pruners.interface.checks import Count, Whole


@checks.arguments
def mask_patterns(model: nn.Module, block: Whole, side: Count = 64) -> dict[str, Any]:
    """Overdispersion of rows and columns by matrix, over all blocks, and maps of one block's masks.

    `row_dispersion` and `column_dispersion` are medians over all matrices.  Each matrix has `kept`, `rows` and
    `columns` as lists over the blocks; a dense or all-zero matrix has None for the last two, an
    empty one (of a block without heads or channels) for all.  `maps` shows `block`, without its empty matrices: at
    most `side` lines of `side` cells, each the percentage of weights kept (99 at most) as two digits.  Raises
    ValueError for a block that the model has not.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be a loaded transformers model; got {checks.typed(model)}.")
    matrices: dict[str, dict[str, list[float | None]]] = {}
    maps = {}
    for index, name, weight in decoder_matrices(model):
        there = weight != 0
        told = matrices.setdefault(name, {"kept": [], "rows": [], "columns": []})
        told["kept"].append(_rounded(float(there.double().mean())) if there.numel() else None)
        told["rows"].append(overdispersion(there, dim=1))
        told["columns"].append(overdispersion(there, dim=0))
        if index == block and there.numel():
            maps[name] = _map(there, side)
    blocks = max((len(told["kept"]) for told in matrices.values()), default=0)
    if not 0 <= block < blocks:
        raise ValueError(f"There is no block {block}; the model has {blocks}, counted from 0.")
    row, column = (_median([value for told in matrices.values() for value in told[way]]) for way in ("rows", "columns"))
    return {"row_dispersion": row, "column_dispersion": column, "block": block, "matrices": matrices, "maps": maps}


def overdispersion(there: Tensor, dim: int) -> float | None:
    """Of the kept shares along `dim` of a mask [rows, columns]; None where all or none is kept, or it is empty."""
    if not there.numel():
        return None
    shares = there.double().mean(dim)
    kept = float(shares.mean())
    if kept in (0.0, 1.0) or len(shares) < 2:
        return None
    return _rounded(float(shares.var()) * there.shape[dim] / (kept * (1 - kept)))


def _map(there: Tensor, side: int) -> list[str]:
    size = (min(side, there.shape[0]), min(side, there.shape[1]))
    shares = torch.nn.functional.adaptive_avg_pool2d(there[None, None].float(), size)[0, 0]
    return ["".join(f"{min(99, round(100 * share)):02d}" for share in row) for row in shares.tolist()]


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return _rounded(median(known)) if known else None


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
