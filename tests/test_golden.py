"""Unstructured methods against the authors' released code: masks and perplexity."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests import golden

UNSTRUCTURED = golden.chosen(("magnitude", "wanda", "sparsegpt"), more=("dense", "gblm_l2"))


@pytest.mark.parametrize("name", UNSTRUCTURED)
def test_masks_and_perplexity_agree_with_the_released_code(name):
    golden.tokens("c4")  # skips where the golden values are absent
    case = golden.CASES[name]
    model = golden.pruned(name)
    here = {name for name, _ in model.named_modules()}
    for projection, expected in masks(name).items():
        if projection not in here and not golden.WHOLE:
            continue
        zero = model.get_submodule(projection).weight == 0
        agreement = (zero == expected.view_as(zero)).double().mean().item()
        assert agreement >= case["tolerance"]["mask"], projection
    golden.check_perplexity(model, name)


def masks(name):
    stored = np.load(golden.FOLDER / "masks.npz")
    chosen = {key.split("|")[1]: stored[key] for key in stored if key.startswith(f"{name}|")}
    return {projection: torch.from_numpy(np.unpackbits(packed).astype(bool)) for projection, packed in chosen.items()}
