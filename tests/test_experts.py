"""Mixtures of experts: scored by the tokens that reach them, and told of where none does."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import pruners
from experiments.store import pruned_weights
from pruners import anatomy
from tests.families import EXPERTS, tiny, windows


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("method", [pruners.Flap(), pruners.MagnitudeSP(), pruners.LLMPruner(granularity="layer")])
def test_experts_lose_no_heads_or_channels(kind, method):
    model = tiny(kind)
    for call in (pruners.prune, pruners.gather):
        with pytest.raises(ValueError, match=r"has routed experts, .*; use an unstructured method"):
            call(model, method, windows(kind))


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_are_scored_by_the_tokens_that_reach_them(kind):
    model, tokens = tiny(kind), windows(kind)
    dense, routed = tiny(kind), []
    experts = anatomy.blocks(dense)[0].experts
    hook = experts.register_forward_pre_hook(lambda _, args: routed.append([a.clone() for a in args]))
    dense(tokens)
    hook.remove()
    hidden, index, _ = routed[0]
    pruners.prune(model, pruners.Wanda(sparsity=0.5), tokens)
    for expert in range(4):
        x = hidden[(index == expert).any(-1)]
        gate, up = experts.gate_up_proj[expert].chunk(2)
        inner = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        for name, weight, read in (("gate", gate, x), ("up", up, x), ("down", experts.down_proj[expert], inner)):
            score = weight.abs() * read.norm(dim=0)
            gone = score.argsort(1).argsort(1) < score.shape[1] // 2
            found = anatomy.blocks(model)[0].linear(f"mlp.experts.{expert}.{name}")
            assert torch.equal(found.weight == 0, gone)


@pytest.mark.parametrize("kind", EXPERTS)
@pytest.mark.parametrize("method", [pruners.Wanda(0.5), pruners.SparseGPT(0.5), pruners.Gradient(0.5)], ids=repr)
def test_an_expert_without_tokens_loses_its_smallest_weights_and_is_told(kind, method):
    model = tiny(kind)
    lonely = 2
    for block in anatomy.blocks(model):
        if block.experts is not None:
            block.experts.register_forward_pre_hook(lambda _, args: (args[0], elsewhere(args[1], lonely), args[2]))
    before = {name: w.clone() for name, w in model.named_parameters()}
    report = pruners.prune(model, method, windows(kind))
    blocks = [block for block in anatomy.blocks(model) if block.experts is not None]
    names = [f"{b.name}.mlp.experts.{lonely}.{which}" for b in blocks for which in ("gate", "up", "down")]
    assert report.without_tokens == report.to_dict()["without_tokens"] == names
    assert "no calibration token reached by magnitude" in str(report)
    for block in blocks:
        down = before[f"{block.name}.mlp.experts.down_proj"][lonely].abs()
        gone = down.argsort(1).argsort(1) < down.shape[1] // 2
        assert torch.equal(block.linear(f"mlp.experts.{lonely}.down").weight == 0, gone)
    assert report.achieved == pytest.approx(0.5, abs=0.02)


def test_what_shares_pruned_weights_is_told_of_experts_without_tokens(tmp_path):
    pruned, method = [], pruners.Wanda(0.5)
    for _ in range(2):
        model = tiny("mixtral")
        for block in anatomy.blocks(model):
            block.experts.register_forward_pre_hook(lambda _, args: (args[0], elsewhere(args[1], 2), args[2]))
        prune = partial(pruners.prune, model, method, windows("mixtral"))
        pruned.append((model, pruned_weights.shared(tmp_path, {"model": "mixtral"}, model, method, prune)))
    (first, made), (second, found) = pruned
    assert found.seconds == {}  # nothing was pruned
    assert found.without_tokens == made.without_tokens != []
    assert all(map(torch.equal, first.state_dict().values(), second.state_dict().values()))


def elsewhere(index, lonely):
    """Tokens of one expert go to its neighbour."""
    return torch.where(index == lonely, lonely + 1, index)
