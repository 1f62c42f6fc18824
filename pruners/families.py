"""Where each decoder family keeps its blocks, heads and projections: one entry a family, told apart by `model_type`.

attention   query, key, value share one input; output reads the heads' concatenation
MLP         inward projections (gate and up, or fc1) share one input; outward (down, or fc2) reads the channels

An entry holds names and a layout and no code, and nothing else is known about a family anywhere.  `family` finds a
model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pruners.interface.suggest import unknown
from pruners.lazy import nn

LAYOUTS = ("separate", "stacked", "grouped")
NOT_NARROWED = "only LLaMA, Mistral, Qwen2, SmolLM3 and OPT are known to compute the same with it cut"
SCALED = "its embeddings are scaled by the square root of the width"
NORMED = "its queries and keys have norms of other widths"


@dataclass(frozen=True)
class Family:
    """Dotted names: of the list of blocks within the model, of everything else within a block.

    `qkv` names query, key and value, or the one matrix that holds all three; `layout` is then "stacked" (all queries,
    all keys, all values) or "grouped" (KV head by KV head its queries, its key, its value).  An inward matrix with
    twice as many rows as the outward one has columns is gate over up.
    `query_norm`, `key_norm`: norms with a weight for every channel or head of query and key (absent ones are skipped;
    a norm that all heads share is none).
    `slopes`: the argument of attention that holds a number for every head (ALiBi).
    `experts`: the module of routed experts, in whose place blocks may have a plain MLP.  `router`: its router.
    `passes_on`: what the configuration must say for a block of zeros to pass its input on; None where none does.
    `calls_layers`: what the configuration must say for every projection to run as the layer that it is.
    `fixed_width`: why no channels of the residual stream can be removed; empty where they can.
    """

    blocks: str
    qkv: tuple[str, ...]
    output: str
    inward: tuple[str, ...]
    outward: str
    layout: str = "separate"
    query_norm: str = ""
    key_norm: str = ""
    slopes: str = ""
    experts: str = ""
    router: str = ""
    passes_on: Mapping[str, Any] | None = None
    calls_layers: Mapping[str, Any] = field(default_factory=dict)
    fixed_width: str = NOT_NARROWED

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS or len(self.qkv) != (3 if self.layout == "separate" else 1):
            raise ValueError(
                f"A family names three projections in qkv, or one whose layout is stacked or grouped; got {self.qkv} "
                f"with layout {self.layout!r}."
            )

    @property
    def attention(self) -> str:
        """The module that holds the output projection."""
        return self.output.rpartition(".")[0]


ALWAYS: Mapping[str, Any] = {}
LLAMA = Family(
    blocks="model.layers",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    output="self_attn.o_proj",
    inward=("mlp.gate_proj", "mlp.up_proj"),
    outward="mlp.down_proj",
    passes_on=ALWAYS,
    fixed_width="",
)
FIXED = replace(LLAMA, fixed_width=NOT_NARROWED)
QK_NORM = replace(LLAMA, fixed_width=NORMED)
NORM_OF_ALL_HEADS = replace(QK_NORM, query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
OPT = replace(
    LLAMA,
    blocks="model.decoder.layers",
    output="self_attn.out_proj",
    inward=("fc1",),
    outward="fc2",
    passes_on={"do_layer_norm_before": True},
)
GLM = replace(FIXED, inward=("mlp.gate_up_proj",))
BLOOM = Family(
    blocks="transformer.h",
    qkv=("self_attention.query_key_value",),
    layout="grouped",
    output="self_attention.dense",
    inward=("mlp.dense_h_to_4h",),
    outward="mlp.dense_4h_to_h",
    slopes="alibi",
    passes_on={"apply_residual_connection_post_layernorm": False},
    calls_layers={"slow_but_exact": False},
)
GPT2 = Family(
    blocks="transformer.h",
    qkv=("attn.c_attn",),
    layout="stacked",
    output="attn.c_proj",
    inward=("mlp.c_fc",),
    outward="mlp.c_proj",
    passes_on=ALWAYS,
)
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "opt": OPT,
    "qwen2": LLAMA,
    "smollm3": LLAMA,
    "qwen3": QK_NORM,
    "gemma": replace(LLAMA, fixed_width=SCALED),
    "gemma2": replace(LLAMA, fixed_width=SCALED),
    "gemma3_text": replace(LLAMA, fixed_width=SCALED),
    "granite": FIXED,
    "olmo": FIXED,
    "olmo2": NORM_OF_ALL_HEADS,
    "olmo3": NORM_OF_ALL_HEADS,
    "cohere": NORM_OF_ALL_HEADS,
    "cohere2": FIXED,
    "stablelm": replace(FIXED, query_norm="self_attn.q_layernorm", key_norm="self_attn.k_layernorm"),
    "phi": replace(FIXED, output="self_attn.dense", inward=("mlp.fc1",), outward="mlp.fc2"),
    "phi3": replace(GLM, qkv=("self_attn.qkv_proj",), layout="stacked"),
    "glm": GLM,
    "glm4": GLM,
    "starcoder2": replace(FIXED, inward=("mlp.c_fc",), outward="mlp.c_proj"),
    "nemotron": replace(FIXED, inward=("mlp.up_proj",)),
    "mixtral": replace(FIXED, experts="mlp.experts", router="mlp.gate"),
    "qwen3_moe": replace(QK_NORM, experts="mlp.experts", router="mlp.gate"),
    "bloom": BLOOM,
    "falcon": replace(BLOOM, passes_on=ALWAYS),
    "gpt_neox": replace(
        BLOOM,
        blocks="gpt_neox.layers",
        qkv=("attention.query_key_value",),
        output="attention.dense",
        slopes="",
        passes_on=ALWAYS,
    ),
    "chatglm": replace(
        BLOOM,
        blocks="transformer.layers",
        qkv=("attention.query_key_value",),
        output="attention.dense",
        slopes="",
        passes_on=None,
    ),
    "gpt2": GPT2,
    "gptj": replace(
        GPT2,
        qkv=("attn.q_proj", "attn.k_proj", "attn.v_proj"),
        layout="separate",
        output="attn.out_proj",
        inward=("mlp.fc_in",),
        outward="mlp.fc_out",
    ),
    "mpt": replace(
        GPT2,
        blocks="transformer.blocks",
        qkv=("attn.Wqkv",),
        output="attn.out_proj",
        inward=("ffn.up_proj",),
        outward="ffn.down_proj",
        slopes="position_bias",
    ),
}
REFUSED = {  # by model type: why no entry can describe it
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3"), "its keys and values are projected from a latent vector that all heads share"
    ),
    "gpt_oss": "its experts' matrices are transposed, with gate and up interleaved",
}


def known(model: nn.Module) -> bool:
    """Whether the model's family has an entry and its layers are plain, neither wrapped nor quantised."""
    plain = not (hasattr(model, "merge_and_unload") or getattr(model, "is_quantized", False))
    return plain and _model_type(model) in FAMILIES


