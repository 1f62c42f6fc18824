"""From scores to what is removed: within rows, columns or the matrix, n:m; and whole units, under a parameter budget.

The lowest scores go.  Within a row exactly as many as asked do, and among equal scores the lower index goes first;
within a group of m torch.topk chooses among equals; with one threshold for a whole matrix, equal scores go together.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pruners.interface import checks
from pruners.lazy import Bool, Float, Int, Tensor, torch

SEARCHED, SORTED = 2**16, 2**23  # numbers of a row up to which a GPU finds one by kthvalue, and up to which by sorting
COMPARED = 16  # of a group, up to which each is compared with each there
GROUPS = "'matrix', 'row', 'column', 'rows:N' or 'columns:N'"


@dataclass(frozen=True)
class Pattern:
    """`n:m` keeps n of every m consecutive inputs of a row, as the hardware reads it."""

    n: int
    m: int

    @classmethod
    def parse(cls, text: str) -> Pattern:
        found = re.fullmatch(r"([1-9][0-9]*):([1-9][0-9]*)", text)
        if not found or not 0 < int(found[1]) < int(found[2]):
            raise ValueError(f"A pattern is n:m with 0 < n < m, such as 2:4; got {text!r}.")
        return cls(int(found[1]), int(found[2]))

    @property
    def sparsity(self) -> float:
        return 1 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


def check_share(name: str, share: float) -> float:
    """The share itself if it lies in [0, 1), else ValueError."""
    if not 0 <= share < 1:
        raise ValueError(f"{name} is the share removed, in [0, 1); got {share}.")
    return share


def agreed_sparsity(sparsity: float | None, pattern: str | None) -> float:
    """The sparsity that both ask for; 0.5 where neither says."""
    if pattern is None:
        return check_share("sparsity", 0.5 if sparsity is None else sparsity)
    parsed = Pattern.parse(pattern)
    if sparsity is not None and abs(sparsity - parsed.sparsity) > 1e-9:
        raise ValueError(
            f"{parsed} keeps {parsed.n} of every {parsed.m} weights, so sparsity is {parsed.sparsity}; got {sparsity}. "
            "Drop `sparsity`, or drop `pattern` for unstructured pruning."
        )
    return parsed.sparsity


def refuse_nan(score: Tensor, of: str) -> None:
    """ValueError for scores among which nothing can be ranked; `of` says whose they are."""
    if score.sum().isnan() and (lost := int(score.isnan().sum())):
        raise ValueError(
            f"{of} is NaN in {lost:,} of {score.numel():,} places, which cannot be ranked; look for a "
            "division by zero, e.g. for a row of zeros."
        )


def lowest(score: Float[Tensor, "*rows inp"], count: int) -> Bool[Tensor, "*rows inp"]:
    """The `count` lowest of each row."""
    if count == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    threshold = _kth_lowest(score, count)
    gone = score < threshold
    ties = score == threshold
    wanted = count - gone.sum(-1, keepdim=True, dtype=torch.int32)  # of int64 torch makes a copy on a CPU
    crowded = (ties.sum(-1, keepdim=True, dtype=torch.int32) > wanted).squeeze(-1)
    if crowded.any():
        ties[crowded] &= ties[crowded].cumsum(-1) <= wanted[crowded]
    return gone | ties


def per_row(score: Float[Tensor, "out inp"], sparsity: float) -> Bool[Tensor, "out inp"]:
    """Wanda's comparison group: every output loses the same share, int(inp * sparsity) inputs."""
    return lowest(score, int(score.shape[-1] * sparsity))


def per_matrix(score: Float[Tensor, "out inp"], sparsity: float) -> Bool[Tensor, "out inp"]:
    """One threshold for the matrix, sorted(score)[int(out * inp * sparsity)]: what does not exceed it goes.

    That is the released codes' rule: one weight more than asked, and all that tie with it (a few in 10,000 weights of
    quantised or half-precision checkpoints).  In SparseGPT that one weight changes the rest of its row.  Nothing goes
    at sparsity 0, where that rule would still remove the lowest.
    """
    if sparsity == 0:
        return torch.zeros_like(score, dtype=torch.bool)
    return score <= _kth_lowest(score.flatten(), int(score.numel() * sparsity) + 1)


def among(score: Float[Tensor, "out inp"], group: str, sparsity: float) -> Bool[Tensor, "out inp"]:
    """What goes where weights compete within `group`, one of those that `check_group` takes."""
    kind, _, size = group.partition(":")
    if kind == "row":
        return per_row(score, sparsity)
    if kind == "column":
        return per_row(score.T.contiguous(), sparsity).T
    if kind == "matrix":
        return per_matrix(score, sparsity)
    axis = 0 if kind == "rows" else 1
    return torch.cat([per_matrix(part.contiguous(), sparsity) for part in score.split(int(size), axis)], axis)


