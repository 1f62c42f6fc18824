"""LLaMA, Mistral and OPT models whose blocks have widths of their own, as structured pruning leaves them.

A model folder with a copy of this file opens by `AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)`.
It needs torch and transformers (5.20 or newer) and nothing else.
"""

import json
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, no_type_check

from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import (
    Cache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

FORMAT = 1


class NoAttention(nn.Module):
    """What a dense attention class becomes without heads: the bias of its output projection.

    The cache counts tokens in the first block, so a block without keys leaves a placeholder of one number a token.
    """

    config: Any
    layer_idx: int
    output_name: str

    def forward(self, hidden_states, *args, **kwargs):
        """Hidden states [batch, tokens, width], and no weights [batch, 0, tokens, keys] where attention is eager."""
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
        eager = self.config._attn_implementation == "eager"
        weights = hidden_states.new_zeros(batch, 0, length, keys) if eager else None
        return self.get_submodule(self.output_name)(hidden_states[..., :0]), weights

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


def settle(block, output, heads, kv_heads, head_dim, channels):
    """Set every attribute from which a block's forward pass takes a width; `output` names attention's last projection.

    Without heads, attention gives way to its output bias.
    """
    attention = block.self_attn
    attention.head_dim, attention.scaling = head_dim, head_dim**-0.5
    for name, width in {"num_heads": heads, "num_key_value_groups": heads // max(kv_heads, 1)}.items():
        if hasattr(attention, name):
            setattr(attention, name, width)
    if hasattr(block, "mlp"):
        block.mlp.intermediate_size = channels
    if heads == 0 and not isinstance(attention, NoAttention):
        attention.__class__, attention.output_name = without_heads(type(attention)), output  # type: ignore[arg-type]
        vars(attention).pop("forward", None)  # a wrapper around the dense class's, such as accelerate's


class WidthsPerBlock:
    """Of a configuration: `blocks` holds heads, kv_heads, channels and the names of biased projections, per block."""

    blocks: list[dict] | None
    num_hidden_layers: int
    pruned_format: int

    def __post_init__(self, **kwargs):
        if self.pruned_format > FORMAT:
            raise ValueError(
                f"This pruned model was saved in format {self.pruned_format} and this code reads up to {FORMAT}; "
                "update the code that opens it."
            )
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.blocks is not None and len(self.blocks) != self.num_hidden_layers:
            raise ValueError(
                f"config.json describes {len(self.blocks)} blocks and says num_hidden_layers is "
                f"{self.num_hidden_layers}; it was edited or belongs to another model."
            )
        for index, widths in enumerate(self.blocks or ()):
            if missing := {"heads", "kv_heads", "channels", "biases"} - widths.keys():
                raise ValueError(f"config.json does not say the {', '.join(sorted(missing))} of block {index}.")
            heads, kv_heads, channels = (widths[name] for name in ("heads", "kv_heads", "channels"))
            counts = all(type(width) is int and width >= 0 for width in (heads, kv_heads, channels))
            if not counts or (heads % kv_heads if kv_heads else heads):
                raise ValueError(
                    f"config.json says that block {index} has {heads!r} heads, {kv_heads!r} KV heads and {channels!r} "
                    "channels: whole numbers, of which the first is a multiple of the second."
                )

    def validate_architecture(self):
        """Dense models tie hidden_size to the number of heads; pruned ones do not."""


@no_type_check  # transformers' configurations take more keywords than their signatures say
@strict
class PrunedLlamaConfig(WidthsPerBlock, LlamaConfig):
    model_type = "pruned_llama"
    blocks: list[dict] | None = None
    pruned_format: int = FORMAT


@no_type_check
@strict
class PrunedMistralConfig(WidthsPerBlock, MistralConfig):
    model_type = "pruned_mistral"
    blocks: list[dict] | None = None
    pruned_format: int = FORMAT


@no_type_check
@strict
class PrunedOPTConfig(WidthsPerBlock, OPTConfig):
    model_type = "pruned_opt"
    blocks: list[dict] | None = None
    head_dim: int | None = None
    pruned_format: int = FORMAT


class PrunedModel(nn.Module):
    """Of a model: the dense architecture, then every projection of every block made anew in its own width."""

    blocks_at = "model.layers"
    output = "self_attn.o_proj"
    rows: ClassVar[dict[str, str]] = {
        "self_attn.q_proj": "heads",
        "self_attn.k_proj": "kv_heads",
        "self_attn.v_proj": "kv_heads",
        "mlp.gate_proj": "channels",
        "mlp.up_proj": "channels",
    }
    columns: ClassVar[dict[str, str]] = {"self_attn.o_proj": "heads", "mlp.down_proj": "channels"}

    def __init__(self, config, *args, **kwargs):
        if config.blocks is None:
            raise ValueError(f"A {config.model_type} configuration needs `blocks`, the widths of every block.")
        with _narrow(config):
            super().__init__(config, *args, **kwargs)
        stack = self.get_submodule(self.blocks_at)
        for block, widths in zip(stack.children(), config.blocks, strict=True):
            self._fit(block, widths, config)

    def _fit(self, block, widths, config):
        heads, kv_heads, channels = (widths[name] for name in ("heads", "kv_heads", "channels"))
        sizes = {"heads": heads * config.head_dim, "kv_heads": kv_heads * config.head_dim, "channels": channels}
        for name in (*self.rows, *self.columns):
            dense, had_bias = block.get_submodule(name).weight, block.get_submodule(name).bias is not None
            linear = nn.Linear(1, 1, bias=name in widths["biases"], device=dense.device, dtype=dense.dtype)
            out_features = sizes[self.rows[name]] if name in self.rows else config.hidden_size
            in_features = sizes[self.columns[name]] if name in self.columns else config.hidden_size
            resize(linear, out_features, in_features)
            block.set_submodule(name, linear)
            if not linear.weight.is_meta:  # made anew after the dense class drew its weights
                self._init_weights(linear)  # type: ignore[operator]
                if linear.bias is not None and not had_bias:  # the dense class has no rule for a bias it has not
                    std = getattr(config, "initializer_range", getattr(config, "init_std", 0.02))
                    nn.init.normal_(linear.bias, std=std)
        settle(block, self.output.removeprefix("self_attn."), heads, kv_heads, config.head_dim, channels)

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


def resize(linear, out_features, in_features):
    """Give a linear layer other widths and new weights, which are not initialised."""
    linear.out_features, linear.in_features = out_features, in_features
    linear.weight = nn.Parameter(linear.weight.new_empty(out_features, in_features))
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.new_empty(out_features))


class PrunedLlamaForCausalLM(PrunedModel, LlamaForCausalLM):  # type: ignore[misc]
    config_class = PrunedLlamaConfig


class PrunedMistralForCausalLM(PrunedModel, MistralForCausalLM):  # type: ignore[misc]
    config_class = PrunedMistralConfig


class PrunedOPTForCausalLM(PrunedModel, OPTForCausalLM):  # type: ignore[misc]
    config_class = PrunedOPTConfig
    blocks_at = "model.decoder.layers"
    output = "self_attn.out_proj"
    rows: ClassVar[dict[str, str]] = {
        "self_attn.q_proj": "heads",
        "self_attn.k_proj": "kv_heads",
        "self_attn.v_proj": "kv_heads",
        "fc1": "channels",
    }
    columns: ClassVar[dict[str, str]] = {"self_attn.out_proj": "heads", "fc2": "channels"}


CLASSES: dict[str, Any] = {
    "llama": PrunedLlamaForCausalLM,
    "mistral": PrunedMistralForCausalLM,
    "opt": PrunedOPTForCausalLM,
}


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
                f"{verdict.format(f'{len(keys)} tensors')}, e.g. {min(keys)}; one of the two was edited or did not "
                "arrive whole."
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
    named, single = _indexed(folder), (folder / "model.safetensors").is_file()
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


def _indexed(folder):
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
        f"{folder} holds two sets of weights, {one} beside {others[0]}{more}, and which is meant cannot be told; move "
        "the older set away (model.safetensors.index.json belongs to the shards)."
    )


@contextmanager
def _narrow(config):
    """Widths of one for a while: what is built with them is replaced at once."""
    widths = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "ffn_dim")
    kept = {name: getattr(config, name) for name in widths if hasattr(config, name)}
    for name in kept:
        setattr(config, name, 1)
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(config, name, value)
