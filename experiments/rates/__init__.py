"""Learning rates chosen from a grid: the one with the lowest loss on held-out text.

A run whose rate is chosen has a `Tuning`.  The choice is a cell of its own with a record of its own, made at the
pruning that the Tuning names; every run of that model, recovery and text whose Tuning is the same takes its rate.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

from experiments.spec import Run, Windows
from pruners.interface import checks
from pruners.interface.checks import Text
from pruners.retrain.rates import Rates


@dataclass(frozen=True)
class RateGrid:
    """The measure of a choice: after recovery at each of `rates`, the loss on `text` in nats a token."""

    rates: Rates
    text: Annotated[Windows, checks.instance(Windows, "the Windows on which losses are taken")]

    shown: ClassVar[tuple[str, ...]] = ("learning_rate",)
    chooses_rate: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.fields(self)
        if not self.rates or len(set(self.rates)) < len(self.rates):
            raise ValueError(
                f"A grid of learning rates has at least one rate, and none twice; got {checks.shown(self.rates)}."
            )

    @property
    def key(self) -> str:
        """E.g. `learning rate of 6, 1e-05 to 0.003`."""
        return f"learning rate of {len(self.rates)}, {min(self.rates):g} to {max(self.rates):g}"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def corpus(self) -> str:
        return self.text.corpus


@dataclass(frozen=True)
class Tuning:
    """Where a run's learning rate comes from: `grid`, tried after pruning by the method `at`.

    The choice is recorded among the cells of the table of that name.
    """

    grid: Annotated[RateGrid, checks.instance(RateGrid, "the RateGrid that is tried")]
    at: Any
    table: Text = field(default="perp.rates", metadata={"result": False})

    def __post_init__(self) -> None:
        checks.fields(self)


def choice(run: Run) -> Run:
    """The cell that chooses the learning rate of a run with a Tuning."""
    made = replace(run, method=run.tuning.at, measures=(run.tuning.grid,), tuning=None)
    return made if made.calibrates else replace(made, windows=None)


def grid(run: Run) -> RateGrid | None:
    """Of a run that is a choice."""
    return next((what for what in run.measures if isinstance(what, RateGrid)), None)
