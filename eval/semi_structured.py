"""The speed-up of 2:4 sparsity in torch's semi-structured kernels, on devices that have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.sparse import to_sparse_semi_structured
from transformers import PreTrainedModel

from eval.checks import check_model, measuring
from eval.efficiency import is_two_four
from eval.latency import WARM_UP, timed
from eval.matrices import decoder_matrices
from pruners.interface import checks
from pruners.interface.checks import Count

CAPABILITY = (8, 0)
DTYPES = (torch.float16, torch.bfloat16)


@checks.arguments
def probe(model: PreTrainedModel, tokens: Count = 2_048, repetitions: Count = 20) -> dict[str, Any]:
    """Seconds of each distinct 2:4 projection of the first block, dense and sparse; or `skipped`, with the reason."""
    check_model(model)
    if reason := _why_not(model):
        return {"skipped": reason}
    with measuring(model):
        return _probed(model, tokens, repetitions)


def _probed(model: PreTrainedModel, tokens: int, repetitions: int) -> dict[str, Any]:
    first: dict[tuple[int, ...], tuple[str, Tensor]] = {}
    for block, name, weight in decoder_matrices(model):
        if block == 0 and weight.numel() and is_two_four(weight):
            first.setdefault(tuple(weight.shape), (name, weight))
    if not first:
        return {"skipped": "no projection of the first decoder block is 2:4"}
    return {name: _times(weight, tokens, repetitions) for name, weight in first.values()}


def _why_not(model: PreTrainedModel) -> str | None:
    if model.device.type != "cuda":
        return f"semi-structured kernels need a CUDA device; this is {model.device.type}"
    if (found := torch.cuda.get_device_capability(model.device)) < CAPABILITY:
        return f"semi-structured kernels need compute capability {CAPABILITY}; this device has {found}"
    return None if model.dtype in DTYPES else f"semi-structured kernels need float16 or bfloat16; this is {model.dtype}"


def _times(weight: Tensor, tokens: int, repetitions: int) -> dict[str, Any]:
    inputs = torch.randn(tokens, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        sparse = to_sparse_semi_structured(weight.contiguous())
    except RuntimeError as error:  # a shape that the kernels do not take
        return {"skipped": " ".join(str(error).split())}
    dense_s, sparse_s = (_median(inputs, kind, repetitions) for kind in (weight, sparse))
    return {"shape": list(weight.shape), "dense_s": dense_s, "sparse_s": sparse_s, "speed_up": dense_s / sparse_s}


def _median(inputs: torch.Tensor, weight: torch.Tensor, repetitions: int) -> float:
    times = [timed(lambda: F.linear(inputs, weight), inputs.device)[0] for _ in range(WARM_UP + repetitions)]
    return float(np.median(times[WARM_UP:]))
