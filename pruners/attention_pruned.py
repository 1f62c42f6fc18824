"""Attention with fewer heads than its model's, down to none, and the attributes that repeat a block's widths.

`modeling_pruned.py` needs this file; both are copied into the folders of pruned models.
"""

import inspect
from functools import cache
from typing import Any

from torch import nn
from transformers import Cache
from transformers.pytorch_utils import Conv1D

HEADS = ("num_heads", "num_attention_heads", "n_heads")  # of an attention module, whatever family it is of
KV_HEADS = ("num_key_value_heads", "num_kv_heads")
ATTRIBUTES = ("head_dim", "head_size", "scaling")  # of attention: what its head size was when it was built


class NoAttention(nn.Module):
    """What a dense attention class becomes without heads: the bias of its output projection.

    The cache counts tokens in the first block, so a block without keys leaves a placeholder of one number a token.
    """

    layer_idx: int
    output_name: str
    hidden_dropout: float

    def forward(self, *args, **kwargs):
        """Hidden states [batch, tokens, width], and no weights [batch, 0, tokens, keys] where attention is eager."""
        dense: Any = type(self).__bases__[-1]
        told = inspect.signature(dense.forward).bind_partial(self, *args, **kwargs).arguments
        hidden_states = told["hidden_states"]
        batch, length, _ = hidden_states.shape
        keys, cache = length, _cache_among((*args, *kwargs.values()))
        if cache is not None:
            placeholder = hidden_states.new_zeros(batch, 1, length, 1)
            keys = cache.update(placeholder, placeholder, self.layer_idx)[0].shape[-2]
        elif kwargs.get("use_cache"):
            raise TypeError(
                "A cache is in use, but attention without heads finds none among its arguments "
                f"({', '.join(kwargs)}); this version of transformers needs a newer version of this module."
            )
        output = self.get_submodule(self.output_name)(hidden_states[..., :0])
        if "residual" in told:  # BLOOM's attention adds it itself
            output = nn.functional.dropout(output, self.hidden_dropout, self.training) + told["residual"]
        eager = getattr(getattr(self, "config", None), "_attn_implementation", "eager") == "eager"
        return output, hidden_states.new_zeros(batch, 0, length, keys) if eager else None

    def __reduce__(self):  # its class is made at run time, so pickles and copies name the dense one
        return _empty, (type(self).__bases__[-1],), self.__dict__


@cache
def without_heads(attention_class):
    """The dense class's subclass for attention that has lost all heads."""
    return type(f"No{attention_class.__name__}", (NoAttention, attention_class), {})


def _empty(attention_class):
    kind = without_heads(attention_class)
    return kind.__new__(kind)


def _cache_among(arguments):
    """By its type: its name among the arguments changes with versions of transformers."""
    return next((argument for argument in arguments if isinstance(argument, Cache)), None)


class EmptyConv1D(Conv1D):
    """One without inputs, of which the dense class's view of its inputs makes an error."""

    def forward(self, x):
        return x.new_zeros(*x.shape[:-1], self.nf) + self.bias


class OwnWidths:
    """The model's configuration as one attention reads it while running, with the numbers of its own heads."""

    def __init__(self, shared, widths):
        vars(self).update(widths, shared=shared)

    def __getattr__(self, name):
        if name == "shared":  # not there yet while it is copied or unpickled
            raise AttributeError(name)
        return getattr(self.shared, name)


class OwnSlopes:
    """Hook that picks what belongs to an attention's own heads, by number, out of what is passed for all of them."""

    def __init__(self, numbers, dense_heads):
        self.numbers, self.dense_heads = numbers, dense_heads

    def __call__(self, module, args, kwargs):
        kwargs = dict(kwargs)
        for name, heads_at in {"alibi": 0, "position_bias": 0, "attention_mask": 1}.items():
            told = kwargs.get(name)
            if told is None or told.ndim < 3:
                continue
            if told.ndim == 4 and name == "alibi":  # [batch, heads, 1, keys]
                heads_at = 1
            if told.shape[heads_at] == self.dense_heads:
                kwargs[name] = told[(slice(None),) * heads_at + (self.numbers,)]
            elif heads_at == 0:  # [batch * heads, 1, keys]
                kwargs[name] = told.unflatten(0, (-1, self.dense_heads))[:, self.numbers].flatten(0, 1)
        return args, kwargs


def settle(block, places, widths):
    """Set every attribute from which a block's forward pass takes a width; scaling stays the dense block's.

    `widths` describe the block as in config.json.  Without heads, attention gives way to its output bias.
    """
    path, _, output = places["output"].rpartition(".")
    attention = block.get_submodule(path)
    for name, value in widths.get("attributes", {}).items():
        setattr(attention, name, value)
    heads, kv_heads, head_dim = widths["heads"], widths["kv_heads"], head_width(attention)
    told = dict.fromkeys(HEADS, heads) | dict.fromkeys(KV_HEADS, kv_heads)
    told |= {"num_key_value_groups": heads // max(kv_heads, 1), "split_size": heads * head_dim}
    for name, width in told.items():
        if hasattr(attention, name):
            setattr(attention, name, width)
    if hasattr(attention, "config"):
        shared = getattr(attention.config, "shared", attention.config)
        attention.config = OwnWidths(shared, {n: told[n] for n in (*HEADS, *KV_HEADS) if hasattr(shared, n)})
    mlp = block.get_submodule(places["outward"].rpartition(".")[0])
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = widths["channels"]
    if "head_numbers" in widths:
        _pick_slopes(attention, widths["head_numbers"], widths["dense_heads"])
    if heads == 0 and not isinstance(attention, NoAttention):
        dense: Any = type(attention)
        attention.__class__, attention.output_name = without_heads(dense), output
        vars(attention).pop("forward", None)  # a wrapper around the dense class's, such as accelerate's


def _pick_slopes(attention, numbers, dense_heads):
    for key, hook in list(attention._forward_pre_hooks.items()):
        if isinstance(hook, OwnSlopes):
            del attention._forward_pre_hooks[key]
            attention._forward_pre_hooks_with_kwargs.pop(key, None)
    attention.register_forward_pre_hook(OwnSlopes(numbers, dense_heads), with_kwargs=True)


def head_width(attention):
    """Channels of one head."""
    return attention.head_dim if hasattr(attention, "head_dim") else attention.head_size


def settle_layer(layer):
    """Set the attributes in which a layer repeats the shape of its weight."""
    shape = layer.weight.shape
    if isinstance(layer, Conv1D):
        layer.nx, layer.nf = shape
        if layer.nx == 0:
            layer.__class__ = EmptyConv1D
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = shape
    elif isinstance(layer, nn.Embedding):
        layer.embedding_dim = shape[1]
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(shape)
