"""Masked equals cut, whatever a block keeps, and cut models still generate."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.testing import assert_close

from pruners import anatomy, apply
from pruners.apply import Kept
from tests.conftest import tiny

KEPT_UNITS = {
    "some of both": ("some", "some"),
    "no head": ("none", "some"),
    "no channel": ("some", "none"),
    "nothing": ("none", "none"),
    "everything": ("all", "all"),
}


def drawn(count: int, how: str, seed: int) -> torch.Tensor:
    if how != "some":
        return torch.full((count,), how == "all")
    chosen = torch.rand(count, generator=torch.Generator().manual_seed(seed)) > 0.5
    chosen[seed % count] = True
    return chosen


def both_ways(kind: str, first: str, second: str = "some of both"):
    """A tiny model masked and the same model cut; the two blocks keep what `first` and `second` say."""
    masked, cut = tiny(kind), tiny(kind)
    for block, twin, units in zip(anatomy.blocks(masked), anatomy.blocks(cut), (first, second), strict=True):
        heads, channels = KEPT_UNITS[units]
        kept = Kept(drawn(block.kv_heads, heads, block.index), drawn(block.channels, channels, block.index + 1))
        apply.zero(block, kept)
        apply.cut(twin, kept)
    apply.describe(cut)
    return masked, cut


def generated(model, windows, **options):
    options = {"attention_mask": torch.ones_like(windows), "pad_token_id": 0, "eos_token_id": None, **options}
    return model.generate(windows, max_new_tokens=8, do_sample=False, **options)


@pytest.mark.parametrize("units", KEPT_UNITS)
def test_masked_and_cut_models_have_the_same_logits(kind, windows, units):
    masked, cut = both_ways(kind, units)
    assert_close(masked(windows).logits, cut(windows).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("units", KEPT_UNITS)
@pytest.mark.parametrize("place", [0, 1])
def test_generation_with_a_cache_equals_generation_without(kind, windows, units, place):
    order = [units, "some of both"][:: 1 if place == 0 else -1]
    masked, cut = both_ways(kind, *order)
    plain = generated(cut, windows, use_cache=False)
    assert torch.equal(generated(cut, windows), plain)
    assert torch.equal(generated(cut, windows, cache_implementation="static"), plain)
    assert torch.equal(generated(masked, windows), plain)


def test_padded_prompts_work_without_heads_in_the_first_block(kind, windows):
    _, cut = both_ways(kind, "no head")
    mask = torch.ones_like(windows)
    mask[:, :5] = 0
    padded = generated(cut, windows, attention_mask=mask)
    assert torch.equal(padded[:, 16:], generated(cut, windows[:, 5:])[:, 11:])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations_know_the_cut_widths(kind, windows, implementation):
    masked, cut = both_ways(kind, "some of both")
    for model in (masked, cut):
        model.set_attn_implementation(implementation)
    assert_close(masked(windows).logits, cut(windows).logits, rtol=1e-5, atol=1e-5)


def test_the_configuration_and_the_class_say_what_was_cut(kind):
    _, cut = both_ways(kind, "no head")
    assert cut.config.model_type == f"pruned_{'opt' if kind == 'opt' else 'llama'}"
    for block, said in zip(anatomy.blocks(cut), cut.config.blocks, strict=True):
        assert (said["heads"], said["kv_heads"], said["channels"]) == (block.heads, block.kv_heads, block.channels)
    assert tiny(kind).config.model_type != cut.config.model_type


def test_a_configuration_that_two_models_share_stays_as_it_was(kind):
    model, other = tiny(kind), tiny(kind)
    other.config = model.config
    apply.keep_first(model, 1)
    assert (len(anatomy.blocks(model)), other.config.num_hidden_layers) == (1, 2)


def test_a_unit_costs_what_cutting_it_saves(kind):
    for unit in apply.KINDS:
        model = tiny(kind)
        block = anatomy.blocks(model)[0]
        before, cost, kept = model.num_parameters(), block.unit_cost(unit), Kept.all(block)
        kept[unit][:2] = False
        apply.cut(block, kept)
        assert before - model.num_parameters() == 2 * cost


def test_a_bias_is_added_or_made(kind):
    linear = anatomy.blocks(tiny(kind))[0].linear("self_attn.v_proj")
    before = linear.bias.clone() if linear.bias is not None else 0
    apply.add_bias(linear, torch.ones(linear.out_features, dtype=torch.float64))
    assert_close(linear.bias.data, before + torch.ones(linear.out_features))


def test_the_residual_stream_is_cut_everywhere_and_tied_embeddings_stay_tied(kind, windows):
    model = tiny(kind)
    apply.narrow(model, torch.arange(48) % 3 != 0)
    assert model.config.hidden_size == 32
    assert all(parameter.shape[dim] == 32 for parameter, dim in residual(model))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
    assert generated(model, windows).shape == (6, 24)


def residual(model):
    return [(model.get_parameter(name), dim) for name, dim in apply.residual(model).items()]


@pytest.mark.parametrize("kind", ["llama multi-head", "llama grouped-query"])
def test_a_masked_residual_stream_equals_the_cut_one(kind, windows):
    keep = torch.arange(48) % 5 != 0
    masked, cut = tiny(kind), tiny(kind)
    apply.zero_narrow(masked, keep)
    apply.narrow(cut, keep)
    assert_close(masked(windows).logits, cut(windows).logits, rtol=1e-5, atol=1e-5)


def test_layer_norms_have_no_masked_residual_stream():
    with pytest.raises(ValueError, match="use cut=True"):
        apply.zero_narrow(tiny("opt"), torch.arange(48) > 3)


def test_a_silent_block_is_a_dropped_block(kind, windows):
    silent, dropped = tiny(kind), tiny(kind)
    apply.silence(anatomy.blocks(silent)[1])
    apply.keep_first(dropped, 1)
    assert_close(silent(windows).logits, dropped(windows).logits)


def test_key_heads_that_do_not_divide_the_query_heads_are_refused():
    block = anatomy.blocks(tiny("llama grouped-query"))[0]
    apply.cut(copy.deepcopy(block), Kept.all(block))
    block.linear("self_attn.k_proj").out_features = 32
    with pytest.raises(ValueError, match="4 KV heads among 6 query heads"):
        _ = block.parts
