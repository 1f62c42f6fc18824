"""Parameters that a model shares beyond what its configuration says are refused before any work."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pruners
from pruners import checkpoint
from pruners.interface.contract import tiny, windows

TEXT = windows("llama")


def head(model):
    model.lm_head.weight = model.model.embed_tokens.weight


def layers(model):
    model.model.layers[1].mlp = model.model.layers[0].mlp


def within(model):
    model.model.layers[0].self_attn.v_proj.weight = model.model.layers[0].self_attn.k_proj.weight


def memory(model):
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(model.model.layers[0].mlp.up_proj.weight.data)


def norms(model):
    model.model.norm = model.model.layers[0].input_layernorm


@pytest.mark.parametrize("method", [pruners.Magnitude(0.5), pruners.GBLM(0.5), pruners.Flap(0.3)])
@pytest.mark.parametrize("share", [head, layers, within, memory, norms])
def test_a_model_that_shares_weights_by_hand_is_refused_as_it_is(share, method):
    model = tiny("llama")
    share(model)
    before = copy.deepcopy(model.state_dict())
    for call in (pruners.prune, pruners.gather):
        with pytest.raises(ValueError, match=r"weight and .*weight are one tensor, and LlamaForCausalLM has two"):
            call(model, method, TEXT)
    with pytest.raises(ValueError, match="are one tensor"):
        checkpoint.check(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("advice", ["tie_word_embeddings", "deepcopy"])
@pytest.mark.parametrize("method", [pruners.Wanda(0.5), pruners.Flap(0.3)])
def test_what_the_sentence_says_of_a_head_tied_by_hand_mends_it(method, advice, tmp_path):
    model = tiny("llama")
    head(model)
    with pytest.raises(ValueError, match=r"set model\.config\.tie_word_embeddings = True, or .* copy\.deepcopy"):
        checkpoint.save(model, None, tmp_path / "refused")
    if advice == "deepcopy":
        model.lm_head.weight = copy.deepcopy(model.lm_head.weight)
    else:
        model.config.tie_word_embeddings = True
    pruners.prune(model, method, TEXT)
    opened, _ = checkpoint.load(checkpoint.save(model, None, tmp_path / "kept"))
    assert torch.equal(opened(TEXT).logits, model(TEXT).logits)


def test_layers_taken_apart_are_pruned():
    model = tiny("llama")
    layers(model)
    model.model.layers[1].mlp = copy.deepcopy(model.model.layers[1].mlp)
    assert pruners.prune(model, pruners.Flap(0.3), TEXT).achieved > 0
