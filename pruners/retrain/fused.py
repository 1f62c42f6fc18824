"""A linear layer whose weight is W changed by a low-rank product, without keeping that product.

Autograd's own graph would hold, for every layer until its backward pass, the changed weight and the mask at full
size.  Here only the input, A and B are saved; the changed weight exists while it is multiplied and is made again in
backward.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pruners.retrain.masks import BitMask


class Kind(Protocol):
    """How the product BA changes the weight; both work in place on their first argument."""

    def merged(self, product: Tensor, weight: Tensor, mask: BitMask) -> Tensor: ...

    def to_product(self, gradient: Tensor, weight: Tensor, mask: BitMask) -> Tensor: ...


class FusedLinear(nn.Module):
    """Stands in for `linear`, whose weight is frozen; `a` [rank inp] and `b` [out rank] are float32."""

    def __init__(self, linear: nn.Linear, rank: int, kind: Any, mask: BitMask) -> None:
        super().__init__()
        device = linear.weight.device
        self.linear, self.kind, self.mask = linear, kind, mask
        self.a = nn.Parameter(torch.empty(rank, linear.in_features, device=device))
        self.b = nn.Parameter(torch.empty(linear.out_features, rank, device=device))

    def forward(self, x: Float[Tensor, "*batch inp"]) -> Float[Tensor, "*batch out"]:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        bias = self.linear.bias if self.linear.bias is None else self.linear.bias.to(dtype)
        # as rows, whose product is no view: some families go on to add to it in place
        rows = _Fused.apply(x.to(dtype).reshape(-1, x.shape[-1]), self.a, self.b, bias, self)
        return rows.view(*x.shape[:-1], rows.shape[-1])


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, b: Tensor, bias: Tensor | None, layer: FusedLinear) -> Tensor:
        ctx.save_for_backward(x, a, b)
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, _weight(a, b, layer, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b = ctx.saved_tensors
        layer: FusedLinear = ctx.layer
        to_x = grad @ _weight(a, b, layer, grad.dtype) if ctx.needs_input_grad[0] else None
        to_weight = (grad.T @ x).to(a.dtype)
        to_product = layer.kind.to_product(to_weight, layer.linear.weight, layer.mask)
        to_bias = grad.sum(0) if ctx.needs_input_grad[3] else None
        return to_x, b.T @ to_product, to_product @ a.T, to_bias, None


def _weight(a: Tensor, b: Tensor, layer: FusedLinear, dtype: torch.dtype) -> Tensor:
    return layer.kind.merged(b @ a, layer.linear.weight, layer.mask).to(dtype)
