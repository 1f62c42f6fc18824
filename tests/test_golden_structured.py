"""Structured methods against the authors' released code: kept heads and channels, and perplexity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pruners import anatomy
from tests import golden

STRUCTURED = golden.chosen(("wanda_sp_0.2", "taylor_first"), more=("flap_0.2",))


@pytest.mark.parametrize("name", STRUCTURED)
def test_kept_units_and_perplexity_agree_with_the_released_code(name):
    golden.tokens("c4")  # skips where the golden values are absent
    case, stored = golden.CASES[name], np.load(golden.FOLDER / "masks.npz")
    model = golden.pruned(name)
    for kind, kept in (("heads", heads(model)), ("channels", channels(model))):
        expected = torch.from_numpy(stored[f"{name}#{kind}"].astype(bool))[: len(kept)]
        assert (kept == expected).double().mean().item() >= case["tolerance"]["units"]
    golden.check_perplexity(model, name)


def heads(model):
    """Which query heads have weights left [blocks, heads]; the model is multi-head."""
    return torch.stack([b.linear("self_attn.q_proj").weight.view(9, -1).any(1) for b in anatomy.blocks(model)])


def channels(model):
    return torch.stack([b.linear("mlp.up_proj").weight.any(1) for b in anatomy.blocks(model)])
