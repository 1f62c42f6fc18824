"""SparseGPT: remove the weights that cost least, and update the remaining weights of the row to compensate.

    H    = 2/N sum_t x_t x_t^T + damping * mean(diag H) * I          U = chol(H^-1), upper: H^-1 = U^T U
    cost = W[o, i]^2 / U[i, i]^2                                     the loss of removing one weight
    W[o, i:] -= W[o, i] / U[i, i] * U[i, i:]                         for every removed (o, i), left to right

Frantar & Alistarh 2023, arXiv:2301.00774.  The mask is chosen per block of `block_size` columns over all rows of a
matrix (or per m columns for n:m), with the columns to its left already accounted for.  Projections that share an input
share H and its factorisation and are solved stacked; each still picks its own mask.

Options for the ablations in Wanda's tables 7 and 8: another cost (`metric`), a mask chosen once from the dense weights
within a comparison `group`, where `obs` is W^2 / diag(H^-1), and no `update` of what remains.

On CUDA with Triton the columns of a block are one launch (`pruners.kernels.sweep`): same order, same masks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated

from pruners import select
from pruners.calibrate import Hessian
from pruners.interface import checks
from pruners.interface.checks import Count, Flag, Rule, Text
from pruners.kernels import choice
from pruners.lazy import Bool, Float, Tensor, torch
from pruners.run.matrices import Matrix
from pruners.select import Pattern
from pruners.unstructured import Unstructured
from pruners.weights import memory

Damping = Annotated[float, Rule("a positive number up to 1", (int, float), lambda value: 0 < value <= 1)]
FACTOR_BYTES = 20  # a number of the Hessian: its damped copy and the factor in float64, and what libraries want
log = logging.getLogger(__name__)


# Of removing a weight, by the root of diag(H^-1) (along the way that of the columns not yet solved, U[i, i]) and the
# norm of its input.
COSTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "obs": lambda weight, root, norm: (weight / root).square_(),
    "wanda": lambda weight, root, norm: weight.abs() * norm,
    "magnitude": lambda weight, root, norm: weight.abs(),
}


@dataclass(frozen=True)
class SparseGPT(Unstructured):
    """`metric` is the cost of removing a weight: `obs`, `wanda` or `magnitude`; `group` one of those of Wanda, or None
    for masks chosen along the way; without `update` only the mask is SparseGPT's.  ValueError for other words."""

    block_size: Count = 128
    damping: Damping = 0.01
    metric: Text = field(default="obs", metadata={"since": "later"})
    group: Text | None = field(default=None, metadata={"since": "later"})
    update: Flag = field(default=True, metadata={"since": "later"})

    NEEDS = Hessian

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("metric", self.metric, COSTS)
        if self.group is not None:
            select.check_group(self.group, self.pattern)
        elif not self.update:
            raise ValueError(
                "Without a weight update the mask is chosen in one step, within a comparison group; group is "
                f"{select.GROUPS}."
            )
        if self.pattern and self.block_size % Pattern.parse(self.pattern).m:
            raise ValueError(
                f"block_size {self.block_size} is not a multiple of the m of {self.pattern}; change one of them."
            )

    def remove(self, linears: Mapping[str, Matrix], x: Hessian, dense: Mapping[str, Tensor]) -> None:
        hessian = x.taken()
        dead = hessian.diagonal() == 0  # an input that is always zero: its weights do nothing
        hessian.diagonal()[dead] = 1
        norm = hessian.diagonal().sqrt()
        factor = inverse_factor(hessian, self.damping, "/".join(linears))
        del hessian
        weights = [linear.weight.data for linear in linears.values()]
        stacked, rows = torch.cat(weights).float(), [len(weight) for weight in weights]
        stacked[:, dead] = 0
        if self.group is None:
            self.solve(stacked, factor, rows, norm)
        else:
            gone = self._chosen(stacked, factor, rows, norm)
            self.solve(stacked, factor, rows, norm, gone) if self.update else stacked.masked_fill_(gone, 0)
        for weight, solved in zip(weights, stacked.split(rows), strict=True):
            weight.copy_(solved)

    def _chosen(self, weight: Tensor, factor: Tensor, rows: list[int], norm: Tensor) -> Bool[Tensor, "out inp"]:
        """The mask of weights that nothing was done to; diag(H^-1) = diag(U^T U) are the squared columns of U."""
        assert self.group is not None  # the caller has looked
        cost = COSTS[self.metric](weight, factor.square().sum(0).sqrt(), norm)
        if self.pattern:
            return self.gone(cost)
        return torch.cat([select.among(part, self.group, self.asked) for part in cost.split(rows)])

    def solve(
        self,
        weight: Float[Tensor, "out inp"],
        factor: Float[Tensor, "inp inp"],
        rows: list[int],
        norm: Float[Tensor, " inp"],
        mask: Bool[Tensor, "out inp"] | None = None,
    ) -> None:
        """Prune `weight` in place: matrices of `rows` outputs each, stacked; `factor` is U above, `norm` that of each
        input up to a factor, `mask` what goes where that is known."""
        for start in range(0, weight.shape[1], self.block_size):
            stop = min(start + self.block_size, weight.shape[1])
            upper = factor[start:stop, start:stop]
            # Columns as contiguous rows: every step below works on one of them.
            block = weight[:, start:stop].T.contiguous()
            if mask is not None:
                gone: Tensor | None = mask[:, start:stop].T.contiguous()
            else:
                gone = None if self.pattern else self._cheapest(block, upper, rows, norm[start:stop])
            errors = self._sweep(block, upper, gone, norm[start:stop])
            weight[:, start:stop] = block.T
            weight[:, stop:].addmm_(errors.T, factor[start:stop, stop:], alpha=-1)

    def _cheapest(self, block: Tensor, upper: Tensor, rows: list[int], norm: Tensor) -> Bool[Tensor, "columns out"]:
        cost = COSTS[self.metric](block, upper.diagonal()[:, None], norm[:, None])
        masks = [select.per_matrix(part.T.contiguous(), self.asked) for part in cost.split(rows, dim=1)]
        return torch.cat(masks).T.contiguous()

    def _sweep(self, block: Float[Tensor, "columns out"], upper: Tensor, gone: Tensor | None, norm: Tensor) -> Tensor:
        """Column by column: zero what goes and spread its error over the columns to the right; returns the errors."""
        pattern = Pattern.parse(self.pattern) if self.pattern and gone is None else None
        if choice.sweeps(block):
            from pruners.kernels.sweep import sweep

            return sweep(block, upper, gone, norm, pattern, self.metric)
        return self._plain_sweep(block, upper, gone, norm, pattern)

    def _plain_sweep(
        self, block: Tensor, upper: Tensor, gone: Tensor | None, norm: Tensor, pattern: Pattern | None
    ) -> Tensor:
        errors = torch.zeros_like(block)
        for column in range(len(block)):
            if pattern and column % pattern.m == 0:
                these = slice(column, column + pattern.m)
                cost = COSTS[self.metric](block[these], upper.diagonal()[these, None], norm[these, None])
                group = select.n_of_m(cost.T.contiguous(), pattern).T
            mask = group[column % pattern.m] if pattern else gone[column]  # type: ignore[index]
            torch.mul(block[column], mask, out=errors[column]).div_(upper[column, column])
            block[column + 1 :].addr_(upper[column, column + 1 :], errors[column], alpha=-1)
            block[column].masked_fill_(mask, 0)
        return errors


