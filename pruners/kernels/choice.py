"""Where the kernels are used: on CUDA, if Triton works there; it comes with PyTorch's builds for CUDA."""

from __future__ import annotations

import functools
import logging

from pruners.lazy import Tensor, torch

WIDEST = 512  # columns of a block that one program can hold in its registers
log = logging.getLogger(__name__)


def sweeps(block: Tensor) -> bool:
    """Whether the kernel takes this block [columns, outputs] of SparseGPT's; else the plain form does.

    A warning says so, once, where Triton is wanting on a GPU.
    """
    if block.device.type != "cuda" or block.dtype != torch.float32 or not 0 < len(block) <= WIDEST:
        return False
    return _works(block.device)


@functools.cache
def _works(device: torch.device) -> bool:
    """Triton may be there and yet not compile: it wants a C compiler, Python's headers and a GPU it knows."""
    try:
        from pruners.kernels.sweep import sweep

        one = torch.ones(1, 1, device=device)
        sweep(one, one, one > 0, one[0], None, "obs")
        torch.cuda.synchronize(device)
    except Exception as error:  # noqa: BLE001  (whatever it is, the plain form works)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        log.warning(
            "SparseGPT takes a launch for every column here, with the same result and many times slower: Triton does "
            "not work on %s (%s).",
            device,
            reason,
        )
        return False
    return True
