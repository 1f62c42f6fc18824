"""What merging keeps: logits, sparsity, survivors."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from torch import nn
from torch.testing import assert_close

import pruners
from pruners.retrain import LoRA, LoRAPrune, MaskLoRA, ScaleLoRA, Trainable
from pruners.retrain.masks import BitMask

KINDS = [LoRAPrune(rank=4), ScaleLoRA(rank=4), MaskLoRA(rank=4)]
EXACT = [ScaleLoRA(rank=4), MaskLoRA(rank=4)]


def sparse(out: int = 12, inp: int = 20, seed: int = 0) -> tuple[nn.Linear, BitMask]:
    """A half-empty matrix, one of whose survivors is exactly zero, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(inp, out)
    linear.weight.data = torch.randn(out, inp, generator=generator)
    gone = torch.rand(out, inp, generator=generator) < 0.5
    linear.weight.data[gone] = 0
    linear.weight.data[~gone] = linear.weight.data[~gone].index_fill(0, torch.tensor([0]), 0.0)
    return linear, BitMask(~gone)


def trained(adapter) -> None:
    """As if steps had been taken."""
    generator = torch.Generator().manual_seed(1)
    for parameter in (adapter.a, adapter.b):
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def test_a_mask_holds_one_bit_a_weight():
    kept = torch.rand(7, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = BitMask(kept)
    assert torch.equal(mask.gone(), ~kept)
    assert mask.bits.nbytes == -(-kept.numel() // 8)
    assert_close(mask.apply(torch.ones(7, 13)), kept.float())


@pytest.mark.parametrize("kind", EXACT, ids=repr)
def test_merging_changes_no_output(kind):
    linear, mask = sparse()
    adapter = kind.attach("w", linear, mask, seed=0)
    trained(adapter)
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(2))
    before = adapter.module(x)
    adapter.merge()
    assert_close(linear(x), before)


@pytest.mark.parametrize("kind", [MaskLoRA(rank=4), LoRAPrune(rank=4), LoRA(rank=4), ScaleLoRA(rank=4)], ids=repr)
def test_an_adapter_starts_as_no_change(kind):
    linear, mask = sparse()
    x = torch.randn(5, 20, generator=torch.Generator().manual_seed(2))
    assert_close(kind.attach("w", linear, mask, seed=0).module.eval()(x), linear(x))


def test_a_survivor_that_is_zero_stays_a_survivor():
    linear, mask = sparse()
    survivor = (linear.weight == 0) & ~mask.gone()
    adapter = MaskLoRA(rank=4).attach("w", linear, mask, seed=0)
    trained(adapter)
    adapter.merge()
    assert survivor.any()
    assert (linear.weight[survivor] != 0).all()


@pytest.mark.parametrize("kind", EXACT, ids=repr)
def test_gradients_are_those_of_the_formula(kind):
    linear, mask = sparse()
    linear.double()
    adapter = kind.attach("w", linear, mask, seed=0)
    for name in ("a", "b"):
        setattr(adapter.module, name, nn.Parameter(torch.rand_like(getattr(adapter, name), dtype=torch.float64)))
    x = torch.randn(2, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    a, b, bias = adapter.module.a, adapter.module.b, linear.bias
    got = torch.autograd.grad(adapter.module(x).square().sum(), (x, a, b, bias))
    product, kept = b @ a, (~mask.gone()).double()
    weight = linear.weight * product if isinstance(kind, ScaleLoRA) else linear.weight + 8 * product * kept
    assert_close(got, torch.autograd.grad((x @ weight.T + bias).square().sum(), (x, a, b, bias)))


def test_the_fused_layer_keeps_no_matrix_for_backward():
    linear, mask = sparse(64, 64)
    module = MaskLoRA(rank=2).attach("w", linear, mask, seed=0).module
    saved: list[torch.Size] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        module(torch.randn(3, 64, generator=torch.Generator().manual_seed(0), requires_grad=True))
    assert sorted(saved) == [(2, 64), (3, 64), (64, 2)]


@pytest.mark.parametrize("method", [pruners.Magnitude(sparsity=0.5), pruners.Magnitude(pattern="2:4")], ids=repr)
@pytest.mark.parametrize("kind_of_adapter", KINDS, ids=repr)
def test_a_model_keeps_its_mask_and_exact_kinds_their_logits(kind, method, kind_of_adapter, windows):
    model = tiny(kind)
    pruners.prune(model, method)
    attached = Trainable(biases=True, norms=True, adapters=kind_of_adapter).attach(model)
    gone = {name: mask.gone() for name, mask in attached.masks.items()}
    for adapter in attached.adapters:
        trained(adapter)
    before, sparsity = model(windows).logits, attached.sparsity
    lost = attached.lost_by_merging()
    attached.merge()
    assert attached.sparsity == sparsity
    assert all((model.get_parameter(name)[mask] == 0).all() for name, mask in gone.items())
    if isinstance(kind_of_adapter, LoRAPrune):
        assert 0.5 < lost < 0.9  # about sqrt(1/2): half of BA goes
    else:
        assert_close(model(windows).logits, before, atol=1e-3, rtol=1e-3)


def test_plain_lora_stays_beside_its_matrix_unless_told_to_merge(kind, windows):
    for merge in (False, True):
        model = tiny(kind)
        pruners.prune(model, pruners.Magnitude(sparsity=0.5))
        attached = Trainable(adapters=LoRA(rank=2, dropout=0.0, merge=merge)).attach(model)
        for adapter in attached.adapters:
            trained(adapter)
        before = model(windows).logits
        attached.merge()
        assert_close(model(windows).logits, before, atol=1e-3, rtol=1e-3)
        assert (attached.sparsity < 0.01) is merge


def test_a_tied_head_is_untied_when_its_adapter_merges(windows, tmp_path):
    model = tiny("opt")
    attached = Trainable(head=True).attach(model)
    trained(attached.adapters[0])
    embeddings, before = model.get_input_embeddings().weight.clone(), model(windows).logits
    attached.merge()
    assert attached.untied
    assert torch.equal(model.get_input_embeddings().weight, embeddings)
    assert_close(model(windows).logits, before, atol=1e-3, rtol=1e-3)
    model.save_pretrained(tmp_path)
    assert_close(type(model).from_pretrained(tmp_path).eval()(windows).logits, before, atol=1e-3, rtol=1e-3)


def test_a_pruned_weight_that_comes_back_is_noticed():
    linear, mask = sparse()
    with pytest.raises(AssertionError, match="w: 1 pruned weights became nonzero"):
        mask.check("w", linear.weight + torch.zeros_like(linear.weight).index_put(
            tuple(mask.gone().nonzero()[0]), torch.tensor(1.0)))  # fmt: skip
