"""SparseGPT's walk through the columns of a block in one launch.

Rows of a matrix (its outputs) do not depend on each other once it is known what goes, so a program holds some of them
in its registers, [columns, rows], and walks through all columns.  It does what `SparseGPT._plain_sweep` does, step for
step: IEEE division, product and sum rounded as torch.addr rounds them there, and among equal costs of a group of m the
lower index first, as torch.topk has it on a GPU.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from pruners.lazy import Bool, Float, Tensor
from pruners.select import Pattern

HELD = {False: 1024, True: 512}  # numbers of a block that a program of one warp holds, chosen along the way or not


@triton.jit
def _cost(weight, root, norm, METRIC: tl.constexpr):
    if METRIC == "obs":
        found = tl.div_rn(weight, root)
        found = found * found
    else:
        found = tl.abs(weight)
        if METRIC == "wanda":
            found = found * norm
    return found


@triton.jit
def _walk(
    block_at,  # [columns, outputs], pruned in place
    upper_at,  # [columns, columns]
    gone_at,  # [columns, outputs], 0 or 1; not read where M is not 0
    norm_at,  # [columns]
    errors_at,  # [columns, outputs], written
    outputs,
    COLUMNS: tl.constexpr,
    DROPPED: tl.constexpr,  # of every M
    M: tl.constexpr,  # 0: it is known what goes
    METRIC: tl.constexpr,
    FUSED: tl.constexpr,
    WIDTH: tl.constexpr,  # the power of two from COLUMNS on
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.arange(0, WIDTH)
    there, in_block = row < outputs, col < COLUMNS
    inside = in_block[:, None] & there[None, :]
    place = col[:, None] * outputs + row[None, :]
    block = tl.load(block_at + place, mask=inside, other=0.0)
    root = tl.load(upper_at + col * (COLUMNS + 1), mask=in_block, other=1.0)
    norm = tl.load(norm_at + col, mask=in_block, other=0.0)
    GROUP: tl.constexpr = M if M > 0 else 1
    for first in range(0, COLUMNS, GROUP):
        if M > 0:
            cost = _cost(block, root[:, None], norm[:, None], METRIC)
            cheaper = tl.zeros([WIDTH, ROWS], dtype=tl.int32)  # of its group, how many go before it
            for other in range(first, first + M):
                theirs = tl.sum(tl.where((col == other)[:, None], cost, 0.0), axis=0)[None, :]
                before = (theirs < cost) | ((theirs == cost) & (other < col)[:, None])
                cheaper += before.to(tl.int32)
            chosen = (cheaper < DROPPED).to(tl.int32)
        for column in range(first, first + GROUP):
            here = (col == column)[:, None]
            if M > 0:
                gone = tl.sum(tl.where(here, chosen, 0), axis=0)
            else:
                gone = tl.load(gone_at + column * outputs + row, mask=there, other=0).to(tl.int32)
            value = tl.sum(tl.where(here, block, 0.0), axis=0)
            error = tl.div_rn(value * gone.to(tl.float32), tl.load(upper_at + column * COLUMNS + column))
            tl.store(errors_at + column * outputs + row, error, mask=there)
            spread = tl.load(upper_at + column * COLUMNS + col, mask=in_block & (col > column), other=0.0)
            if FUSED:
                factor = tl.broadcast_to(-spread[:, None], [WIDTH, ROWS])
                updated = tl.fma(factor, tl.broadcast_to(error[None, :], [WIDTH, ROWS]), block)
            else:
                updated = block - spread[:, None] * error[None, :]
            block = tl.where((col > column)[:, None], updated, tl.where(here & (gone > 0)[None, :], 0.0, block))
    tl.store(block_at + place, block, mask=inside)


@functools.cache
def _fused(device: torch.device) -> bool:
    """Whether torch.addr rounds a product and its sum once: of (1 + 2^-12)^2 - 1 it has the 2^-24 then."""
    near_one, one = torch.tensor([[1 + 2**-12], [1.0]], device=device)
    return bool(one[:, None].addr(near_one, near_one, alpha=-1) != -(2**-11))


def sweep(
    block: Float[Tensor, "columns out"],
    upper: Float[Tensor, "columns columns"],
    gone: Bool[Tensor, "columns out"] | None,
    norm: Float[Tensor, " columns"],
    pattern: Pattern | None,
    metric: str,
) -> Float[Tensor, "columns out"]:
    """Prune a contiguous float32 block in place; returns its errors.  `pattern` chooses where `gone` is None."""
    columns, outputs = block.shape
    chooses = gone is None
    assert chooses is (pattern is not None)
    errors = torch.empty_like(block)
    width = triton.next_power_of_2(columns)
    rows = min(64, HELD[chooses] // width)
    known = block if gone is None else gone.contiguous().view(torch.uint8)
    with torch.cuda.device(block.device) if block.is_cuda else nullcontext():  # Triton launches on the current one
        _walk[(triton.cdiv(outputs, rows),)](
            block,
            upper.contiguous(),
            known,
            norm.contiguous(),
            errors,
            outputs,
            COLUMNS=columns,
            DROPPED=pattern.m - pattern.n if pattern else 0,
            M=pattern.m if pattern else 0,
            METRIC=metric,
            FUSED=_fused(block.device),
            WIDTH=width,
            ROWS=rows,
            num_warps=1,
            enable_fp_fusion=False,  # nothing but what FUSED says
        )
    return errors