def _model_type(model: nn.Module) -> str:
    told = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    return told.removeprefix("pruned_")


def family(model: nn.Module) -> Family:
    """The model's entry; ValueError says what to add where there is none.

    TypeError for what wraps a model (adapters of peft, data parallelism) and for a model without its head.
    """
    _refuse_wrapped(model)
    model_type = _model_type(model)
    if model_type in REFUSED:
        raise ValueError(f"{type(model).__name__} cannot be pruned here: {REFUSED[model_type]}.")
    if model_type not in FAMILIES:
        _refuse_more_than_text(model, model_type)
        raise ValueError(
            f"{unknown('decoder family', model_type, FAMILIES)} To add it, name its blocks and projections in "
            f"pruners/families.py: FAMILIES[{model_type!r}] = Family(blocks=..., qkv=..., output=..., inward=..., "
            "outward=...)."
        )
    kind = FAMILIES[model_type]
    try:
        model.get_submodule(kind.blocks)
    except AttributeError:
        raise TypeError(
            f"A {type(model).__name__} has no {kind.blocks}; pruning needs the whole language model, as "
            "transformers.AutoModelForCausalLM loads it."
        ) from None
    for name, value in kind.calls_layers.items():
        if (told := getattr(model.config, name, value)) != value:
            raise ValueError(
                f"With {name}={told} a {type(model).__name__} multiplies by slices of its matrices instead of "
                f"calling its layers; set {name} to {value} in its configuration before loading it."
            )
    return kind


def _refuse_more_than_text(model: nn.Module, model_type: str) -> None:
    """ValueError for a model that reads more than text around a decoder that could be pruned."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if text is not config and text.model_type in FAMILIES:
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        alone: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
        raise ValueError(
            f"{type(model).__name__} ({model_type}) is multimodal, and only language models are pruned; use a "
            f"transformers.{alone.__name__} of its text configuration, with its language model and head."
        )


def _refuse_wrapped(model: nn.Module) -> None:
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if hasattr(model, "merge_and_unload"):
        raise TypeError(f"Got a {kind}; merge its adapters first: model = model.merge_and_unload().")
    if not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
        raise TypeError(f"Got a {kind} around a {type(model.module).__name__}; use the wrapped model: model.module.")
