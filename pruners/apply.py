"""Removes units from a model: zeroes their weights, or cuts them out and gives the model a configuration that fits.

A unit is a KV head with its query heads, or a neuron of an MLP; for `narrow`, a channel of the residual stream.  Both
ways remove it from every projection that holds a part of it, so masked and cut models compute the same.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

from pruners import anatomy
from pruners.anatomy import Block
from pruners.lazy import Bool, Float, Tensor, nn, torch
from pruners.run import matrices, means
from pruners.run.matrices import Matrix

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
    """ValueError for a model that `describe` could not describe once it is cut."""
    kind = anatomy.family(model)
    if kind.experts:
        raise ValueError(
            f"{type(model).__name__} has routed experts, for which structured pruning is not supported; use "
            "an unstructured method, e.g. pruners.Wanda."
        )


def check_class(model: nn.Module, kind: type[Any] | None = None) -> None:
    """ValueError for a model of an own subclass, whose overrides would be lost once it is cut, or saved and opened.

    `kind` is the class that its configuration makes; None: the one of its family, dense or pruned.
    """
    from pruners import modeling_pruned

    if kind is None:
        stock = _stock_class(model)
        kind = modeling_pruned.pruned(stock) if isinstance(model, modeling_pruned.PrunedModel) else stock
    if type(model) is not kind:
        raise ValueError(
            f"This model is a {type(model).__name__}, and what is saved would open as a {kind.__name__}, without what "
            f"the other class does otherwise; load the weights as a {kind.__name__}."
        )


def zero(block: Block, kept: Kept) -> None:
    """Zero every row, column and bias of the units that go; shapes stay.

    A norm over all heads is rescaled, weight and epsilon, to what it does once the heads are cut out; neither its
    epsilon nor which heads it counts is part of what a model saves, so `checkpoint.save` refuses it.
    """
    for name, (rows, gone) in _gone(block, kept).items():
        linear = block.linear(name)
        index = gone.nonzero().squeeze(1).to(linear.weight.device)
        linear.weight.data.index_fill_(int(not rows), index, 0)
        if rows and linear.bias is not None:
            linear.bias.data.index_fill_(0, index, 0)
    for norm, index in means.over_heads(block):
        counted = means.counted(norm)
        counted[index[~kept.attention].flatten()] = False
        means.count(norm, counted)


def cut(block: Block, kept: Kept) -> None:
    """Slice the units that go out of their projections, and set every width that the block's forward pass reads."""
    from pruners.attention_pruned import settle, settle_layer

    for norm, index in means.over_heads(block):
        means.count(norm, means.counted(norm)[index[kept.attention].flatten()])
    widths = widths_left(block, kept)
    followers = block.followers
    for name, (rows, gone) in _gone(block, kept).items():
        linear, chosen = block.linear(name), (~gone).nonzero().squeeze(1)
        layer: Any = matrices.owner(linear)
        dim = matrices.dimension(linear, rows)
        layer.weight = _chosen(layer.weight, dim, chosen)
        if rows and linear.bias is not None:
            layer.bias = _chosen(layer.bias, 0, chosen)
        settle_layer(layer)
    for follower in followers:
        _follow(block.module.get_submodule(follower.norm), follower, kept.attention)
    settle(block.module, places(block.family), widths)


def widths_left(block: Block, kept: Kept) -> dict[str, Any]:
    """How many heads, KV heads and channels stay; with ALiBi, which heads of the dense block."""
    units = int(kept.attention.sum())
    kv_heads = min(block.kv_heads, units) if block.multi_query else units
    widths: dict[str, Any] = {"heads": units * block.queries, "kv_heads": kv_heads, "channels": int(kept.mlp.sum())}
    if block.family.slopes:
        own = next((hook for hook in block.attention._forward_pre_hooks.values() if hasattr(hook, "numbers")), None)
        numbers = torch.tensor(own.numbers if own else range(block.heads), dtype=torch.long)
        stay = numbers.view(len(kept.attention), block.queries)[kept.attention] if len(numbers) else numbers
        widths["head_numbers"] = stay.flatten().tolist()
        widths["dense_heads"] = own.dense_heads if own else block.heads
    return widths


def places(family: anatomy.Family) -> dict[str, Any]:
    """What a saved configuration says of the family's entry."""
    return {
        "blocks": family.blocks,
        "qkv": list(family.qkv),
        "output": family.output,
        "outward": family.outward,
    }


