"""Structure in masks: random masks have none, spared columns show."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from eval.patterns import mask_patterns, overdispersion
from tests.conftest import hollow


def mask(kept_by_column, rows=400):
    kept = torch.as_tensor(kept_by_column).expand(rows, -1)
    return torch.rand(kept.shape, generator=torch.Generator().manual_seed(0)) < kept


def test_a_random_mask_has_no_structure():
    there = mask([0.5] * 300)
    assert overdispersion(there, dim=0) == pytest.approx(1, abs=0.2)
    assert overdispersion(there, dim=1) == pytest.approx(1, abs=0.2)


def test_columns_that_are_spared_show_in_columns_only():
    there = mask([0.9] * 150 + [0.1] * 150)
    assert overdispersion(there, dim=0) > 100
    assert overdispersion(there, dim=1) < 1


def test_equal_shares_in_every_row_are_less_than_random():
    there = torch.zeros(50, 40, dtype=torch.bool)
    there[:, ::2] = True
    assert overdispersion(there, dim=1) == 0.0
    assert overdispersion(there, dim=0) == pytest.approx(50 * 40 / 39, rel=1e-3)


def test_a_dense_matrix_has_none():
    assert overdispersion(torch.ones(4, 5, dtype=torch.bool), dim=0) is None


def model(blocks=2):
    return nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 8)}) for _ in range(blocks))})


def test_maps_show_the_asked_block_as_two_digits_a_cell():
    small = model()
    with torch.no_grad():
        small["layers"][1]["up"].weight[:4] = 0
    told = mask_patterns(small, block=1, side=2)
    assert told["maps"] == {"up": ["0000", "9999"]}
    assert told["matrices"]["up"]["kept"] == [1.0, 0.5]
    assert told["matrices"]["up"]["rows"][0] is None
    assert told["row_dispersion"] > 1


def test_a_block_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"no block 2.*has 2, counted from 0"):
        mask_patterns(model(), block=2)


def test_blocks_without_heads_or_channels_have_no_maps_of_what_is_gone():
    cut = hollow("llama grouped-query", "no head, no channel")
    told = mask_patterns(cut, block=0)
    assert list(told["maps"]) == ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    assert told["matrices"]["self_attn.q_proj"]["kept"][0] is None
    json.dumps(told, allow_nan=False)


def test_a_block_that_has_nothing_left_has_no_map_and_is_there():
    told = mask_patterns(hollow("opt", "nothing"), block=0)
    assert told["maps"] == {}
    json.dumps(told, allow_nan=False)
