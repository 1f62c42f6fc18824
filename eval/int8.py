"""LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339): decoder weights in 8 bits, through bitsandbytes.

A column of inputs with a value beyond THRESHOLD stays in the model's own format.  Embeddings and head stay whole, as in
transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pruners import anatomy
from pruners.run.stream import instead

THRESHOLD = 6.0
NAME = "LLM.int8"


def library() -> Any:
    """bitsandbytes; ModuleNotFoundError, in a sentence, where it is not installed."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise ModuleNotFoundError(
            f"{NAME} runs through bitsandbytes, which cannot be imported here ({error}); pip install bitsandbytes."
        ) from error
    return bitsandbytes


def quantise(model: PreTrainedModel) -> None:
    """Replace every matrix of the decoder blocks in place; it can be measured afterwards, and no longer pruned.

    ValueError for a family that keeps matrices elsewhere than in torch.nn.Linear layers.
    """
    layers = library().nn
    for block in anatomy.blocks(model):
        for name, linear in block.linears().items():
            if type(linear) is not nn.Linear:
                raise ValueError(
                    f"{block.name}.{name} is not a torch.nn.Linear, which {NAME} replaces; quantise another family."
                )
            if linear.weight.numel():  # structured pruning may have left nothing of it
                block.module.set_submodule(name, _in_8_bits(linear, layers))
    model.is_quantized = True  # type: ignore[assignment]  # as transformers says it


def _in_8_bits(linear: nn.Linear, layers: Any) -> nn.Module:
    weight = linear.weight.data
    made: nn.Module = layers.Linear8bitLt(
        linear.in_features, linear.out_features, bias=False, has_fp16_weights=False, threshold=THRESHOLD, device="meta"
    )
    # from the CPU: a weight that lies on a GPU already, bitsandbytes leaves in 16 bits until it is first used
    whole = weight.cpu().contiguous()
    made.weight = layers.Int8Params(whole, requires_grad=False, has_fp16_weights=False).to(weight.device)
    made.bias = linear.bias
    return made.eval()


@contextmanager
def as_floats(model: nn.Module) -> Iterator[None]:
    """Quantised layers multiply matrices of their shape without meaning for a while: to count, not to compute."""

    def forward(module: Any, x: Tensor) -> Tensor:
        weight = torch.empty(module.out_features, module.in_features, dtype=x.dtype, device=x.device)
        return F.linear(x, weight, module.bias)

    with ExitStack() as stack:
        for module in model.modules():
            if type(module).__name__ == "Linear8bitLt":
                stack.enter_context(instead(module, partial(forward, module)))
        yield
