"""A Phi-3, whose projections are fused, is pruned as the LLaMA of the same weights."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)

import pruners
from pruners import anatomy
from tests.families import EVERY_BLOCK, tiny, windows

PHI3 = "phi3"


def twins():
    """A Phi-3 and the LLaMA with the same weights, q/k/v and gate/up apart."""
    fused = tiny(PHI3)
    config = fused.config
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    names += ("intermediate_size", "max_position_embeddings", "rms_norm_eps", "pad_token_id", "tie_word_embeddings")
    apart = LlamaForCausalLM(LlamaConfig(**{name: getattr(config, name) for name in names})).eval()
    weights = fused.state_dict()
    for block in anatomy.blocks(fused):
        name, d = block.name, block.head_dim
        sizes = [block.heads * d, block.kv_heads * d, block.kv_heads * d]
        for which, part in zip("qkv", weights.pop(f"{name}.self_attn.qkv_proj.weight").split(sizes), strict=True):
            weights[f"{name}.self_attn.{which}_proj.weight"] = part
        gate, up = weights.pop(f"{name}.mlp.gate_up_proj.weight").chunk(2)
        weights |= {f"{name}.mlp.gate_proj.weight": gate, f"{name}.mlp.up_proj.weight": up}
    apart.load_state_dict(weights)
    fused.config.sliding_window = None
    return fused, apart


def fused_again(block):
    """The weights of a LLaMA block in Phi-3's order."""
    w = {name: linear.weight.data for name, linear in block.linears().items()}
    return [
        torch.cat([w[f"self_attn.{which}_proj"] for which in "qkv"]),
        w["self_attn.o_proj"],
        torch.cat([w["mlp.gate_proj"], w["mlp.up_proj"]]),
        w["mlp.down_proj"],
    ]


def pruned(method):
    """Every matrix of the one beside that of the other, fused, after the same pruning."""
    fused, apart = twins()
    for model in (fused, apart):
        pruners.prune(model, method, windows(PHI3))
    for one, other in zip(anatomy.blocks(fused), anatomy.blocks(apart), strict=True):
        for linear, expected in zip(one.linears().values(), fused_again(other), strict=True):
            yield linear.weight.data, expected


def test_a_phi_3_computes_what_its_llama_twin_does():
    fused, apart = twins()
    assert_close(fused(windows(PHI3)).logits, apart(windows(PHI3)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "method",
    [pruners.Wanda(0.5), pruners.GBLM(0.5), pruners.Wanda(pattern="2:4"), pruners.SparseGPT(pattern="2:4")],
    ids=repr,
)
def test_a_phi_3_gets_the_masks_of_its_llama_twin(method):
    for found, expected in pruned(method):
        assert torch.equal(found == 0, expected == 0)


@pytest.mark.parametrize(
    "method",
    [
        pruners.Flap(ratio=0.4),
        pruners.WandaSP(ratio=0.5),
        EVERY_BLOCK,
        pruners.LLMPruner(ratio=0.5, importance="l2", reduction="max", attention_blocks=(0, 3), mlp_blocks=(0, 3)),
    ],
    ids=repr,
)
def test_a_phi_3_keeps_the_units_of_its_llama_twin(method):
    for found, expected in pruned(method):
        assert_close(found, expected, rtol=1e-6, atol=1e-7)
