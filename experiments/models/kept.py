"""The model of consecutive cells, kept in memory.

As it was loaded: a copy of it takes less than reading it anew.  And as the last cell made it, pruned, retrained or
quantised: a cell that measures other things on the same model goes on with it, so that it is made once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
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


@dataclass(frozen=True)
class Made:
    """A model as a cell made it; `key` names all that moves it, `placed` is where its weights are.

    `passed` is by protocol key what its dense model met, `seconds` and `peak_bytes` are what making it took.
    """

    key: str
    model: Any
    tokenizer: Any
    achieved: dict[str, Any]
    passed: dict[str, Any]
    placed: Any
    seconds: dict[str, float]
    peak_bytes: int


@dataclass
class _State:
    """`lasting` counts the blocks within which nothing is let go of at the end of a table."""

    made: Made | None = None
    lasting: int = 0


_LAST = _Kept()
_STATE = _State()


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


def hand_over(made: Made) -> None:
    """Keep it for the next cell; it takes no memory beside that of the cell which made it."""
    _STATE.made = made


def take_over(key: str | None, gated: Collection[str]) -> Made | None:
    """What the last cell made, if that is of this key and its dense model met all that is `gated`; else it is let go
    of, so that another one finds room."""
    made, _STATE.made = _STATE.made, None
    return made if made is not None and made.key == key and set(gated) <= set(made.passed) else None


@contextmanager
def lasting() -> Iterator[None]:
    """Keep models from cell to cell within the block, and let go of them at its end; of blocks within each other at
    the end of the outermost."""
    _STATE.lasting += 1
    try:
        yield
    finally:
        _STATE.lasting -= 1
        if not _STATE.lasting:
            forget()


def nbytes() -> int:
    """What is kept takes so much of the memory where it is, whoever is at work there."""
    return _bytes(_LAST.loaded[0]) if _LAST.loaded is not None else 0


def forget() -> None:
    """Let go of what is kept."""
    _LAST.key, _LAST.loaded = "", None
    _STATE.made = None


def _bytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
