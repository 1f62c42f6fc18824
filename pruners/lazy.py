"""torch, transformers and jaxtyping as names that load on first use.

Tables are declared with pruning methods, and most commands load no model: they answer without the seconds that torch
takes to load.  Where it is loaded already these are the libraries themselves.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

import wrapt

if TYPE_CHECKING or {"torch", "transformers", "jaxtyping"} <= sys.modules.keys():
    import torch
    from jaxtyping import Bool, Float, Int
    from torch import Tensor, nn
    from torch.nn import functional as F
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.pytorch_utils import Conv1D
else:
    torch = wrapt.lazy_import("torch")
    nn = wrapt.lazy_import("torch.nn")
    F = wrapt.lazy_import("torch.nn.functional")
    Tensor = wrapt.lazy_import("torch", "Tensor")
    Bool, Float, Int = (wrapt.lazy_import("jaxtyping", name) for name in ("Bool", "Float", "Int"))
    Conv1D = wrapt.lazy_import("transformers.pytorch_utils", "Conv1D")
    PreTrainedModel = wrapt.lazy_import("transformers", "PreTrainedModel")
    PreTrainedTokenizerBase = wrapt.lazy_import("transformers", "PreTrainedTokenizerBase")

__all__ = [
    "Bool", "Conv1D", "F", "Float", "Int", "PreTrainedModel", "PreTrainedTokenizerBase", "Tensor", "nn", "no_grad",
    "torch",
]  # fmt: skip

P = ParamSpec("P")
R = TypeVar("R")


def no_grad(function: Callable[P, R]) -> Callable[P, R]:
    """torch.no_grad as a decorator that does not load torch."""

    @functools.wraps(function)
    def without(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.no_grad():
            return function(*args, **kwargs)

    return without
