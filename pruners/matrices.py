"""Weight matrices as views [out, inp] with their biases, wherever a model keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers.pytorch_utils import Conv1D

from pruners.attention_pruned import EmptyConv1D

LINEAR = (  # these very types: a layer of another one may compute something else
    "torch.nn.modules.linear.Linear",
    "transformers.models.falcon.modeling_falcon.FalconLinear",
)


@dataclass(frozen=True)
class Transposed:
    """A Conv1D of transformers, whose weight is [inp, out]."""

    module: Conv1D

    @property
    def weight(self) -> Tensor:
        return view(self, self.module.weight)

    @property
    def bias(self) -> nn.Parameter:
        return self.module.bias

    @property
    def in_features(self) -> int:
        return self.module.weight.shape[0]

    @property
    def out_features(self) -> int:
        return self.module.weight.shape[1]


Matrix: TypeAlias = nn.Linear | Transposed


def matrix(module: nn.Module, name: str) -> Matrix:
    """The layer's; TypeError for one that is no plain linear layer, or whose weight or bias is computed from others."""
    plain = isinstance(module, (nn.Linear, Conv1D))
    computed = {"weight", "bias"} - module._parameters.keys() if plain else set()
    if computed or is_parametrized(module):
        raise TypeError(
            f"{name} computes its {min(computed, default='weight')} anew in every forward pass, which would undo "
            "pruning; make it permanent first, with torch.nn.utils.prune.remove, "
            "torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm."
        )
    if type(module) in (Conv1D, EmptyConv1D):
        return Transposed(module)  # type: ignore[arg-type]
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if kind not in LINEAR:
        raise TypeError(
            f"{name} is a {kind}; pruning needs a plain torch.nn.Linear. "
            "Merge adapters and load the model unquantised first."
        )
    assert isinstance(module, nn.Linear)
    return module


def owner(linear: Matrix) -> nn.Module:
    """The module whose parameters the matrix and its bias are."""
    return linear.module if isinstance(linear, Transposed) else linear


def dimension(linear: Matrix, rows: bool) -> int:
    """Of the parameter: along which rows, or columns, of the matrix lie."""
    return int(rows) if isinstance(linear, Transposed) else int(not rows)


def view(linear: Matrix, tensor: Tensor) -> Tensor:
    """What belongs to the matrix, as [out, inp], of a tensor of its parameter's shape."""
    return tensor.T if isinstance(linear, Transposed) else tensor
