"""Norms of models whose heads or channels are zeroed: rescaled to means over what is left, as if the rest were cut out.

Weight and epsilon are rescaled.  Which entries a mean counts is remembered, so that what was zeroed once may be zeroed
again, stay, or be cut out later: of heads by the norm, of the residual stream's channels by the configuration.
"""

from __future__ import annotations

import math
from typing import Any

from pruners.anatomy import Block
from pruners.lazy import Bool, Int, Tensor, nn, torch

MASKED = "masked_channels"  # of a configuration: which channels of the residual stream are zeroed


def rescaled(model: nn.Module) -> list[str]:
    """Norms over all heads that count only some of them, since the others were zeroed."""
    return [name for name, module in model.named_modules() if hasattr(module, "counted")]


def over_heads(block: Block) -> list[tuple[Any, Int[Tensor, "units size"]]]:
    """Norms whose mean is over all heads, and each unit's entries of them."""
    found = [follower for follower in block.followers if follower.over_all_heads]
    return [(block.module.get_submodule(follower.norm), follower.index) for follower in found]


def counted(norm: Any) -> Bool[Tensor, " entries"]:
    """Which entries the norm's mean counts: all but those of heads that were zeroed."""
    return getattr(norm, "counted", torch.ones(len(norm.weight), dtype=torch.bool)).clone()


def count(norm: Any, stays: Bool[Tensor, " entries"]) -> None:
    """Rescale the norm so that its mean over as many entries as `stays` has is one over those that it marks."""
    share = _share(stays)
    change = share / _share(counted(norm))
    if change != 1:
        norm.weight.data *= math.sqrt(change)
        norm.variance_epsilon *= change
    vars(norm).pop("counted", None)
    if share != 1:
        norm.counted = stays


def _share(stays: Bool[Tensor, " entries"]) -> float:
    return float(stays.float().mean()) if stays.any() else 1.0  # without heads there is nothing to normalise


def count_channels(model: nn.Module, config: Any, stays: Bool[Tensor, " width"]) -> None:
    """Rescale RMS norms so that their means over as many channels as `stays` has are ones over those that it marks.

    The configuration remembers the others, so that a model that is opened again can be masked further, or cut.
    """
    change = _share_of_channels(stays) / _share_of_channels(counted_channels(config))
    if change != 1:
        module: Any
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon *= change
                module.weight.data *= math.sqrt(change)
        config.rms_norm_eps *= change
    vars(config).pop(MASKED, None)
    if not stays.all():
        setattr(config, MASKED, (~stays).nonzero().flatten().tolist())


def counted_channels(config: Any) -> Bool[Tensor, " width"]:
    """Which channels the RMS norms' means count: all but those that were zeroed."""
    counted = torch.ones(config.hidden_size, dtype=torch.bool)
    counted[getattr(config, MASKED, [])] = False
    return counted


def _share_of_channels(stays: Bool[Tensor, " width"]) -> float:
    return int(stays.sum()) / len(stays) or 1.0  # where all are zero there is nothing to normalise
