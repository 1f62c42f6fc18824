"""What every method promises, on every family."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import pruners
from pruners import anatomy, checkpoint
from pruners.unstructured import Unstructured
from tests.conftest import CONFIGS, SLIDING, hollow, tiny

UNSTRUCTURED = {name: cls for name, cls in pruners.METHODS.items() if issubclass(cls, Unstructured)}


@pytest.fixture(params=UNSTRUCTURED)
def method(request):
    return UNSTRUCTURED[request.param]


def pruned(kind, method, windows, **options):
    model = tiny(kind)
    return model, pruners.prune(model, method, windows, **options)


def masks(model):
    return {f"{b.name}.{n}": lin.weight == 0 for b in anatomy.blocks(model) for n, lin in b.linears().items()}


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.75])
def test_the_asked_sparsity_is_reached(kind, method, windows, sparsity):
    model, report = pruned(kind, method(sparsity=sparsity), windows)
    zeros = torch.cat([m.flatten() for m in masks(model).values()]).double().mean().item()
    assert report.achieved == pytest.approx(zeros)
    widest = max(lin.in_features for b in anatomy.blocks(model) for lin in b.linears().values())
    assert zeros == pytest.approx(sparsity, abs=1 / 32)  # rows of 48 or 64 weights: one a row is the grain
    assert widest == 64


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_every_group_keeps_n_of_m(kind, method, windows, pattern):
    model, _ = pruned(kind, method(pattern=pattern), windows)
    n, m = map(int, pattern.split(":"))
    for mask in masks(model).values():
        assert ((~mask).unflatten(-1, (-1, m)).sum(-1) == n).all()


def test_nothing_outside_the_blocks_linear_layers_moves(kind, method, windows):
    model, _ = pruned(kind, method(sparsity=0.5), windows)
    before = tiny(kind).state_dict()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {f"{name}.weight" for name in masks(model)}


def test_the_same_run_twice_gives_the_same_bits(kind, method, windows):
    first, second = (pruned(kind, method(sparsity=0.5), windows)[0].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("batch_size", [1, 4, 6])
def test_the_batch_size_changes_no_mask(kind, method, windows, batch_size):
    reference, other = (masks(pruned(kind, method(sparsity=0.5), windows, batch_size=b)[0]) for b in (2, batch_size))
    assert all(torch.equal(reference[name], other[name]) for name in reference)


def test_the_model_runs_and_comes_back_from_disk(kind, method, windows, tmp_path):
    model, _ = pruned(kind, method(sparsity=0.5), windows)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert_close(model(windows).logits, again(windows).logits, rtol=0, atol=0)


def test_pruning_leaves_no_trace_on_the_module(kind, method, windows):
    model = tiny(kind).train()
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    pruners.prune(model, method(sparsity=0.5), windows)
    assert model.training
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_dtype_and_reach_the_sparsity(kind, method, windows, dtype):
    model = tiny(kind).to(dtype)
    report = pruners.prune(model, method(sparsity=0.5), windows)
    assert model.dtype == dtype
    assert report.achieved == pytest.approx(0.5, abs=0.02)


def test_streaming_blocks_through_a_device_changes_nothing(kind, method, windows):
    plain, streamed = (
        pruned(kind, method(sparsity=0.5), windows, device=device)[0].state_dict() for device in (None, "cpu")
    )
    assert all(torch.equal(plain[name], streamed[name]) for name in plain)


def test_shared_statistics_give_the_same_result(kind, method, windows):
    model = tiny(kind)
    gathered = pruners.gather(model, method(sparsity=0.5), windows)
    pruners.prune(model, method(sparsity=0.5), windows, statistics=gathered)
    expected, _ = pruned(kind, method(sparsity=0.5), windows)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), expected.state_dict().values(), strict=True)
    )


def test_a_copy_pruned_apart_shares_nothing_with_the_original(kind, method, windows):
    model = tiny(kind)
    pruners.prune(copy.deepcopy(model), method(sparsity=0.5), windows)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), tiny(kind).parameters(), strict=True))


EVERY_BLOCK = {"attention_blocks": (0, 2), "mlp_blocks": (0, 2)}
ONCE_MORE = {
    **{name: cls(sparsity=0.5) for name, cls in UNSTRUCTURED.items()},
    "flap": pruners.Flap(ratio=0.4),
    "wanda_sp": pruners.WandaSP(ratio=0.4),
    "magnitude_sp": pruners.MagnitudeSP(ratio=0.4),
    "llm_pruner": pruners.LLMPruner(ratio=0.4, **EVERY_BLOCK),
    "llm_pruner, random": pruners.LLMPruner(ratio=0.4, importance="random", **EVERY_BLOCK),
    "llm_pruner, by channel": pruners.LLMPruner(ratio=0.1, granularity="channel"),
    "llm_pruner, by layer": pruners.LLMPruner(ratio=0.5, granularity="layer"),
}


def test_every_method_is_pruned_once_more():
    assert {type(method) for method in ONCE_MORE.values()} == set(pruners.METHODS.values())


@pytest.mark.parametrize("once_more", ONCE_MORE)
@pytest.mark.parametrize("units", ["no head, no channel", "nothing"])
@pytest.mark.parametrize("kind", [*CONFIGS, *SLIDING])
def test_blocks_without_heads_or_channels_are_pruned_run_and_saved_as_others(kind, units, once_more, windows, tmp_path):
    model = hollow(kind, units)
    before = model.num_parameters()
    report = pruners.prune(model, ONCE_MORE[once_more], windows)
    told = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    if told["structure"]:
        assert told["structure"]["after"]["size"]["model"] == model.num_parameters() < before
    else:
        zeros, weights = (sum(f(m) for m in masks(model).values()) for f in (torch.Tensor.sum, torch.Tensor.numel))
        assert report.achieved == pytest.approx(float(zeros / weights))
        assert report.achieved == pytest.approx(0.5, abs=0.02)
    prompt = windows.masked_fill(torch.arange(16) < torch.tensor([5, 0, 0, 0, 0, 0])[:, None], 0)
    options = {"attention_mask": (prompt > 0).long(), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, use_cache=False, **options))
    checkpoint.save(model, None, tmp_path / "out")
    opened, _ = checkpoint.load(tmp_path / "out")
    assert_close(opened(windows).logits, model(windows).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("once_more", [name for name in ONCE_MORE if "by" not in name])
def test_blocks_that_nothing_is_left_of_stay_as_they_are(once_more, windows):
    model = hollow("llama grouped-query", "nothing anywhere")
    before = copy.deepcopy(model.state_dict())
    report = pruners.prune(model, ONCE_MORE[once_more], windows)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["achieved"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
