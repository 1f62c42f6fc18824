"""What a model is made of, remembered so that it can be put back: classes, modules, parameters, attributes, hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pruners.lazy import nn

# Attributes that cutting and zeroing set, of whatever module they are; those of ATTRIBUTES, HEADS and KV_HEADS besides
SET = (
    *("config", "num_key_value_groups", "split_size", "intermediate_size", "hidden_size", "embed_dim", "output_name"),
    *("in_features", "out_features", "nx", "nf", "embedding_dim", "normalized_shape"),
    *("variance_epsilon", "counted"),
)
TAKEN = ("forward", "_weight_conversions")  # and those that it drops


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


def uncut(model: nn.Module) -> Callable[[], None]:
    """What undoes cutting and zeroing from now on, but for values of weights: classes, modules, parameters, widths and
    the configuration.  Hooks, modes and attributes that are set meanwhile stay."""
    from pruners.attention_pruned import ATTRIBUTES, HEADS, KV_HEADS, OwnSlopes

    names = {*SET, *ATTRIBUTES, *HEADS, *KV_HEADS}
    kept: list[tuple[Any, type[Any], dict[str, Any], dict[str, Any], dict[str, Any], dict[int, Any]]] = []
    for one in model.modules():
        attributes = {name: value for name, value in vars(one).items() if name in names or name in TAKEN}
        picking = _picking(one, OwnSlopes)
        kept.append((one, type(one), dict(one._modules), dict(one._parameters), attributes, picking))

    def put_back() -> None:
        for one, kind, modules, parameters, attributes, picking in kept:
            one.__class__ = kind
            _refill(one._modules, modules | {name: m for name, m in one._modules.items() if name not in modules})
            _refill(one._parameters, parameters)
            for name in names:
                vars(one).pop(name, None)
            vars(one).update(attributes | {name: vars(one)[name] for name in TAKEN if name in vars(one)})
            for key in _picking(one, OwnSlopes):
                del one._forward_pre_hooks[key], one._forward_pre_hooks_with_kwargs[key]
            one._forward_pre_hooks.update(picking)
            one._forward_pre_hooks_with_kwargs.update(dict.fromkeys(picking, True))

    return put_back


def _picking(module: nn.Module, kind: type[Any]) -> dict[int, Any]:
    """The hooks of that kind by their numbers."""
    return {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, kind)}


def _refill(now: dict[Any, Any], before: dict[Any, Any]) -> None:
    now.clear()
    now.update(before)