def add_bias(linear: Matrix, bias: Float[Tensor, " out"]) -> None:
    """Add to the layer's bias, making one if it has none."""
    bias = bias.to(linear.weight)
    if linear.bias is None:
        matrices.owner(linear).bias = nn.Parameter(bias, requires_grad=linear.weight.requires_grad)
    else:
        linear.bias.data += bias


def describe(model: nn.Module) -> None:
    """Give a model with blocks of their own widths a configuration that says them and the class that reads it.

    From then on `save_pretrained` writes a folder that opens again.  A configuration shared with other models stays.
    """
    from pruners import modeling_pruned

    blocks = anatomy.blocks(model)
    config, stock = _own_config(model), _stock_class(model)
    kind = modeling_pruned.pruned(stock)
    if not isinstance(model, modeling_pruned.PrunedModel):
        model.__class__, config.__class__ = kind, kind.config_class
        vars(model).pop("_weight_conversions", None)  # to names of files that only the dense class reads
        config.pruned_format, config.dense = modeling_pruned.FORMAT, vars(config).get("dense")
    vars(config).pop("auto_map", None)  # of the code that the dense model's folder may have carried
    config.places = places(blocks[0].family)
    dense_config = copy.deepcopy(config)
    dense_config.__class__ = stock.config_class
    for name, value in (config.dense or {}).items():
        setattr(dense_config, name, value)
    with torch.device("meta"):
        dense = stock(dense_config)
    stack = dense.get_submodule(blocks[0].family.blocks)
    config.blocks = [_description(*pair) for pair in zip(blocks, stack.children(), strict=True)]


def _description(block: Block, dense: nn.Module) -> dict[str, Any]:
    """The block as config.json says it, beside the same block of the dense model."""
    from pruners.attention_pruned import ATTRIBUTES

    found = {name: list(p.shape) for name, p in block.module.named_parameters()}
    before = {name: list(p.shape) for name, p in dense.named_parameters()}
    shapes = {name: found.get(name) for name in before | found if found.get(name) != before.get(name)}
    attention = dense.get_submodule(block.family.attention)
    other = {
        name: getattr(block.attention, name)
        for name in ATTRIBUTES
        if hasattr(attention, name) and getattr(attention, name) != getattr(block.attention, name)
    }
    return widths_left(block, Kept.all(block)) | {"shapes": shapes} | ({"attributes": other} if other else {})


def keep_first(model: nn.Module, count: int) -> None:
    """Drop every block after the first `count`."""
    blocks = anatomy.blocks(model)
    stack = model.get_submodule(blocks[0].family.blocks)
    assert isinstance(stack, nn.ModuleList)
    del stack[count:]
    config = _own_config(model)
    config.num_hidden_layers = count
    for name, value in list(vars(config).items()):  # layer_types, no_rope_layers, blocks, ...
        if isinstance(value, list) and len(value) == len(blocks) and ("layer" in name or name == "blocks"):
            setattr(config, name, value[:count])


def silence(block: Block) -> None:
    """Let a block pass its input on unchanged, in place of dropping it; ValueError where a norm follows the sum."""
    needed = block.family.passes_on
    if needed is None or any(getattr(block.config, name, value) != value for name, value in needed.items()):
        raise ValueError(
            f"{block.name} has a norm after its residual sum, so zeroing cannot make it the identity; use cut=True."
        )
    attention, mlp = (torch.zeros(block.units(kind), dtype=torch.bool) for kind in KINDS)
    zero(block, Kept(attention, mlp))
    for name in (block.family.output, block.family.outward):
        bias = block.linear(name).bias
        if bias is not None:
            bias.data.zero_()


def residual(model: nn.Module) -> dict[str, int]:
    """Where the residual stream's width is: parameter name (tied ones under every name) -> dimension.

    ValueError for a family whose residual stream cannot be cut, and for a model with parameters outside its blocks'
    projections that have another width.
    """
    if reason := anatomy.family(model).fixed_width:
        raise ValueError(
            f"Channels of the residual stream cannot be removed from {type(model).__name__}: {reason}. Prune "
            "by block or by layer instead."
        )
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
                f"{name} is {list(parameter.shape)} and the residual stream {width} wide; channels cannot be "
                "removed from a model that projects its embeddings (OPT-350M). Prune by block instead."
            )
        found[name] = parameter.ndim - 1
    return {name: dim for name, dim in found.items() if name in names}


