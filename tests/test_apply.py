"""Masked equals cut, whatever a block keeps, and cut models still generate."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch.testing import assert_close
from transformers import DynamicCache, LlamaForCausalLM

import pruners
from pruners import anatomy, apply, checkpoint
from pruners.apply import Kept
from tests.conftest import CONFIGS, SLIDING, tiny


@pytest.fixture(params=[*CONFIGS, *SLIDING])
def kind(request):
    return request.param


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


PLACES = [0, 1, "both"]
WAYS_OF_CACHING = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "in chunks": {"prefill_chunk_size": 5},
    "beams": {"num_beams": 3},
}


def at(place, units):
    """The model with such units at that place, masked and cut."""
    return lambda kind: both_ways(
        kind, *((units, units) if place == "both" else (units, "some of both")[:: 1 - 2 * place])
    )


def left_padded(windows):
    mask = torch.ones_like(windows)
    mask[0, :7] = 0
    return windows.masked_fill(mask == 0, 0), mask


@pytest.mark.parametrize(
    ("place", "units"), [(p, u) for p in PLACES for u in KEPT_UNITS if p == 0 or u in ("no head", "nothing")]
)
def test_generation_with_a_cache_equals_generation_without(kind, windows, units, place):
    masked, cut = at(place, units)(kind)
    prompt, mask = left_padded(windows[:3])
    plain = generated(cut, prompt, attention_mask=mask, use_cache=False)
    assert torch.equal(generated(masked, prompt, attention_mask=mask), plain)
    for name, options in WAYS_OF_CACHING.items():
        beams = {"num_beams": options.get("num_beams", 1)}
        expected = generated(cut, prompt, attention_mask=mask, use_cache=False, **beams) if "beams" in name else plain
        assert torch.equal(generated(cut, prompt, attention_mask=mask, **options), expected), name
    alone = generated(cut, windows[:1], use_cache=False)
    assert torch.equal(generated(cut, windows[:1], prompt_lookup_num_tokens=2), alone)


@pytest.mark.parametrize("units", ["no head", "no channel", "nothing"])
@pytest.mark.parametrize("place", PLACES)
def test_a_decoding_loop_its_cache_and_what_is_cropped_from_it(kind, windows, units, place):
    _, cut = at(place, units)(kind)
    cache = DynamicCache(config=cut.config)
    if hasattr(cache, "activate_past_recording"):  # what a sliding window needs to be cropped, where it exists
        cache.activate_past_recording()
    name = "cache" if "cache" in inspect.signature(cut.forward).parameters else "past_key_values"

    def logits(tokens):
        return cut(tokens, use_cache=True, **{name: cache}).logits

    outputs = [logits(windows[:, :5])]
    logits(windows[:, 3:8])
    assert cache.get_seq_length() == 10
    cache.crop(-5)
    assert cache.get_seq_length() == 5
    outputs += [logits(windows[:, i : i + 1]) for i in range(5, 16)]
    assert cache.get_seq_length() == 16
    assert_close(torch.cat(outputs, 1), cut(windows, use_cache=False).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("place", PLACES)
def test_every_block_has_its_place_among_the_attentions(kind, windows, place):
    _, cut = at(place, "no head")(kind)
    cut.set_attn_implementation("eager")
    attentions = cut(windows, output_attentions=True, use_cache=True).attentions
    assert [a.shape for a in attentions] == [(6, block.heads, 16, 16) for block in anatomy.blocks(cut)]


def test_hooks_and_copies_survive_the_loss_of_all_heads(kind, windows):
    model, calls = tiny(kind), []
    block = anatomy.blocks(model)[0]
    block.attention.register_forward_hook(lambda *_: calls.append(1))
    kept = Kept.all(block)
    kept["attention"][:] = False
    apply.cut(block, kept)
    model.set_attn_implementation("eager")
    logits = model(windows).logits
    assert calls == [1]
    block.attention._forward_hooks.clear()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(windows).logits, logits)


def test_attention_without_heads_refuses_a_cache_that_it_cannot_find(windows):
    _, cut = both_ways("opt", "no head")
    with pytest.raises(TypeError, match=r"finds none among its arguments \(memory, use_cache\)"):
        anatomy.blocks(cut)[0].attention(torch.zeros(1, 3, 48), memory=object(), use_cache=True)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_implementations_know_the_cut_widths(kind, windows, implementation):
    masked, cut = both_ways(kind, "some of both")
    for model in (masked, cut):
        model.set_attn_implementation(implementation)
    assert_close(masked(windows).logits, cut(windows).logits, rtol=1e-5, atol=1e-5)


def test_the_configuration_and_the_class_say_what_was_cut(kind):
    _, cut = both_ways(kind, "no head")
    assert cut.config.model_type == f"pruned_{kind.split()[0]}"
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


@pytest.mark.parametrize("kind", ["llama multi-head", "llama grouped-query", "mistral"])
def test_a_masked_residual_stream_equals_the_cut_one(kind, windows):
    keep = torch.arange(48) % 5 != 0
    masked, cut = tiny(kind), tiny(kind)
    apply.zero_narrow(masked, keep)
    apply.narrow(cut, keep)
    assert_close(masked(windows).logits, cut(windows).logits, rtol=1e-5, atol=1e-5)


def test_layer_norms_have_no_masked_residual_stream():
    with pytest.raises(ValueError, match="use cut=True"):
        apply.zero_narrow(tiny("opt"), torch.arange(48) > 3)


class Doubled(LlamaForCausalLM):
    """A class of somebody's own, which computes something else."""

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 2 * found.logits
        return found


@pytest.mark.parametrize("dense", [True, False], ids=["dense", "cut"])
def test_an_own_subclass_whose_overrides_would_be_lost_is_refused(dense, windows, tmp_path):
    model = tiny("llama multi-head")
    if not dense:
        pruners.prune(model, pruners.MagnitudeSP(ratio=0.5))
    model.__class__ = Doubled if dense else type("Doubled", (Doubled, type(model)), {})
    for refused in (
        lambda: pruners.check(model, pruners.Wanda()),
        lambda: pruners.check(model, pruners.MagnitudeSP(ratio=0.5)),
        lambda: pruners.gather(model, pruners.GBLM(), windows),
        lambda: pruners.prune(model, pruners.MagnitudeSP(ratio=0.5)),
        lambda: pruners.prune(model, pruners.Magnitude()),
        lambda: checkpoint.save(model, None, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"is a Doubled, and what is saved would open as a (Pruned)?LlamaForCaus"):
            refused()


def test_a_silent_block_is_a_dropped_block(kind, windows):
    silent, dropped = tiny(kind), tiny(kind)
    apply.silence(anatomy.blocks(silent)[1])
    apply.keep_first(dropped, 1)
    assert_close(silent(windows).logits, dropped(windows).logits)


def test_key_heads_that_do_not_divide_the_query_heads_are_refused():
    block = anatomy.blocks(tiny("llama grouped-query"))[0]
    apply.cut(copy.deepcopy(block), Kept.all(block))
    block.linear("self_attn.k_proj").out_features = 32
    with pytest.raises(ValueError, match="6 query heads for 4 KV heads"):
        _ = block.parts
