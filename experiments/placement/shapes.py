"""The sizes of a decoder that memory goes by: from a folder's configuration, or from the catalogue's parameters and
blocks, as usual decoders have them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from experiments import models

LLAMA = (32_000, 2, 8 / 3)  # tokens, matrices of them around the blocks, channels of the MLP for each of the width's
LAYOUTS = {"facebook/opt": (50_272, 1, 4), "bigscience/bloom": (250_880, 1, 4), "EleutherAI/": (50_432, 2, 4)}
EXPERTS = {"mistralai/Mixtral-8x7B": (4_096, 14_336, 8, 2)}  # width, channels of one of so many experts, each token's
LONGEST = 4_096  # positions of a model that does not say how many it has


@dataclass(frozen=True)
class Shape:
    """Of a decoder: `width` of the residual stream, `channels` of the MLP; `block`, `around` and `embedded` count
    parameters: of one block, of what lies around the blocks, and of the embeddings among these.  A token goes to
    so many `routes` of the `experts`; 0: there is one MLP, and no routing."""

    blocks: int
    width: int
    channels: int
    vocabulary: int
    block: int
    around: int
    positions: int = LONGEST
    experts: int = 1
    routes: int = 0

    @property
    def embedded(self) -> int:
        return min(self.around, self.vocabulary * self.width)

    @property
    def matrix(self) -> int:
        """Numbers of the largest matrix of a block."""
        return self.width * self.channels

    @property
    def parameter(self) -> int:
        """Of its largest parameter, where all experts' gates and ups may be one."""
        return self.matrix * (2 * self.experts if self.experts > 1 else 1)

    @property
    def parameters(self) -> int:
        return self.blocks * self.block + self.around


def shape_of(model: str) -> Shape:
    found = models.find(model)
    if found.folder is not None:
        return _configured(found.folder, found.parameters or 0)
    layout = next((told for start, told in LAYOUTS.items() if (found.hub or "").startswith(start)), LLAMA)
    positions = found.positions or LONGEST
    experts = next((told for start, told in EXPERTS.items() if (found.hub or "").startswith(start)), None)
    if experts and found.blocks and found.parameters:
        vocabulary, matrices, _ = layout
        around = matrices * vocabulary * experts[0]
        block = (found.parameters - around) // found.blocks
        return Shape(found.blocks, *experts[:2], vocabulary, block, around, positions, *experts[2:])
    return _usual(found.parameters or 0, found.blocks or 1, positions, *layout)


@lru_cache
def _configured(folder: Path, parameters: int) -> Shape:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    width = config.hidden_size
    names = ("moe_intermediate_size", "intermediate_size", "ffn_dim", "n_inner")  # the first is an expert's
    named = (getattr(config, name, None) for name in names)
    channels = next(filter(None, named), 4 * width)
    around = (1 if config.tie_word_embeddings else 2) * config.vocab_size * width
    blocks = config.num_hidden_layers
    positions = getattr(config, "max_position_embeddings", None) or LONGEST
    block = max(0, parameters - around) // blocks
    experts = next(filter(None, (getattr(config, name, None) for name in ("num_local_experts", "num_experts"))), 1)
    routes = getattr(config, "num_experts_per_tok", None) or 1 if experts > 1 else 0
    return Shape(blocks, width, channels, config.vocab_size, block, around, positions, experts, routes)


@lru_cache
def _usual(parameters: int, blocks: int, positions: int, vocabulary: int, matrices: int, channels: float) -> Shape:
    """12 width^2 parameters a block, so many times the width as channels, and embeddings and head around them."""
    a, b = 12 * blocks, matrices * vocabulary
    width = round((math.sqrt(b * b + 4 * a * parameters) - b) / (2 * a))
    around = min(parameters, b * width)
    block = (parameters - around) // blocks
    return Shape(blocks, width, round(channels * width), vocabulary, block, around, positions)
