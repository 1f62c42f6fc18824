"""The weight matrices of a model's decoder blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import Tensor, nn

from pruners import anatomy
from pruners.weights import homes

IN_A_BLOCK = re.compile(r"\.(\d+)\.(.+)$")


def decoder_matrices(model: nn.Module) -> Iterator[tuple[int, str, Tensor]]:
    """Block, name within it and weight [out, inp] of every matrix that pruning can zero, one block in place at a time.

    Of a model that pruning does not know: of every linear layer in a numbered list.
    """
    if anatomy.known(model):
        for block in anatomy.blocks(model):
            with homes.held(block.module):
                for name, matrix in block.linears().items():
                    yield block.index, name, matrix.weight.detach()
        return
    for path, module in model.named_modules():
        found = IN_A_BLOCK.search(path)
        if found and isinstance(module, nn.Linear):
            yield int(found[1]), found[2], module.weight.detach()
