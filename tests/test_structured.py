"""What every structured method promises, on every family."""

from __future__ import annotations

import itertools
import json
from functools import partial

import pytest
import torch
from torch.testing import assert_close

import pruners
from pruners import anatomy, select
from pruners.structured import Structured
from tests.conftest import tiny

BLOCKS = {"attention_blocks": (0, 2), "mlp_blocks": (0, 2)}
STRUCTURED = {
    name: partial(cls, **BLOCKS) if name == "llm_pruner" else cls
    for name, cls in pruners.METHODS.items()
    if issubclass(cls, Structured)
}


@pytest.fixture(params=STRUCTURED)
def method(request):
    return STRUCTURED[request.param]


def pruned(kind, method, windows, **options):
    model = tiny(kind)
    return model, pruners.prune(model, method, windows, **options)


def widths(model):
    return [(block.heads, block.kv_heads, block.channels) for block in anatomy.blocks(model)]


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.75])
def test_masked_and_cut_models_agree_and_the_report_counts_what_is_left(kind, method, windows, ratio):
    masked, told = pruned(kind, method(ratio=ratio), windows, cut=False)
    cut, report = pruned(kind, method(ratio=ratio), windows)
    assert_close(masked(windows).logits, cut(windows).logits, rtol=1e-4, atol=1e-5)
    assert report.structure == told.structure
    assert report.structure.after.size.model == cut.num_parameters()
    assert [(w.heads, w.kv_heads, w.channels) for w in report.structure.after.blocks] == widths(cut)
    assert masked.num_parameters() >= tiny(kind).num_parameters()


def test_the_cut_model_generates_with_its_cache(kind, method, windows):
    model, _ = pruned(kind, method(ratio=0.5), windows)
    options = {"attention_mask": torch.ones_like(windows), "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(windows, **options), model.generate(windows, use_cache=False, **options))


@pytest.mark.parametrize("of", ["decoder", "model"])
@pytest.mark.parametrize("share", [0.2, 0.4])
def test_a_target_is_met_up_to_half_a_unit(kind, method, windows, of, share):
    _, report = pruned(kind, method(target_parameters=share, target_of=of), windows)
    before = report.structure.before.size
    unit = max(block.unit_cost(unit) for block in anatomy.blocks(tiny(kind)) for unit in ("attention", "mlp"))
    lost = getattr(before.less(report.structure.after.size), of)
    assert abs(lost - share * getattr(before, of)) <= unit / 2
    assert report.structure.asked_shares[of] == pytest.approx(share, abs=1e-4)


def test_nothing_outside_the_blocks_projections_moves(kind, method, windows):
    model, _ = pruned(kind, method(ratio=0.5), windows, cut=False)
    before = tiny(kind).state_dict()
    inside = {
        f"{b.name}.{name}.{what}" for b in anatomy.blocks(model) for name in b.linears() for what in ("weight", "bias")
    }
    moved = {
        name for name, tensor in model.state_dict().items() if name not in before or not tensor.equal(before[name])
    }
    assert moved
    assert moved <= inside


def test_the_same_run_twice_gives_the_same_bits(kind, method, windows):
    first, second = (pruned(kind, method(ratio=0.5), windows)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_the_batch_size_changes_no_choice(kind, method, windows, batch_size):
    reference, other = (
        pruned(kind, method(ratio=0.5), windows, batch_size=size, cut=False)[0].state_dict() for size in (2, batch_size)
    )
    assert all(torch.equal(reference[name] == 0, other[name] == 0) for name in reference)


def test_shared_statistics_give_the_same_result(kind, method, windows):
    gathered = pruners.gather(tiny(kind), method(ratio=0.1), windows)
    shared, _ = pruned(kind, method(ratio=0.5), windows, statistics=gathered)
    alone, _ = pruned(kind, method(ratio=0.5), windows)
    assert all(torch.equal(a, b) for a, b in zip(shared.parameters(), alone.parameters(), strict=True))


def test_round_widths_cost_what_the_report_says(kind, method, windows):
    _, plain = pruned(kind, method(ratio=0.4), windows)
    _, rounded = pruned(kind, method(ratio=0.4, round_to=16), windows)
    assert all(block.channels % 16 == 0 for block in rounded.structure.after.blocks)
    extra = rounded.structure.after.size.model - plain.structure.after.size.model
    assert rounded.structure.rounding == extra > 0


def test_a_pruned_model_can_be_pruned_again(kind, method, windows):
    model, first = pruned(kind, method(ratio=0.3), windows)
    second = pruners.prune(model, method(ratio=0.3), windows)
    assert second.structure.before == first.structure.after
    assert second.structure.after.size.model == model.num_parameters()
    assert model(windows).logits.isfinite().all()


@pytest.mark.parametrize("unstructured", [pruners.Wanda, pruners.Magnitude, pruners.SparseGPT, pruners.GBLM])
def test_a_cut_model_without_heads_in_a_block_takes_unstructured_pruning(kind, windows, unstructured):
    model = tiny(kind)
    pruners.prune(model, pruners.Flap(ratio=0.97), windows)
    assert min(heads for heads, _, _ in widths(model)) == 0
    pruners.prune(model, unstructured(sparsity=0.5), windows)
    assert model(windows).logits.isfinite().all()


def test_pruning_leaves_no_trace_on_the_module(kind, method, windows):
    model = tiny(kind).train()
    pruners.prune(model, method(ratio=0.5), windows)
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_dtype(kind, method, windows, dtype):
    model = tiny(kind).to(dtype)
    pruners.prune(model, method(ratio=0.4), windows)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert model(windows).logits.isfinite().all()


def test_a_report_is_plain_json_and_one_line(kind, method, windows):
    _, report = pruned(kind, method(ratio=0.4), windows)
    told = json.loads(json.dumps(report.to_dict()))
    assert told["structure"]["after"]["size"]["model"] == report.structure.after.size.model
    assert told["achieved"] == told["structure"]["achieved_shares"]["decoder"]
    assert "of the decoder blocks (requested" in str(report)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"ratio": 1.0}, r"ratio is the share removed, in \[0, 1\); got 1\.0"),
        ({"ratio": -0.1}, r"\[0, 1\)"),
        ({"target_parameters": 1.2}, r"target_parameters is the share removed, in \[0, 1\)"),
        ({"ratio": 0.2, "target_parameters": 0.2}, "give one of the two"),
        ({"target_parameters": 0.2, "target_of": "blocks"}, "Unknown target_of 'blocks'"),
        ({"round_to": 0}, "1 or more; got 0"),
    ],
)
def test_hyperparameters_out_of_range(method, fields, said):
    with pytest.raises(ValueError, match=said):
        method(**fields)


