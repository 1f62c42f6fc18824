"""The released pruning of ChatGLM's MLPs, from its formulas: scores, kept channels, and the cut model's logits."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from tests.chatglm import GOLDEN, golden
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
