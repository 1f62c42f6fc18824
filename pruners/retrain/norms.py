"""Layer norms under autocast on a CPU."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class NormsInFloat32(TorchFunctionMode):
    """Layer norms in float32, as autocast has them on CUDA.

    On a CPU autocast leaves them alone, and a norm in half precision then refuses hidden states in float32, such as the
    sum of float16 and bfloat16 is.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.layer_norm:
            args, kwargs = map(_widened, args), {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value
