"""The next-token loss of a batch, and backward from it, with the logits of part of the tokens where they are many."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from pruners import anatomy
from pruners.lazy import F, Tensor, nn, torch
from pruners.run import inputs
from pruners.run.inputs import IGNORED
from pruners.run.stream import Caught, handing_on, instead

LOGITS = 2**25  # that are made at once


def of(
    model: Any,
    batch: Mapping[str, Tensor],
    divisor: float | None = None,
    scale: float | None = None,
    *,
    whole: bool = False,
) -> Tensor:
    """The summed loss of `batch` over `divisor`, without one the mean of what is predicted; float32, detached.

    `batch` is what the model is called with, `labels` [windows, length] among it.  With a `scale` the gradients of
    that many times the loss are added to those of what is trained.  The pieces in which many logits are made move
    rounding alone; `whole`, or where a model cannot be asked for a piece or a piece would differ, all are made at once.
    What models of experts add to their loss for the router is left out.
    """
    labels = batch["labels"]
    if getattr(model.config, "output_router_logits", False):
        batch = {**batch, "output_router_logits": False}  # type: ignore[dict-item]
    at_once = max(1, LOGITS // (len(labels) * model.config.vocab_size))
    if whole or at_once >= labels.shape[1] or not _divisible(model):
        counted = {} if divisor is None else {"num_items_in_batch": divisor}
        loss: Tensor = model(**batch, use_cache=False, **counted).loss
        if scale is not None:
            _back(loss * scale)
        return loss.detach()
    asked = {name: value for name, value in batch.items() if name != "labels"}
    hidden, beside = _behind_the_blocks(model, asked)
    ends = hidden.detach().requires_grad_(scale is not None and hidden.requires_grad)
    total = torch.zeros((), dtype=torch.float32, device=ends.device)
    over = (labels[:, 1:] != IGNORED).sum().to(ends.device) if divisor is None else divisor
    with handing_on(model, ends, [beside]):
        for places in torch.arange(labels.shape[1] - 1, device="cpu").split(at_once):  # which index on any device
            part = _piece(model, asked, labels, places).to(ends.device) / over
            if scale is not None:
                _back(part * scale)
            total += part.detach()
    if ends.grad is not None:
        _back(hidden, ends.grad)
    return total


def _divisible(model: Any) -> bool:
    """Whether the head gives the logits of some tokens as it gives those of all, from what the last block has made."""
    if not anatomy.known(model) or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return False
    head = model.get_output_embeddings().modules()
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 and module.training for module in head)
    return not drops and not (model.training and getattr(model.config, "layerdrop", 0))


def _piece(model: Any, asked: Mapping[str, Tensor], labels: Tensor, places: Tensor) -> Tensor:
    """The summed loss of what is predicted at these places; the logits themselves last until backward alone."""
    logits = model(**asked, use_cache=False, logits_to_keep=places).logits.float()
    targets = labels[:, places.to(labels.device) + 1].flatten().to(logits.device)
    return F.cross_entropy(logits.flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")


def _behind_the_blocks(model: Any, asked: Mapping[str, Tensor]) -> tuple[Tensor, tuple[Any, ...]]:
    """What the last block makes of the tokens, and what it returns beside that."""
    made: list[Any] = []

    def stop(forward: Any, *args: Any, **kwargs: Any) -> Any:
        made.append(forward(*args, **kwargs))
        raise Caught

    last = anatomy.modules(model)[-1]
    with instead(last, partial(stop, last.forward)), suppress(Caught):
        model(**asked, use_cache=False)
    (returned,) = made
    return (returned, ()) if isinstance(returned, Tensor) else (returned[0], returned[1:])


def _back(outcome: Tensor, gradient: Tensor | None = None) -> None:
    """In the dtypes of the forward pass: what autograd functions of ours compute would be cast once more."""
    with torch.autocast(outcome.device.type, enabled=False):
        inputs.back(outcome, gradient)
