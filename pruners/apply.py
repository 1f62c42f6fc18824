"""Takes units out of a model: zeroes their weights, or cuts them out and gives the model a configuration that fits.

A unit is a KV head with its query heads, or a neuron of an MLP; for `narrow`, a channel of the residual stream.  Both
ways remove it from every projection that holds a part of it, so masked and cut models compute the same.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pruners import anatomy
from pruners.anatomy import Block
from pruners.lazy import Bool, Float, Tensor, nn, torch

KINDS = ("attention", "mlp")


@dataclass(frozen=True)
class Kept:
    """Which units of one block stay: KV heads with their query heads, and MLP channels.

    `rounding` of the channels stay only because a width was to be round.
    """

    attention: Bool[Tensor, " kv_heads"]
    mlp: Bool[Tensor, " channels"]
    rounding: int = 0

    @classmethod
    def all(cls, block: Block) -> Kept:
        attention, mlp = (torch.ones(block.units(kind), dtype=torch.bool) for kind in KINDS)
        return cls(attention, mlp)

    def __getitem__(self, kind: str) -> Tensor:
        return getattr(self, kind)


def check(model: nn.Module) -> None:
    """TypeError for a model whose class `describe` could not replace once it is cut."""
    anatomy.family(model)
    stock = _class_for(model).__bases__[-1]
    if not isinstance(model, stock):
        raise TypeError(f"Structured pruning needs a {stock.__name__}; got a {type(model).__name__}.")


def zero(block: Block, kept: Kept) -> None:
    """Zero every row, column and bias of the units that go; shapes stay."""
    for linear, rows, index in _held(block, kept):
        gone = ~index.to(linear.weight.device)
        linear.weight.data.masked_fill_(gone[:, None] if rows else gone, 0)
        if rows and linear.bias is not None:
            linear.bias.data.masked_fill_(gone, 0)


def cut(block: Block, kept: Kept) -> None:
    """Slice the units that go out of their projections, and set every width that the block's forward pass reads."""
    head_dim, queries = block.head_dim, block.heads // max(block.kv_heads, 1)
    for linear, rows, index in _held(block, kept):
        chosen = index.nonzero().squeeze(1)
        linear.weight = _chosen(linear.weight, 0 if rows else 1, chosen)
        if rows and linear.bias is not None:
            linear.bias = _chosen(linear.bias, 0, chosen)
        linear.out_features, linear.in_features = linear.weight.shape
    kv_heads, channels = int(kept.attention.sum()), int(kept.mlp.sum())
    output = block.family.output.rpartition(".")[2]
    from pruners import modeling_pruned

    modeling_pruned.settle(block.module, output, kv_heads * queries, kv_heads, head_dim, channels)


def add_bias(linear: nn.Linear, bias: Float[Tensor, " out"]) -> None:
    """Add to the layer's bias, making one if it has none."""
    bias = bias.to(linear.weight)
    if linear.bias is None:
        linear.bias = nn.Parameter(bias, requires_grad=linear.weight.requires_grad)
    else:
        linear.bias.data += bias


def describe(model: nn.Module) -> None:
    """Give a model with blocks of their own widths a configuration that says them and the class that reads it.

    From then on `save_pretrained` writes a folder that opens again.  A configuration shared with other models stays.
    """
    from pruners import modeling_pruned

    blocks = anatomy.blocks(model)
    config = _own_config(model)
    kind = _class_for(model)
    if not isinstance(model, modeling_pruned.PrunedModel):
        model.__class__, config.__class__ = kind, kind.config_class
        config.pruned_format = modeling_pruned.FORMAT
    config.blocks = [_widths(block) for block in blocks]
    config.head_dim = blocks[0].head_dim
    # One number for all blocks: what a reader that knows of no other has to reckon with.
    config.num_attention_heads = max(1, *(block.heads for block in blocks))
    widths = {"num_key_value_heads": [b.kv_heads for b in blocks], "intermediate_size": [b.channels for b in blocks]}
    widths["ffn_dim"] = widths["intermediate_size"]
    for name, values in widths.items():
        if hasattr(config, name):
            setattr(config, name, max(1, *values))


def keep_first(model: nn.Module, count: int) -> None:
    """Drop every block after the first `count`."""
    blocks = anatomy.blocks(model)
    stack = model.get_submodule(blocks[0].family.blocks)
    assert isinstance(stack, nn.ModuleList)
    del stack[count:]
    config = _own_config(model)
    config.num_hidden_layers = count
    for name in ("layer_types", "blocks"):
        if getattr(config, name, None) is not None:
            setattr(config, name, getattr(config, name)[:count])


