"""Special tokens without which a model cannot read a sequence, such as ChatGLM's `[gMASK] <sop>`; most have none."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel


def text_prefix(model: PreTrainedModel) -> tuple[int, ...]:
    """The tokens that must stand in front of plain text, as the configuration says."""
    return tuple(getattr(model.config, "text_prefix", ()))


def prefixed(model: PreTrainedModel, tokens: Int[Tensor, "batch length"]) -> Int[Tensor, "batch longer"]:
    """The sequences with these tokens in front."""
    prefix = tokens.new_tensor(text_prefix(model)).expand(len(tokens), -1)
    return torch.cat([prefix, tokens], 1) if prefix.numel() else tokens


def begun(model: PreTrainedModel, tokens: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """As many tokens as before, the first of them overwritten: for sequences whose contents mean nothing."""
    prefix = tokens.new_tensor(text_prefix(model))
    return torch.cat([prefix.expand(len(tokens), -1), tokens[:, len(prefix) :]], 1) if prefix.numel() else tokens
