"""A tiny model of every decoder family: random weights, biases and norms, and windows longer than every sliding window.

Heads share keys where the family can, and are of another size than width / heads where the configuration says one.
"""

from __future__ import annotations

from typing import Any

import torch

import pruners
from pruners.interface import contract

WIDTH, LENGTH, WINDOW = 32, 16, 6
SIZES = {
    "vocab_size": 96,
    "hidden_size": WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
ODD = {"num_key_value_heads": 2, "head_dim": 12}  # 4 heads of 12 beside a width of 32
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
TINY: dict[str, dict[str, Any]] = {  # what differs from SIZES; `type: variant` where a family has several
    "llama": ODD,
    "mistral": ODD | {"sliding_window": WINDOW},
    "opt": {"ffn_dim": 24, "word_embed_proj_dim": WIDTH, "dropout": 0.0},
    "qwen2": GROUPED,
    "qwen2: sliding": GROUPED | SLIDING | {"use_sliding_window": True},
    "smollm3": GROUPED | {"no_rope_layers": [1, 0, 1]},
    "qwen3": ODD,
    "gemma": ODD,
    "gemma: multi-query": ODD | {"num_key_value_heads": 1},
    "gemma2": ODD | SLIDING,
    "gemma3_text": ODD | SLIDING,
    "granite": GROUPED | {"attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "olmo": GROUPED,
    "olmo2": GROUPED,
    "olmo3": GROUPED | SLIDING,
    "cohere": GROUPED,
    "cohere: q/k norm": GROUPED | {"use_qk_norm": True},
    "cohere2": GROUPED | SLIDING,
    "stablelm": GROUPED,
    "stablelm: q/k norm": GROUPED | {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    "phi": {"qk_layernorm": True},
    "phi3": GROUPED | {"sliding_window": WINDOW},
    "glm": ODD,
    "glm4": ODD,
    "starcoder2": GROUPED | {"sliding_window": WINDOW},
    "nemotron": ODD,
    "bloom": {},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "falcon: multi-query": {"multi_query": True, "alibi": False},
    "falcon: alibi": {"multi_query": False, "alibi": True, "bias": True, "parallel_attn": False},
    "gpt_neox": {},
    "gpt2": {},
    "gptj": {"rotary_dim": 4},
    "mpt": {"max_seq_len": 64},
    "mixtral": ODD | {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": ODD
    | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
    "chatglm": {"inner_hidden_size": 24, "bos_token_id": 92, "mask_token_id": 88, "gmask_token_id": 89},
}
EXPERTS = ("mixtral", "qwen3_moe")  # kinds whose MLPs are routed experts
DENSE = [kind for kind in TINY if kind not in EXPERTS]  # structured pruning knows them
EVERY_BLOCK = pruners.LLMPruner(ratio=0.5, attention_blocks=(0, 3), mlp_blocks=(0, 3))  # of a tiny model


def model_type(kind: str) -> str:
    return kind.partition(":")[0]


def tiny(kind: str, seed: int = 0) -> Any:
    """The model of that kind, in float32 and evaluation mode."""
    return contract.built(model_type(kind), SIZES, TINY[kind], seed)


def windows(kind: str, count: int = 4, length: int = LENGTH) -> torch.Tensor:
    """Tokens [count, length]; ChatGLM's have `[gMASK] <sop>` in them, everywhere at another place."""
    tokens = torch.randint(3, 88, (count, length), generator=torch.Generator().manual_seed(1))
    if kind == "chatglm":
        for row in range(count):
            tokens[row, 6 + row : 8 + row] = torch.tensor([89, 92])
    return tokens
