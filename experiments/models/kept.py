"""The model of consecutive cells, kept in memory as it was loaded: a copy of it takes less than reading it anew."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pruners.lazy import nn
from pruners.weights import memory

SHARE = 0.05  # of the memory that is free where the weights are; a larger model is loaded for every cell


@dataclass
class _Kept:
    """`loaded` is model and tokenizer as they were loaded, and None until the same are asked for a second time."""

    key: str = ""
    loaded: tuple[Any, Any] | None = None


_LAST = _Kept()


def load(what: Mapping[str, Any], load: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
    """What `load` returns, a model whose weights are in place and its tokenizer, or a copy of them, equal to the bit.

    `what` is plain JSON that names their files by content, the dtype and the device.  Whatever is done with the copy,
    the next one is as the first.
    """
    key = json.dumps(what, sort_keys=True)
    if _LAST.key != key:
        forget()
        _LAST.key = key
        return load()
    if _LAST.loaded is None:
        loaded = load()
        if _bytes(loaded[0]) > SHARE * memory.free_bytes(loaded[0].device):
            return loaded
        _LAST.loaded = loaded
    return copy.deepcopy(_LAST.loaded)


def nbytes() -> int:
    """What is kept takes so much of the memory where it is, whoever is at work there."""
    return _bytes(_LAST.loaded[0]) if _LAST.loaded is not None else 0


def forget() -> None:
    """Let go of what is kept."""
    _LAST.key, _LAST.loaded = "", None


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
