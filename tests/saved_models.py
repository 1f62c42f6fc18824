"""Models to be saved in the tests, and a hand to change what was."""

from __future__ import annotations

import json

import torch

import pruners
from pruners import anatomy, apply
from pruners.apply import Kept
from tests.conftest import tiny

FLAP = pruners.Flap(ratio=0.5)


UNIFORM = pruners.Flap(ratio=0.5, structure="UL-UM")


def pruned(kind, windows, method=FLAP):
    model = tiny(kind)
    pruners.prune(model, method, windows)
    return model


def no_attention(kind):
    """Cut by hand: no head in the first block, no channel in the second."""
    model = tiny(kind)
    for block in anatomy.blocks(model):
        kept = Kept.all(block)
        kept["mlp" if block.index else "attention"][:] = False
        apply.cut(block, kept)
    apply.describe(model)
    return model


def ragged(kind):
    return pruned(kind, torch.arange(96).view(6, 16))


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
