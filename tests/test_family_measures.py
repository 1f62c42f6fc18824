"""What is measured on a model is measured on every family: with its own logits, and over all matrices it prunes."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import pruners
from eval.efficiency import NO_SPEED_UP, TWO_FOUR, counts, speed_note
from eval.matrices import decoder_matrices
from eval.patterns import mask_patterns
from eval.perplexity import perplexity
from pruners import anatomy
from tests.families import EXPERTS, TINY, model_type, tiny, windows

CHANGED = {  # what a family does to logits after the head, made large enough to be seen
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 8.0},
}


@pytest.mark.parametrize("kind", TINY)
def test_perplexity_is_that_of_the_models_own_logits(kind):
    model, tokens = tiny(kind), windows("llama", count=5)
    for name, value in CHANGED.get(model_type(kind), {}).items():
        setattr(model.config, name, value)
        if hasattr(model, name):
            setattr(model, name, value)
    marks = torch.tensor(getattr(model.config, "text_prefix", ()), dtype=torch.long).expand(len(tokens), -1)
    with torch.no_grad():
        logits = model(torch.cat([marks, tokens], 1)).logits[:, marks.shape[1] : -1]
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).exp()
    assert perplexity(model, tokens.flatten(), tokens.shape[1], batch_size=2).perplexity == pytest.approx(
        float(expected), rel=1e-5
    )


@pytest.mark.parametrize("kind", TINY)
def test_multiplications_are_those_of_every_matrix_that_a_token_meets(kind):
    model, tokens, used = tiny(kind), 64, 0
    for block in anatomy.blocks(model):
        experts = len(block.expert_groups) // 2
        for name, matrix in block.linears().items():
            share = model.config.num_experts_per_tok / experts if ".experts." in name else 1
            used += share * matrix.weight.numel()
        used += experts * model.config.hidden_size  # the router
        used += 2 * tokens * block.heads * block.head_dim  # every token against all, in scores and in their use
    used += model.get_output_embeddings().weight.numel()
    assert counts(model, tokens).macs == tokens * used
    assert counts(model.to("meta"), tokens).macs == tokens * used


@pytest.mark.parametrize("kind", TINY)
def test_zeros_are_seen_in_every_matrix(kind):
    model = tiny(kind)
    pruners.prune(model, pruners.Magnitude(pattern="2:4"))
    assert speed_note(model) == TWO_FOUR
    told = mask_patterns(model, 1)["matrices"]
    assert sum(len(matrix["kept"]) for matrix in told.values()) == len(list(decoder_matrices(model)))
    assert {kept for matrix in told.values() for kept in matrix["kept"]} == {0.5}
    *_, (_, _, last) = decoder_matrices(model)
    last[0, :4] = torch.tensor([0.0, 1.0, 1.0, 1.0])
    assert speed_note(model) == NO_SPEED_UP


def test_kinds_with_experts_are_those_whose_blocks_have_them():
    assert tuple(kind for kind in TINY if any(block.experts for block in anatomy.blocks(tiny(kind)))) == EXPERTS
