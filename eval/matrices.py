"""The weight matrices of a model's decoder blocks."""

from __future__ import annotations

import re

from torch import Tensor, nn

from pruners import anatomy

IN_A_BLOCK = re.compile(r"\.(\d+)\.(.+)$")


def decoder_matrices(model: nn.Module) -> list[tuple[int, str, Tensor]]:
    """Block, name within it and weight [out, inp] of every matrix that pruning can zero.

    Of a model that pruning does not know: of every linear layer in a numbered list.
    """
    if anatomy.known(model):
        named = [(block, name, matrix) for block in anatomy.blocks(model) for name, matrix in block.linears().items()]
        return [(block.index, name, matrix.weight.detach()) for block, name, matrix in named]
    numbered = [(IN_A_BLOCK.search(path), module) for path, module in model.named_modules()]
    return [
        (int(found[1]), found[2], module.weight.detach())
        for found, module in numbered
        if found and isinstance(module, nn.Linear)
    ]