def silence(block: Block) -> None:
    """Let a block pass its input on unchanged, in place of dropping it; ValueError where a norm follows the sum."""
    if not getattr(block.module, "do_layer_norm_before", True):
        raise ValueError(
            f"{block.name} normalises after adding (OPT-350M), so no zeros make it pass its input on; use cut=True."
        )
    zero(block, Kept(torch.zeros(block.kv_heads, dtype=torch.bool), torch.zeros(block.channels, dtype=torch.bool)))
    for name in (block.family.output, block.family.outward):
        if block.linear(name).bias is not None:
            block.linear(name).bias.data.zero_()


def residual(model: nn.Module) -> dict[str, int]:
    """Where the residual stream's width is: parameter name (tied ones under every name) -> dimension.

    ValueError for a model with parameters outside its blocks' projections that have another width.
    """
    width, blocks = _config(model).hidden_size, anatomy.blocks(model)
    inside = {f"{b.name}.{name}.{which}": None for b in blocks for name in b.linears() for which in ("weight", "bias")}
    found = {f"{b.name}.{name}.weight": 1 for b in blocks for name in b.linears()}
    for block in blocks:
        for name in (block.family.output, block.family.outward):
            found |= {f"{block.name}.{name}.weight": 0, f"{block.name}.{name}.bias": 0}
    names = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in names.items():
        if name in inside:
            continue
        if parameter.shape[-1] != width:
            raise ValueError(
                f"{name} is {list(parameter.shape)} and the residual stream {width} wide; a model that projects its "
                "embeddings (OPT-350M) cannot lose channels of it. Prune by block instead."
            )
        found[name] = parameter.ndim - 1
    return {name: dim for name, dim in found.items() if name in names}


def narrow(model: nn.Module, keep: Bool[Tensor, " width"]) -> None:
    """Cut channels of the residual stream out of the whole model."""
    chosen, width = keep.nonzero().squeeze(1), int(keep.sum())
    head_dim = anatomy.blocks(model)[0].head_dim
    cuts: dict[int, nn.Parameter] = {}  # by the old parameter, so that what was tied stays tied
    for name, dim in residual(model).items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, attribute)
        if id(old) not in cuts:
            cuts[id(old)] = _chosen(old, dim, chosen)
        setattr(owner, attribute, cuts[id(old)])
    config = _own_config(model)
    for module in model.modules():
        _set_width(module, width)
    config.hidden_size, config.head_dim = width, head_dim
    if hasattr(config, "word_embed_proj_dim"):
        config.word_embed_proj_dim = width


def zero_narrow(model: nn.Module, keep: Bool[Tensor, " width"]) -> None:
    """Zero channels of the residual stream; RMS norms, which divide by the width, are rescaled to that of the cut.

    ValueError for models with layer norms: they centre over all channels, and no rescaling undoes that.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    if norms:
        raise ValueError(
            "Layer norms centre over every channel, so zeroed channels of the residual stream still count and no "
            "masked form equals the cut one; use cut=True."
        )
    gone = (~keep).nonzero().squeeze(1)
    for name, dim in residual(model).items():
        parameter = model.get_parameter(name)
        parameter.data.index_fill_(dim, gone.to(parameter.device), 0)
    share = int(keep.sum()) / len(keep)
    module: Any
    for module in model.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon *= share
            module.weight.data *= math.sqrt(share)
    config = _own_config(model)
    config.rms_norm_eps *= share


def _held(block: Block, kept: Kept) -> Iterator[tuple[nn.Linear, bool, Bool[Tensor, " index"]]]:
    """Every projection with a part in the block's units, whether it holds rows of them, and which indices stay."""
    for kind, parts in block.parts.items():
        for part in parts:
            linear = block.linear(part.projection)
            yield linear, part.rows, kept[kind].repeat_interleave(part.size)


def _chosen(parameter: Tensor, dim: int, chosen: Tensor) -> nn.Parameter:
    data = parameter.data.index_select(dim, chosen.to(parameter.device))
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _config(model: nn.Module) -> Any:
    return model.config


def _class_for(model: nn.Module) -> type[Any]:
    from pruners.modeling_pruned import CLASSES

    return CLASSES[_config(model).model_type.removeprefix("pruned_")]


def _own_config(model: nn.Module) -> Any:
    """A copy of the model's configuration in place of the old one, which other models may share."""
    old = _config(model)
    new = copy.deepcopy(old)
    module: Any
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = new
    return new


def _widths(block: Block) -> dict[str, Any]:
    biased = [name for name, linear in block.linears().items() if linear.bias is not None]
    return {"heads": block.heads, "kv_heads": block.kv_heads, "channels": block.channels, "biases": biased}


def _set_width(module: Any, width: int) -> None:
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Embedding):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = (width,)
    for name in ("hidden_size", "embed_dim"):
        if hasattr(module, name):
            setattr(module, name, width)