def inverse_factor(hessian: Float[Tensor, "inp inp"], damping: float, name: str) -> Float[Tensor, "inp inp"]:
    """U with H^-1 = U^T U, upper triangular; where H is not positive definite, damping grows tenfold, with a warning.

    With H = R R^T, R upper triangular (Cholesky of H read backwards), U is R^-1: half the work of inverting H first.
    In float64: in float32 the rounding of an ill-conditioned H alone flips mask entries; on the CPU where the device
    has not the memory for it.  Raises ValueError once damping exceeds the mean diagonal itself.
    """
    device = hessian.device
    fits = device.type == "cpu" or FACTOR_BYTES * hessian.numel() <= memory.free_bytes(device)
    try:
        return _factored(hessian, damping, name, device if fits else torch.device("cpu"))
    except torch.OutOfMemoryError:  # what is free may lie in pieces
        return _factored(hessian, damping, name, torch.device("cpu"))


def _factored(hessian: Tensor, damping: float, name: str, place: torch.device) -> Tensor:
    mean = hessian.diagonal().mean()
    while damping <= 1:
        damped = hessian.flip(0, 1).to(place, torch.float64)
        damped.diagonal().add_(damping * mean.to(place))
        lower, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed:
            upper = lower.flip(0, 1)
            del lower
            _invert_upper(upper)
            return upper.float().to(hessian.device)
        log.warning("%s: the Hessian is not positive definite at damping %g; trying %g.", name, damping, 10 * damping)
        damping *= 10
    raise ValueError(f"{name}: the Hessian cannot be factorised even with damping 1; calibrate with more windows.")


def _invert_upper(matrix: Float[Tensor, "inp inp"]) -> None:
    """An upper triangular matrix in place, by halves, so that nearly all of the work is matrix products."""
    size = len(matrix)
    if size <= 128:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = size // 2
    left, corner, right = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    _invert_upper(left)
    _invert_upper(right)
    corner.copy_((left @ corner).neg_() @ right)
