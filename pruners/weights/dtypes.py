"""A model's weights in another dtype for a while, wherever their home is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pruners.lazy import nn, torch
from pruners.weights import homes


@contextmanager
def widened(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Every weight that `dtype` holds exactly in that, and afterwards in its own again; None: in its own.

    Of a model away from home each part is widened when it comes: the values that it has in its own dtype, where a
    checkpoint's files may hold more digits.
    """
    every = {p: torch.promote_types(p.dtype, dtype or p.dtype) for p in model.parameters()}
    own = {p: p.dtype for p, wider in every.items() if wider == dtype != p.dtype}
    home = homes.of(model)
    try:
        if home is not None:
            home.rounded = own
        _cast(model, dict.fromkeys(own, dtype))
        yield
    finally:
        if home is not None:
            home.rounded = {}
        _cast(model, own)


def _cast(model: nn.Module, dtypes: dict[nn.Parameter, Any]) -> None:
    home = homes.of(model)
    if home is not None and dtypes:
        home.forget_ahead()  # in the dtype of before
    with torch.inference_mode(False), torch.no_grad():
        for p, dtype in dtypes.items():
            if home is None or p in home.staying:
                p.data = p.data.to(dtype)
            else:
                p.data = homes.placeholder(torch.empty(p.shape, dtype=dtype, device="meta"), home.device)