def narrow(model: nn.Module, keep: Bool[Tensor, " width"]) -> None:
    """Cut channels of the residual stream out of the whole model."""
    chosen, width = keep.nonzero().squeeze(1), int(keep.sum())
    head_dim, config = anatomy.blocks(model)[0].head_dim, _own_config(model)
    means.count_channels(model, config, means.counted_channels(config)[keep])
    cuts: dict[int, nn.Parameter] = {}  # by the old parameter, so that what was tied stays tied
    for name, dim in residual(model).items():
        path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(path)
        old = getattr(owner, attribute)
        if id(old) not in cuts:
            cuts[id(old)] = _chosen(old, dim, chosen)
        setattr(owner, attribute, cuts[id(old)])
    for module in model.modules():
        _set_width(module, width)
    config.hidden_size, config.head_dim = width, head_dim
    if width % config.num_attention_heads:  # of which some dense classes make an error
        config.dense = {"num_attention_heads": 1}
    if hasattr(config, "word_embed_proj_dim"):
        config.word_embed_proj_dim = width


def zero_narrow(model: nn.Module, keep: Bool[Tensor, " width"]) -> None:
    """Zero channels of the residual stream; RMS norms, which divide by the width, are rescaled to that of the cut.

    ValueError for models with layer norms: they centre over all channels, and no rescaling undoes that.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    if norms:
        raise ValueError(
            "Layer norms average over all channels, so zeroing channels of the residual stream does not "
            "equal cutting them out; use cut=True."
        )
    gone = (~keep).nonzero().squeeze(1)
    for name, dim in residual(model).items():
        parameter = model.get_parameter(name)
        parameter.data.index_fill_(dim, gone.to(parameter.device), 0)
    config = _own_config(model)
    means.count_channels(model, config, means.counted_channels(config) & keep)


def _gone(block: Block, kept: Kept) -> dict[str, tuple[bool, Bool[Tensor, " index"]]]:
    """By projection whether its rows or its columns go, and which."""
    found: dict[str, tuple[bool, Tensor]] = {}
    parts = [(part, ~kept[kind]) for kind, parts in block.parts.items() for part in parts]
    parts += [(part, torch.ones(1, dtype=torch.bool)) for part in block.last_parts if not kept.attention.any()]
    for part, units in parts:
        if part.projection not in found:
            weight = block.linear(part.projection).weight
            found[part.projection] = part.rows, torch.zeros(weight.shape[int(not part.rows)], dtype=torch.bool)
        found[part.projection][1][part.index[units].flatten()] = True
    return found


def _follow(norm: Any, follower: anatomy.Follower, kept: Bool[Tensor, " units"]) -> None:
    """Keep what a norm of queries or keys has for the units that stay."""
    chosen = follower.index[kept].flatten()
    if follower.children:
        (listed,) = norm.children()
        stay = [listed[index] for index in chosen]
        del listed[:]
        listed.extend(stay)
        return
    for name, parameter in norm.named_parameters(recurse=False):
        setattr(norm, name, _chosen(parameter, 0, chosen))


def _chosen(parameter: Tensor, dim: int, chosen: Tensor) -> nn.Parameter:
    data = parameter.data.index_select(dim, chosen.to(parameter.device))
    return nn.Parameter(data, requires_grad=parameter.requires_grad)


def _config(model: nn.Module) -> Any:
    return model.config


def _stock_class(model: nn.Module) -> Any:
    """The dense class of models of that type."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    dense = _config(model).model_type.removeprefix("pruned_")
    stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[dense]]
    return stock


def _own_config(model: nn.Module) -> Any:
    """A copy of the model's configuration in place of the old one, which other models may share."""
    old = _config(model)
    new = copy.deepcopy(old)
    module: Any
    for module in model.modules():
        held: Any = getattr(module, "config", None)
        if held is old:
            module.config = new
        elif getattr(held, "shared", None) is old:
            module.config = copy.copy(held)
            module.config.shared = new
    return new


def _set_width(module: Any, width: int) -> None:
    from pruners.attention_pruned import settle_layer

    if isinstance(module, nn.Linear | nn.Embedding | nn.LayerNorm):
        settle_layer(module)
    for name in ("hidden_size", "embed_dim"):
        if hasattr(module, name):
            setattr(module, name, width)
