"""Choosing a learning rate: each rate of a grid is tried on the same model and judged by held-out text.

Rows of a table that train different things need rates of their own: one rate for all of them favours whatever it suits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pruners.calibrate import Progress
from pruners.interface import checks
from pruners.interface.checks import Count, Rule
from pruners.lazy import PreTrainedModel, Tensor, nn, torch
from pruners.retrain.held_out import NotFiniteError, held_out_loss
from pruners.retrain.schedule import Diverged
from pruners.run import inputs
from pruners.weights import homes, structure

Rates = Annotated[
    tuple[float, ...],
    checks.several(
        Rule("", (int, float), lambda rate: 0 < rate < math.inf), "a tuple of learning rates, each positive and finite"
    ),
]
Attempt = Annotated[Callable[[float], Any], checks.FUNCTION]


@dataclass(frozen=True)
class RateChoice:
    """The held-out loss in nats a token `before` and after each of `rates`, from the lowest; None where it diverged.

    `chosen` has the lowest loss, of equal ones the lowest rate.
    """

    rates: tuple[float, ...]
    losses: tuple[float | None, ...]
    before: float
    chosen: float

    @property
    def at_edge(self) -> bool:
        """Whether the choice is the lowest or highest of the grid, so that a rate outside it may be better."""
        return self.chosen in (self.rates[0], self.rates[-1])

    @property
    def helps(self) -> bool:
        """Whether training at that rate lowers the loss at all."""
        return min(loss for loss in self.losses if loss is not None) < self.before

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"at_edge": self.at_edge, "helps": self.helps}


@checks.arguments
def choose_rate(
    model: PreTrainedModel,
    attempt: Attempt,
    rates: Rates,
    held_out: Any,
    *,
    batch_size: Count = 8,
    progress: Progress | None = None,
) -> RateChoice:
    """The rate after whose `attempt(rate)` the loss of `model` on `held_out` is lowest; the model is left as it was.

    `attempt` changes the model in place: it retrains it, or prunes it, cut or not, and rebuilds or retrains what is
    left.  `held_out` are examples as for `finetune`, none of which an attempt may train on.  An attempt that raises
    Diverged, or leaves a loss that is not finite, is no choice.  After every attempt `progress(done, len(rates))` is
    called.  The CPU's memory holds a copy of the model meanwhile, unless its weights are at home on the disk.

    Raises ValueError for a grid without rates or with one twice, TypeError or ValueError for text that is none, before
    anything is trained; Diverged where every rate does.
    """
    model, grid = inputs.language_model(model), tuple(sorted(rates))
    if not grid or len(set(grid)) < len(grid):
        raise ValueError(f"A grid of learning rates has at least one rate, and none twice; got {checks.shown(rates)}.")
    before, _ = held_out_loss(model, held_out, batch_size=batch_size)
    losses: list[float | None] = []
    for rate in grid:
        with _put_back(model):
            try:
                attempt(rate)
                losses.append(held_out_loss(model, held_out, batch_size=batch_size)[0])
            except (Diverged, NotFiniteError):
                losses.append(None)
        if progress:
            progress(len(losses), len(grid))
    found = [(loss, rate) for loss, rate in zip(losses, grid, strict=True) if loss is not None]
    if not found:
        raise Diverged(f"Training diverged at every rate of the grid, {checks.shown(grid)}; try lower ones.")
    return RateChoice(grid, tuple(losses), before, min(found)[1])


@contextmanager
def _put_back(model: PreTrainedModel) -> Iterator[None]:
    """The model as it was, bits and parts, once what is done here is over.

    Adapters are gone, a tied head is tied again, and what was cut out is back.
    """
    flags = {p: p.requires_grad for p in model.parameters()}
    values = {p: p.detach().cpu().clone() for p in flags} if homes.of(model) is None else {}
    put_back = structure.remembered(model)
    try:
        with homes.undone(model):
            yield
    finally:
        put_back()
        for p, value in values.items():
            _fill(p, value)
        for p, wanted in flags.items():
            p.requires_grad_(wanted)
            p.grad = None


def _fill(p: nn.Parameter, value: Tensor) -> None:
    with torch.no_grad():
        p.data = value.to(p.device)
