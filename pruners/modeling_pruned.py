"""Decoder models whose blocks have widths of their own, as structured pruning leaves them.

A model folder with a copy of this file and of `attention_pruned.py` opens by
`AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.  They need torch and transformers (5.20 or
newer) and nothing else.

Its config.json is the dense model's, with

    blocks          per block its heads, KV heads and channels, the shape of every parameter that differs from the dense
                    block's (null: it is gone), attributes of attention that do (head_dim, scaling), and with ALiBi the
                    numbers of its heads among those of the dense block
    places          where blocks, query/key/value, output and down (or fc2) projection are
    dense           what the configuration says while the dense model is built, where that differs
    pruned_format   of this description
"""

import json
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, no_type_check

import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from .attention_pruned import head_width, settle, settle_layer  # relative: saving a model copies both files

FORMAT = 2


class WidthsPerBlock:
    """Of a configuration: the description at the top of this file."""

    blocks: list[dict] | None
    num_hidden_layers: int
    pruned_format: int

    def __post_init__(self, **kwargs):
        if self.pruned_format > FORMAT:
            raise ValueError(
                f"This pruned model was saved in format {self.pruned_format} and this code reads up to {FORMAT}; "
                "update this code."
            )
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.blocks is not None and len(self.blocks) != self.num_hidden_layers:
            raise ValueError(
                f"config.json describes {len(self.blocks)} blocks and says num_hidden_layers is "
                f"{self.num_hidden_layers}; it was edited or belongs to another model."
            )
        for index, widths in enumerate(self.blocks or ()):
            wanted = {"heads", "kv_heads", "channels", "biases" if self.pruned_format == 1 else "shapes"}
            if missing := wanted - widths.keys():
                raise ValueError(f"config.json does not say the {', '.join(sorted(missing))} of block {index}.")
            heads, kv_heads, channels = (widths[name] for name in ("heads", "kv_heads", "channels"))
            counts = all(type(width) is int and width >= 0 for width in (heads, kv_heads, channels))
            if not counts or (heads % kv_heads if kv_heads else heads):
                raise ValueError(
                    f"config.json says that block {index} has {heads!r} heads, {kv_heads!r} KV heads and {channels!r} "
                    "channels: whole numbers, of which the first is a multiple of the second."
                )
        if self.blocks is not None and self.pruned_format == 1:
            _from_format_1(self)
        pruned(MODEL_FOR_CAUSAL_LM_MAPPING[type(self).__bases__[-1]])  # so that AutoModelForCausalLM knows its class

    def validate_architecture(self):
        """Dense models tie hidden_size to the number of heads; pruned ones do not."""


def _from_format_1(config):
    """Format 1 knew LLaMA, Mistral and OPT, and said the names of biased projections in place of shapes."""
    opt = isinstance(config, transformers.OPTConfig)
    inward = ["fc1"] if opt else ["mlp.gate_proj", "mlp.up_proj"]
    config.places = {
        "blocks": "model.decoder.layers" if opt else "model.layers",
        "qkv": [f"self_attn.{name}_proj" for name in "qkv"],
        "output": "self_attn.out_proj" if opt else "self_attn.o_proj",
        "outward": "fc2" if opt else "mlp.down_proj",
    }
    width, head_dim, described = config.hidden_size, config.head_dim, []
    for told in config.blocks:
        heads, kv_heads, channels = told["heads"] * head_dim, told["kv_heads"] * head_dim, told["channels"]
        query, key, value = config.places["qkv"]
        rows = {query: heads, key: kv_heads, value: kv_heads, **dict.fromkeys(inward, channels)}
        columns = {config.places["output"]: heads, config.places["outward"]: channels}
        shapes: dict[str, Any] = {
            f"{name}.weight": [rows.get(name, width), columns.get(name, width)] for name in rows | columns
        }
        for name in rows | columns:
            shapes[f"{name}.bias"] = [rows.get(name, width)] if name in told["biases"] else None
        widths = {name: told[name] for name in ("heads", "kv_heads", "channels")}
        described.append(widths | {"shapes": shapes, "attributes": {"head_dim": head_dim, "scaling": head_dim**-0.5}})
    config.blocks, config.pruned_format = described, FORMAT
    config.dense = {"num_attention_heads": 1}  # divides any width


