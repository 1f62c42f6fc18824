"""The loss on text held out from training."""

from __future__ import annotations

import math
from typing import Any

from pruners.calibrate import Progress
from pruners.interface import checks
from pruners.interface.checks import Count
from pruners.lazy import PreTrainedModel, Tensor, no_grad, torch
from pruners.retrain.batches import Batches
from pruners.run import inputs, loss
from pruners.run.stream import evaluating
from pruners.weights import sweep


class NotFiniteError(ValueError):
    """A loss is infinite or no number."""


@checks.arguments
@no_grad
def held_out_loss(
    model: PreTrainedModel, examples: Any, *, batch_size: Count = 8, progress: Progress | None = None
) -> tuple[float, int]:
    """Mean loss of `examples` (as for `finetune`) in nats a predicted token, and how many are predicted; no dropout.

    Every token counts the same, whatever its example's length; `batch_size` moves rounding alone.  Raises
    NotFiniteError, a ValueError, as soon as the loss is not finite.
    """
    model = inputs.predicting_model(model)
    batches = Batches(examples, batch_size, seed=0, config=model.config)
    with inputs.whole_products():
        return of_batches(model, batches, progress), batches.predicted(range(len(batches.examples)))


@no_grad
def of_batches(
    model: PreTrainedModel, batches: Batches, progress: Progress | None = None, *, whole: bool = False
) -> float:
    """The same of examples that have been read, as many at once as their batches have; `whole`: all logits of them."""
    order = sorted(range(len(batches.examples)), key=lambda index: len(batches.examples[index][0]))  # little padding
    cut = [order[start : start + batches.batch_size] for start in range(0, len(order), batches.batch_size)]
    tokens, total, done = batches.predicted(order), 0.0, 0
    with evaluating(model):
        for number in sweep.over(model, [_asked(batches, indices) for indices in cut]):
            batch = batches.collated(cut[number], model.device)
            total += float(loss.of(model, batch, tokens, whole=whole))
            done += len(cut[number])
            if not math.isfinite(total):
                raise NotFiniteError(
                    f"The held-out loss is {total} after {done} of {len(order)} examples: the model overflows; use "
                    "bfloat16 or float32."
                )
            if progress:
                progress(done, len(order))
    return total


def _asked(batches: Batches, indices: list[int]) -> dict[str, Tensor]:
    """What reaches the blocks of it."""
    batch = batches.collated(indices, torch.device("cpu"))
    return {name: value for name, value in batch.items() if name != "labels"}
