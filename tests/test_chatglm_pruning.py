"""The released pruning of ChatGLM's MLPs, from its formulas: scores, kept channels, and the cut model's logits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

import pruners
from pruners import LLMPruner, anatomy, apply, checkpoint, llm_pruner
from pruners.apply import Kept
from pruners.run.stream import Stream
from tests.chatglm import GOLDEN, golden, odd, prompts
from tests.conftest import needs_shared

CASES = json.loads((GOLDEN / "pruning.json").read_text()) if GOLDEN.is_dir() else {}
# of a row of dense_h_to_4h alone: the released helper computes its column's term and never adds it
TAYLOR = {
    "vector": lambda w, g: (w * g).sum(1).abs(),
    "element1": lambda w, g: (w * g).abs().sum(1),
    "squared": lambda w, g: (w * g).square().sum(1),
}
POWERS = {"l1": 1, "l2": 2}


def scores(importance, inward, outward):
    if importance in TAYLOR:
        return TAYLOR[importance](inward.weight, inward.weight.grad)
    power = POWERS[importance]
    return (inward.weight.abs().pow(power).sum(1) + outward.weight.abs().pow(power).sum(0)) / 2


def cut(inward, outward, kept):
    inward.weight, inward.bias = nn.Parameter(inward.weight[kept]), nn.Parameter(inward.bias[kept])
    outward.weight = nn.Parameter(outward.weight[:, kept])


@needs_shared
@pytest.mark.parametrize("case", CASES)
def test_the_authors_pruned_models(case):
    told, values = CASES[case], load_file(GOLDEN / "pruning.safetensors")
    tokens, labels = values["tiny/calibration/input_ids"], values["tiny/calibration/labels"]
    model = golden()
    loss = model(tokens, labels=labels).loss
    if told["loss"] is not None:
        assert float(loss.detach()) == pytest.approx(told["loss"], abs=2e-5)
    loss.backward()
    with torch.no_grad():
        for layer, expected in zip(model.transformer.layers, told["kept_channels_per_layer"], strict=True):
            inward, outward = layer.mlp.dense_h_to_4h, layer.mlp.dense_4h_to_h
            stay = int(len(inward.weight) * (1 - told["ratio"]))
            kept = scores(told["importance"], inward, outward).topk(stay).indices.sort().values
            assert kept.tolist() == expected
            cut(inward, outward, kept)
        assert model.num_parameters() == told["parameters"][1]
        assert_close(model(tokens[:3]).logits, values[f"{case}/logits"], atol=2e-5, rtol=0.0)


@needs_shared
@pytest.mark.parametrize("importance", ["l2", "vector", "element1"])
def test_scores_of_attention_lie_head_by_head(importance):
    """[layers, heads, members, head_dim]: rows of query, key and value and columns of the output projection."""
    values = load_file(GOLDEN / "pruning.safetensors")
    model = golden()
    model(values["tiny/calibration/input_ids"], labels=values["tiny/calibration/labels"]).loss.backward()
    expected = values[f"tiny/attention_member_scores/{importance}"]
    for layer, of_layer in zip(model.transformer.layers, expected, strict=True):
        heads, size = layer.attention.num_heads, layer.attention.head_dim
        fused, output = layer.attention.query_key_value.weight, layer.attention.dense.weight
        found = []
        for weight, grad, members in ((fused, fused.grad, 3), (output.T, output.grad.T, 1)):
            score = weight.square().sum(1) if importance == "l2" else TAYLOR[importance](weight, grad)
            found.append(score.view(heads, members, size))
        assert_close(torch.cat(found, 1), of_layer, rtol=1e-4, atol=1e-6)


RELEASED = {
    "vector": "first",
    "element1": "first",
    "squared": "first",
    "l1": "mean",
    "l2": "mean",
}  # a channel's matrices


@needs_shared
@pytest.mark.parametrize("case", CASES)
def test_llm_pruner_cuts_the_released_channels(case):
    told, values = CASES[case], load_file(GOLDEN / "pruning.safetensors")
    tokens = values["tiny/calibration/input_ids"]
    importance, blocks = told["importance"], (0, len(told["kept_channels_per_layer"]))
    method = LLMPruner(
        told["ratio"],
        importance=importance,
        reduction=RELEASED[importance],
        attention_blocks=(0, 0),
        mlp_blocks=blocks,
    )
    model = golden()
    report = pruners.prune(model, method, tokens if method.needs_windows else None)
    assert report.structure.after.size.model == model.num_parameters() == told["parameters"][1]
    with torch.no_grad():
        assert_close(model(tokens[:3]).logits, values[f"{case}/logits"], atol=2e-5, rtol=0.0)


@needs_shared
@pytest.mark.parametrize("importance", ["l2", "vector", "element1"])
def test_the_entry_finds_every_heads_rows(importance):
    values = load_file(GOLDEN / "pruning.safetensors")
    model, method = golden(), LLMPruner(importance=importance, attention_blocks=(0, 3), mlp_blocks=(0, 3))
    dims = {name: int("4h_to_h" in name or ".dense." in name) for name in method.statistics_shapes(model)}
    dims |= {f"{block.name}.attention.dense.weight": 1 for block in anatomy.blocks(model)}
    tokens = values["tiny/calibration/input_ids"] if method.needs_windows else None
    scores = llm_pruner.index_scores(model, tokens, importance, dims)
    expected = values[f"tiny/attention_member_scores/{importance}"]
    for block, members in zip(anatomy.blocks(model), expected, strict=True):
        names = [f"{block.name}.{block.parameter(part.projection)[0]}" for part in block.parts["attention"]]
        found = [scores[name][part.index] for name, part in zip(names, block.parts["attention"], strict=True)]
        assert_close(torch.stack(found, 1), members, rtol=1e-4, atol=1e-6)


def test_a_ragged_chatglm_comes_back(tmp_path):
    model = odd()
    for block, (heads, channels) in zip(anatomy.blocks(model), ((0, 20), (2, 0)), strict=True):
        apply.cut(block, Kept(torch.arange(3) < heads, torch.arange(70) < channels))
    apply.describe(model)
    checkpoint.save(model, None, tmp_path / "out")
    again, _ = checkpoint.load(tmp_path / "out")
    assert type(again).__name__ == "PrunedChatGLMForCausalLM"
    with torch.no_grad():
        assert torch.equal(again(prompts()).logits, model(prompts()).logits)


def test_windows_of_other_contents_are_replayed_with_masks_of_their_own():
    """Every row's context ends elsewhere, and batches of three and one take rows in any order."""
    model, tokens = odd(), prompts(4)
    tokens[1:] = torch.stack([torch.roll(row, shift) for shift, row in enumerate(tokens[1:], 1)])
    stream = Stream(model, tokens, 3)
    block, rows = anatomy.blocks(model)[0], torch.tensor([3, 0])
    with torch.no_grad():
        expected = model(tokens[rows], output_hidden_states=True).hidden_states[1]
        assert_close(stream.run(block, rows), expected, rtol=1e-6, atol=1e-6)


def test_dialogues_of_unlike_length_share_one_loss(monkeypatch):
    """However few tokens go at once: their mean is over tokens, of which one dialogue has more than another."""
    monkeypatch.setattr(llm_pruner, "TOKENS_AT_ONCE", {"cpu": 64})
    model, answers = odd(), (1, 2, 1, 40, 3)
    rows = [[10, 11, 12, 5, 8, *range(20, 20 + answer), 9] for answer in answers]
    windows = torch.tensor([row + [3] * (48 - len(row)) for row in rows])
    labels = windows.masked_fill(windows == 3, -100)
    labels[:, :4] = -100
    method = LLMPruner(importance="element1", attention_blocks=(0, 0), mlp_blocks=(0, 2))
    found = pruners.gather(model, method, windows)
    model(windows, labels=labels).loss.backward()
    for index, layer in enumerate(model.transformer.layers):
        weight = layer.mlp.dense_h_to_4h.weight
        expected = (weight * weight.grad).abs().sum(1)
        assert_close(found[f"transformer.layers.{index}.mlp.dense_h_to_4h.weight"], expected, rtol=1e-4, atol=1e-9)