def test_a_target_beyond_what_may_go_is_refused_and_nothing_moves(kind, method, windows):
    model = tiny(kind)
    with pytest.raises(ValueError, match="the removable heads and channels have"):
        pruners.prune(model, method(target_parameters=0.9, target_of="model"), windows)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny(kind).parameters(), strict=True))


def test_weights_that_are_not_finite_are_named(kind, method, windows):
    model = tiny(kind)
    anatomy.blocks(model)[1].linear("self_attn.v_proj").weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj|gradient of|inputs of"):
        pruners.prune(model, method(ratio=0.5), windows)


def test_a_model_without_an_output_head_is_refused_before_anything_is_cut(kind):
    model = tiny(kind).model
    with pytest.raises(TypeError, match=r"needs a \w+ForCausalLM; got a (Llama|OPT)Model"):
        pruners.prune(model, pruners.MagnitudeSP(ratio=0.5))


def test_the_budget_search_is_optimal_among_all_thresholds():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        score = torch.rand(7, generator=generator)
        cost = torch.randint(1, 20, (7,), generator=generator)
        budget = float(torch.rand((), generator=generator) * cost.sum())
        found = float(cost[select.cheapest(score, cost, budget)].sum())
        every = [float(cost[score < threshold].sum()) for threshold in (*score.tolist(), 2.0)]
        assert abs(found - budget) == pytest.approx(min(abs(total - budget) for total in every))


def test_even_counts_differ_by_less_than_one_unit_of_share():
    units, costs = [9, 3, 1536, 100], [590, 1770, 17, 17]
    for budget in (0, 5_000, 15_000, 30_000):
        counts = select.evenly([torch.full((n,), cost) for n, cost in zip(units, costs, strict=True)], budget)
        spent = sum(count * cost for count, cost in zip(counts, costs, strict=True))
        assert abs(spent - budget) <= max(costs) / 2
        shares = [(count / unit, (count + 1) / unit) for count, unit in zip(counts, units, strict=True)]
        assert all(low <= other_high + 1e-6 for (low, _), (_, other_high) in itertools.permutations(shares, 2))
