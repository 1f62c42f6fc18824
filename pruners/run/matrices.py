"""Weight matrices as views [out, inp] with their biases, wherever a model keeps them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from pruners.lazy import Conv1D, Tensor, nn

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


@dataclass(frozen=True)
class Slice:
    """One expert's matrix, or half of its rows (0: gate, 1: up), within the parameter that stacks all experts'."""

    module: nn.Module
    name: str
    expert: int
    half: int | None = None
    bias: None = None

    @property
    def weight(self) -> Tensor:
        return view(self, self.module.get_parameter(self.name))

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]


if TYPE_CHECKING:
    Matrix: TypeAlias = nn.Linear | Transposed | Slice
else:
    Matrix = Any  # the union would load torch
EXPERT = {"gate": ("gate_up_proj", 0), "up": ("gate_up_proj", 1), "down": ("down_proj", None)}  # in transformers


def of_expert(module: nn.Module, expert: int, which: str) -> Slice:
    """Its `gate`, `up` or `down` matrix."""
    name, half = EXPERT[which]
    return Slice(module, name, expert, half)


def matrix(module: nn.Module, name: str) -> Matrix:
    """The layer's; TypeError for one that is no plain linear layer, or whose weight or bias is computed from others."""
    from transformers.pytorch_utils import Conv1D

    from pruners.attention_pruned import EmptyConv1D

    plain = isinstance(module, (nn.Linear, Conv1D))
    computed = {"weight", "bias"} - module._parameters.keys() if plain else set()
    if computed or nn.utils.parametrize.is_parametrized(module):
        raise TypeError(
            f"{name} recomputes its {min(computed, default='weight')} in every forward pass, which would undo "
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
    return linear if isinstance(linear, nn.Linear) else linear.module


def dimension(linear: Matrix, rows: bool) -> int:
    """Of the parameter: along which rows, or columns, of the matrix lie."""
    return int(rows) if isinstance(linear, Transposed) else int(not rows)


def view(linear: Matrix, tensor: Tensor) -> Tensor:
    """What belongs to the matrix, as [out, inp], of a tensor of its parameter's shape."""
    if isinstance(linear, Slice):
        expert = tensor[linear.expert]
        return expert if linear.half is None else expert.chunk(2)[linear.half]
    return tensor.T if isinstance(linear, Transposed) else tensor