@cache
def configuration(stock: Any) -> Any:
    """The dense configuration's subclass that describes every block, known to AutoConfig."""

    @no_type_check  # transformers' configurations take more keywords than their signatures say
    @strict
    class Configuration(WidthsPerBlock, stock):
        model_type = f"pruned_{stock.model_type}"
        blocks: list[dict] | None = None
        places: dict | None = None
        dense: dict | None = None
        pruned_format: int = FORMAT

    _name(Configuration, stock)
    AutoConfig.register(Configuration.model_type, Configuration, exist_ok=True)
    return Configuration


@cache
def pruned(dense: Any) -> Any:
    """The dense model class's subclass that gives every block its own widths, known to AutoModelForCausalLM."""
    kind: Any = type(
        f"Pruned{dense.__name__}", (PrunedModel, dense), {"config_class": configuration(dense.config_class)}
    )
    _name(kind, dense)
    AutoModelForCausalLM.register(kind.config_class, kind, exist_ok=True)
    return kind


def _name(kind, dense):
    """Under the name by which `__getattr__` finds it again; a saved folder names it if this file is all it needs."""
    kind.__name__ = kind.__qualname__ = f"Pruned{dense.__name__}"
    kind.__module__ = __name__
    kind._auto_class = None
    if dense.__module__.startswith("transformers."):
        kind._auto_class = "AutoModelForCausalLM" if issubclass(kind, nn.Module) else "AutoConfig"


def __getattr__(name):
    """PrunedLlamaConfig, PrunedLlamaForCausalLM and so on, for any configuration and model that transformers has."""
    dense = getattr(transformers, name.removeprefix("Pruned"), None) if name.startswith("Pruned") else None
    if dense is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return pruned(dense) if issubclass(dense, nn.Module) else configuration(dense)


class PrunedModel(nn.Module):
    """Of a model: the dense architecture, in which every parameter of another shape is made anew."""

    def __init__(self, config, *args, **kwargs):
        if config.blocks is None:
            raise ValueError(f"A {config.model_type} configuration needs `blocks`, the widths of every block.")
        with as_dense(config):
            super().__init__(config, *args, **kwargs)
        stack = self.get_submodule(config.places["blocks"])
        for index, (block, widths) in enumerate(zip(stack.children(), config.blocks, strict=True)):
            self._fit(block, widths["shapes"], config)
            settle(block, config.places, widths)
            _check_widths(index, block, config.places, widths)

    def _fit(self, block, shapes, config):
        for name, shape in shapes.items():
            path, _, attribute = name.rpartition(".")
            parent = block.get_submodule(path.rpartition(".")[0])
            if shape is None and isinstance(parent, nn.ModuleList):  # such as one norm a head
                if len(parent) > int(path.rpartition(".")[2]):
                    del parent[int(path.rpartition(".")[2]) :]
                continue
            layer = block.get_submodule(path)
            old = getattr(layer, attribute)
            if shape is None:
                setattr(layer, attribute, None)
                continue
            like = next(block.parameters()) if old is None else old
            new = nn.Parameter(like.new_empty(shape))
            setattr(layer, attribute, new)
            settle_layer(layer)
            if not new.is_meta:  # made anew after the dense class drew its weights
                self._init_weights(layer)  # type: ignore[operator]
                if old is None:  # the dense class has no rule for a bias it has not
                    std = getattr(config, "initializer_range", getattr(config, "init_std", 0.02))
                    nn.init.normal_(new, std=std)

    @classmethod
    def _can_set_attn_implementation(cls):
        """As the dense class, whose attention this is; transformers looks for it in the class's own file."""
        return cls.__bases__[-1]._can_set_attn_implementation()  # type: ignore[attr-defined]

    @classmethod
    def from_pretrained(cls, folder, *args, output_loading_info=False, **kwargs):
        check_shards(Path(folder, kwargs.get("subfolder", "")))
        kwargs["ignore_mismatched_sizes"] = True  # told apart below, in one sentence
        model, info = super().from_pretrained(folder, *args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        check_complete(folder, info)
        return (model, info) if output_loading_info else model


@contextmanager
def as_dense(config):
    """What the configuration says while the dense model is built."""
    dense = config.dense or {}
    kept = {name: getattr(config, name) for name in dense}
    for name, value in dense.items():
        setattr(config, name, value)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)