def check_group(group: str, pattern: str | None) -> None:
    """ValueError for what is none of `GROUPS`, N a number of neighbouring rows (outputs) or columns (inputs), and
    beside a pattern, whose groups of m stand in rows, for one that is neither the rows nor the matrix they are of."""
    if not isinstance(group, str) or not re.fullmatch(r"matrix|row|column|(rows|columns):[1-9][0-9]*", group):
        raise ValueError(f"group is {GROUPS}; got {checks.shown(group)}.")
    if pattern and group not in ("matrix", "row"):
        raise ValueError(
            f"Weights of a pattern compete within m neighbours in a row, so group {group!r} has no meaning "
            f"with {pattern}; leave one out."
        )


def n_of_m(score: Float[Tensor, "out inp"], pattern: Pattern) -> Bool[Tensor, "out inp"]:
    """The m - n lowest of every m consecutive inputs; ValueError if m does not divide the width.

    By torch.topk as in the released codes of Wanda and SparseGPT: in a checkpoint of 4-bit weights one magnitude in 15
    hangs on which of several equal ones it takes.
    """
    if score.shape[-1] % pattern.m:
        raise ValueError(
            f"{pattern} needs rows of a multiple of {pattern.m} weights; this matrix has {score.shape[-1]}. "
            "Use unstructured sparsity, or a pattern that divides the width."
        )
    grouped = score.unflatten(-1, (-1, pattern.m))
    if score.is_cuda and pattern.m <= COMPARED:
        return first_lowest(grouped, pattern.m - pattern.n).flatten(-2)
    gone = grouped.topk(pattern.m - pattern.n, largest=False).indices
    return torch.zeros_like(grouped, dtype=torch.bool).scatter_(-1, gone, True).flatten(-2)


def first_lowest(grouped: Float[Tensor, "*groups m"], count: int) -> Bool[Tensor, "*groups m"]:
    """The `count` lowest of each group, of equal ones the first; by comparing each with each, ten times faster than
    topk on a GPU, which chooses the same there."""
    lower = torch.zeros_like(grouped, dtype=torch.int8)
    for index in range(grouped.shape[-1]):
        this = grouped[..., index : index + 1]
        lower[..., :index] += this < grouped[..., :index]
        lower[..., index + 1 :] += this <= grouped[..., index + 1 :]
    return lower < count


def cheapest(
    score: Float[Tensor, " units"], cost: Int[Tensor, " units"], budget: float | int
) -> Bool[Tensor, " units"]:
    """One threshold for units of different cost: the lowest, up to where their cost together is closest to `budget`.

    Equal scores go in order; of two totals equally close the smaller one counts.
    """
    order = score.argsort(stable=True)
    spent = torch.cat([cost.new_zeros(1), cost[order].cumsum(0)])
    gone = torch.zeros_like(score, dtype=torch.bool)
    gone[order[: int((spent - budget).abs().argmin())]] = True
    return gone


def evenly(costs: Sequence[Int[Tensor, " units"]], budget: float | int) -> list[int]:
    """How many units go from each place so that all lose the same share of theirs, up to one unit, for `budget`.

    `costs` are those of each place's units in the order in which they go.
    """
    share_by_then = [torch.arange(1, len(some) + 1, dtype=torch.float32) / len(some) for some in costs]
    gone = cheapest(torch.cat(share_by_then), torch.cat(list(costs)), budget)
    return [int(part.sum()) for part in gone.split([len(some) for some in costs])]


def _kth_lowest(score: Tensor, count: int) -> Tensor:
    if score.device.type == "cpu":  # numpy's selection is some ten times faster than torch's here; it has no bfloat16
        wide = score.float() if score.dtype == torch.bfloat16 else score
        part = np.partition(wide.numpy(), count - 1, axis=-1)[..., count - 1 : count]
        return torch.from_numpy(part).to(score.dtype)
    if score.shape[-1] <= SEARCHED:
        return score.kthvalue(count, -1, keepdim=True).values
    if score.numel() == score.shape[-1] <= SORTED:
        return score.sort().values[..., count - 1 : count]
    return counted(score, count)


def counted(score: Float[Tensor, "*rows inp"], count: int) -> Float[Tensor, "*rows 1"]:
    """The `count`-th lowest of each row, found by halving the range of values: one pass of counting per bit.

    Takes less memory than sorting.  On a GPU `kthvalue` works with one block of threads per row, and a matrix in one
    comparison group is one row.  Bits of floats read as integers have the order of the floats once those of negative
    numbers are turned over.
    """
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[score.element_size()]
    every = torch.iinfo(kind)

    def turned(bits: Tensor) -> Tensor:
        return bits ^ ((bits >> (every.bits - 1)) & every.max)

    keys = turned(score.contiguous().view(kind))
    low, high = keys.amin(-1, keepdim=True), keys.amax(-1, keepdim=True)
    for _ in range(every.bits):
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without their sum
        enough = (keys <= middle).sum(-1, keepdim=True) >= count
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    return turned(high).view(score.dtype)
