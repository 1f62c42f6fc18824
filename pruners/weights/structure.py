"""What a model is made of, remembered so that it can be put back: classes, modules, parameters, attributes, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pruners.lazy import nn


def remembered(model: nn.Module) -> Callable[[], None]:
    """What puts the model back as it is made now, after blocks were cut, layers replaced or attributes set.

    Values of weights are not remembered.
    """
    kept: list[tuple[Any, type[Any], dict[str, Any], dict[str, dict[Any, Any]]]] = []
    for one in (*model.modules(), model.config):
        attributes = dict(vars(one))
        registers = {name: dict(value) for name, value in attributes.items() if isinstance(value, dict)}
        kept.append((one, type(one), attributes, registers))

    def put_back() -> None:
        for one, kind, attributes, registers in kept:
            one.__class__ = kind
            _refill(vars(one), attributes)
            for name, register in registers.items():  # in place: what removes a hook knows the register
                _refill(attributes[name], register)

    return put_back


def _refill(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    now.clear()
    now.update(before)