def _check_widths(index, block, places, widths):
    """ValueError where a block's widths and the shapes of its projections disagree."""
    attention = block.get_submodule(places["output"].rpartition(".")[0])
    size, heads, kv_heads = head_width(attention), widths["heads"], widths["kv_heads"]
    found = {name: block.get_submodule(name).weight.shape for name in (*places["qkv"], places["output"])}
    for name, shape in found.items():
        found[name] = shape[::-1] if isinstance(block.get_submodule(name), Conv1D) else shape
    rows = sum(found[name][0] for name in places["qkv"])
    outward = block.get_submodule(places["outward"])
    channels = outward.weight.shape[0 if isinstance(outward, Conv1D) else 1]
    told = (size * (heads + 2 * kv_heads), size * heads, widths["channels"])
    if told != (rows, found[places["output"]][1], channels):
        raise ValueError(
            f"config.json says other shapes for the projections of block {index} than its {heads} heads, {kv_heads} KV "
            f"heads and {widths['channels']} channels make; it was edited or belongs to another model."
        )


def check_complete(folder, info):
    """ValueError where weights and configuration disagree: transformers would make up or ignore such weights."""
    wrong = {
        "asks for {} that the weights lack": info["missing_keys"],
        "has no place for {} of the weights": [k for k in info["unexpected_keys"] if k.endswith((".weight", ".bias"))],
        "says other shapes for {}": [key for key, *_ in info["mismatched_keys"]],
    }
    for verdict, keys in wrong.items():
        if keys:
            raise ValueError(
                f"The weights in {folder} and its config.json disagree: the configuration "
                f"{verdict.format(f'{len(keys)} tensors')}, e.g. {min(keys)}; one of the two was edited or is "
                "incomplete."
            )


def check_shards(folder):
    """Whether a local folder holds one set of weights, and all of it.

    FileNotFoundError, by name, for weight files that its index names and that are not there.  ValueError where weights
    of another save lie beside them: transformers writes over neither, and reads model.safetensors although the shards
    may be newer.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return
    named, single = indexed(folder), (folder / "model.safetensors").is_file()
    present = [name for name in named if (folder / name).is_file()]
    shards = {path.name for path in folder.glob("model-*-of-*.safetensors")}
    if single and "model.safetensors" not in named and (present or shards):
        _refuse_two(folder, "model.safetensors", sorted({*present, *shards}))
    if present and (others := sorted(shards - set(named))):
        _refuse_two(folder, f"{present[0]} and the other files that its index names", others)
    if missing := [name for name in named if name not in present]:
        if single:  # the index of an earlier save whose shards are gone
            return
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of its {len(named)} weight files, e.g. {missing[0]}; copy it there."
        )


def indexed(folder):
    """The files that the index names, sorted; none without an index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} does not say which file holds which weight; copy it there again.") from error


def _refuse_two(folder, one, others):
    more = f" and {len(others) - 1} more" if len(others) > 1 else ""
    raise ValueError(
        f"{folder} holds two sets of weights, {one} beside {others[0]}{more}, which are ambiguous; move "
        "the older set away (model.safetensors.index.json belongs to the shards)."
    )
