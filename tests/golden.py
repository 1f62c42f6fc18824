"""The golden cases: the authors' released code on the embedded model with its groups expanded to multi-head."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import pruners
from eval.perplexity import perplexity
from experiments import models
from tests.conftest import SHARED

FOLDER = SHARED / "golden"
WHOLE = bool(os.environ.get("PRUNING_GOLDEN"))  # `make golden`: a quarter of an hour
# Blocks of the suite's cases in which what is lost follows from earlier blocks: the kept masks are of blocks 0, 15, 29.
FIRST = {"magnitude": 16, "wanda": 16, "sparsegpt": 1, "wanda_sp_0.2": 4}
CASES = json.loads((FOLDER / "golden.json").read_text())["cases"] if FOLDER.is_dir() else {}


def chosen(suite: tuple[str, ...], more: tuple[str, ...]) -> list[str]:
    """All cases in `make golden`; those of `suite` also in the suite, without perplexities."""
    return [*suite, *(more if WHOLE else ())]


def expanded(blocks: int | None = None) -> PreTrainedModel:
    """The embedded model in float32, every key and value head repeated for each query head of its group; with `blocks`
    its first ones alone."""
    model, _ = models.load("smollm2-135m", "float32")
    for layer in model.model.layers:
        attention = layer.self_attn
        for projection in (attention.k_proj, attention.v_proj):
            heads = projection.weight.data.view(3, 64, 576).repeat_interleave(3, 0)
            projection.weight, projection.out_features = nn.Parameter(heads.reshape(576, 576)), 576
        attention.num_key_value_groups = 1
    model.config.num_key_value_heads = 9
    if blocks is not None:
        del model.model.layers[blocks:]
        model.config.num_hidden_layers = blocks
    return model


def tokens(name: str) -> Tensor:
    if not FOLDER.is_dir():
        pytest.skip(f"{FOLDER} is absent: the golden values are not beside the project")
    return torch.from_numpy(np.load(FOLDER / "tokens.npz")[name].astype(np.int64))


def pruned(name: str) -> PreTrainedModel:
    """The expanded model after the case's method on the case's calibration windows."""
    case = CASES[name]
    model = expanded(None if WHOLE else FIRST.get(name))
    if case["method"]:
        fields = dict(case["method"])
        method = getattr(pruners, fields.pop("class"))(**fields)
        count, length = case["calibration"]
        windows = tokens("c4")[: count * length].view(count, length)
        pruners.prune(model, method, windows, **case.get("prune", {}))
    return model


def check_perplexity(model: PreTrainedModel, name: str) -> None:
    """Of the whole model, that is in `make golden`; one costs half a minute."""
    if not WHOLE:
        return
    case = CASES[name]
    found = perplexity(model, tokens("wikitext2_test"), 512).perplexity
    assert found == pytest.approx(case["perplexity"], rel=case["tolerance"]["perplexity"])
