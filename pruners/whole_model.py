"""LLM-Pruner's two coarse granularities: channels of the residual stream, and whole blocks from the end."""

from __future__ import annotations

from typing import Any

from pruners import anatomy, apply, select
from pruners.lazy import Float, Tensor, torch
from pruners.report import Size, State, Structure
from pruners.structured import Structured
from pruners.weights import homes


def narrow(method: Structured, model: Any, scores: Float[Tensor, " width"], cut: bool) -> Structure:
    """Remove the lowest-scored channels of the residual stream from every parameter that holds them."""
    before, cost, width = State.of(model), channel_cost(model), len(scores)
    if method.target_parameters is None:
        asked, gone = cost.times(method.asked * width), width - int(width * (1 - method.asked))
    else:
        share = method.asked * getattr(before.size, method.target_of) / getattr(cost, method.target_of)
        asked, gone = cost.times(share), round(share)
    _check(method, asked, cost.times(width - 1))
    rounded = method.rounded(width, gone)
    keep = ~select.lowest(scores, rounded)
    if rounded:
        (apply.narrow if cut else apply.zero_narrow)(model, keep)
        if cut:
            apply.describe(model)
    after = State(before.size.less(cost.times(rounded)), before.blocks, width - rounded)
    return Structure(method.setting, asked, cost.times(gone - rounded).model, before, after)


def shorten(method: Structured, model: Any, cut: bool) -> Structure:
    """Remove the last blocks."""
    before, blocks = State.of(model), anatomy.blocks(model)
    sizes = [sum(p.numel() for p in block.module.parameters()) for block in blocks]
    if method.target_parameters is None:
        asked, most = round(method.asked * sum(sizes)), round(sum(sizes) * (len(blocks) - 1) / len(blocks))
        gone = int(method.asked * len(blocks) + 1e-9)  # a share of the blocks, however uneven they are
    else:
        asked, most = round(method.asked * getattr(before.size, method.target_of)), sum(sizes[1:])
        lost = torch.tensor([0, *sizes[::-1]]).cumsum(0)
        gone = int((lost - asked).abs().argmin())
    stays = len(blocks) - gone
    _check(method, Size(asked, asked), Size(most, most))
    if cut:
        apply.keep_first(model, stays)
    else:
        for block in blocks[stays:]:
            with homes.held(block.module, changes=True):
                apply.silence(block)
    lost_now = sum(sizes[stays:])
    after = State(before.size.less(Size(lost_now, lost_now)), before.blocks[:stays], before.hidden_size)
    return Structure(method.setting, Size(asked, asked), 0, before, after)


def channel_cost(model: Any) -> Size:
    """Parameters that one channel of the residual stream holds."""
    inside = tuple(f"{block.name}." for block in anatomy.blocks(model))
    dims, named = apply.residual(model), dict(model.named_parameters())  # tied parameters once
    each = {name: named[name].numel() // named[name].shape[dim] for name, dim in dims.items() if name in named}
    return Size(sum(each.values()), sum(cost for name, cost in each.items() if name.startswith(inside)))


def _check(method: Structured, asked: Size, most: Size) -> None:
    if asked.model > most.model:
        raise ValueError(
            f"{method.setting} is {asked.model:,} parameters, and at most {most.model:,} may go; ask for less."
        )
