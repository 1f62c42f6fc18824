"""Forward and backward passes of a batch's loss, in micro-batches: of a model in place, or block by block from home.

A model whose weights are away brings each block twice a step: once for all micro-batches forward, where what every
block gets is kept, and once for their recomputation and backward.  What is trained stays on the device.  What is
dropped out is drawn for step, micro-batch and block, so that losses and gradients are those of a model in place to the
bit.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pruners import anatomy
from pruners.lazy import Tensor, nn, torch
from pruners.retrain.batches import Batches
from pruners.retrain.schedule import autocast, seeded
from pruners.run import inputs, loss
from pruners.run.ranks import Ranks
from pruners.run.stream import Arguments, handing_on, instead, reaching
from pruners.weights import aside, homes

T = TypeVar("T")


@dataclass(frozen=True)
class Micro:
    """Examples that go through the model at once: their numbers, what their summed loss is divided by (infinity: they
    are another rank's, and have no gradient here), and the place of the first of them in the whole batch."""

    indices: Sequence[int]
    divisor: float
    place: int


def dealt(batches: Batches, indices: Sequence[int], size: int, reference: bool, together: Ranks) -> list[Micro]:
    """This rank's micro-batches of a batch, of so many examples; by `reference` a loss is a mean of their means."""
    mine = share(together, list(enumerate(indices)), size, reference)
    numbers = [[index for _, index in part] for part in mine]
    if reference:
        divisors: list[float] = [len(indices) // size * batches.predicted(part) for part in numbers]
    else:
        divisors = [batches.predicted(indices)] * len(mine)
    if together.rank >= len(indices) // (size if reference else 1):
        divisors = [math.inf] * len(mine)
    places = (part[0][0] for part in mine)
    return [Micro(*told) for told in zip(numbers, divisors, places, strict=True)]


def share(together: Ranks, examples: Sequence[T], size: int, reference: bool) -> list[Sequence[T]]:
    """This rank's micro-batches of so many of these examples; ValueError where ranks cannot share them evenly.

    Where ranks are a multiple of what is shared, the first of them do it, and the others go through the same examples
    and only lend their memory.
    """
    units: Sequence[Any] = _cut(examples, size) if reference else examples
    if together.count % len(units) == 0:
        mine: Sequence[Any] = [units[together.rank % len(units)]]
    else:
        mine = together.share(units, size if reference else 1)
    return list(mine) if reference else _cut(mine, size)


def _cut(examples: Sequence[T], size: int) -> list[Sequence[T]]:
    return [examples[start : start + size] for start in range(0, len(examples), size)]


@dataclass
class Way:
    """One micro-batch on its way through the blocks: what the model is called with, its hidden states and their
    gradient, and the blocks' other arguments."""

    micro: Micro
    batch: dict[str, Tensor]
    hidden: Tensor
    arguments: list[Arguments]
    gradient: Tensor | None = None
    kept: dict[int, Tensor] = field(default_factory=dict)  # what a block got, by its index


class Passes:
    """Of `model` on examples of `batches`; `precision` is a dtype for autocast, `trained` what gets gradients.

    `sharded`: weights are gathered for a while only, so their casts are not kept for longer, and the model goes through
    its passes whole.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        precision: torch.dtype | None,
        trained: Sequence[nn.Parameter],
        sharded: bool = False,
    ) -> None:
        self.sharded = sharded
        self.model, self.batches, self.precision, self.trained = model, batches, precision, trained
        self.device: torch.device = model.device
        self._numbers: tuple[int, ...] = (batches.seed,)
        self._returned: list[tuple[Any, ...]] = []  # by a block beside hidden states

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within, what a block drops out depends on the micro-batch and the block alone."""
        with ExitStack() as stack:
            for index, block in enumerate(anatomy.modules(self.model)):
                stack.enter_context(instead(block, self._drawn(index, block.forward)))
            yield

    def _drawn(self, index: int, forward: Any) -> Any:
        @functools.wraps(forward)
        def drawn(*args: Any, **kwargs: Any) -> Any:
            with seeded(self.device, *self._numbers, index):
                return forward(*args, **kwargs)

        return drawn

    @contextmanager
    def _at(self, step: int, micro: Micro) -> Iterator[None]:
        self._numbers = (self.batches.seed, step, micro.place)
        with seeded(self.device, *self._numbers), autocast(self.precision, self.device, not self.sharded):
            yield

    def loss(self, micro: Micro, precision: torch.dtype | None, scale: float | None = None) -> Tensor:
        batch = self.batches.collated(micro.indices, self.device)
        with autocast(precision, self.device, not self.sharded):
            return loss.of(self.model, batch, micro.divisor, scale, whole=self.sharded)

    def backward(self, step: int, micros: Sequence[Micro]) -> Tensor:
        """Add the gradients of these micro-batches' losses; returns the sum of the losses."""
        total = torch.zeros((), device=self.device)
        tied = None if self.sharded else self._tied()
        if homes.of(self.model) is not None:
            for together in [micros] if tied is None else [[micro] for micro in micros]:
                with _apart(tied):
                    for value in self._by_block(step, together):
                        total += value
            return total
        for micro in micros:
            with self._at(step, micro), _apart(tied):
                total += self.loss(micro, self.precision, 1.0)
        return total

    def _tied(self) -> nn.Parameter | None:
        """The trained matrix that is read before the blocks and behind them, if there is one: each micro-batch adds
        both of its gradients at once."""
        embeddings: nn.Parameter = self.model.get_input_embeddings().get_parameter("weight")
        ties = getattr(self.model.get_output_embeddings(), "weight", None) is embeddings
        return embeddings if ties and any(p is embeddings for p in self.trained) else None

    def _by_block(self, step: int, micros: Sequence[Micro]) -> list[Tensor]:
        blocks, home = list(enumerate(anatomy.modules(self.model))), homes.of(self.model)
        assert home is not None  # the caller has looked
        around = homes.around_the_blocks(self.model)
        with homes.held(self.model.get_input_embeddings()):
            ways = [self._front(step, micro) for micro in micros]
        embeds = ways[0].hidden.requires_grad
        trained = set(self.trained)
        learning = [index for index, block in blocks if not trained.isdisjoint(block.parameters())]
        first = 0 if embeds else min(learning, default=len(blocks))
        for way in ways:
            way.hidden = way.hidden.detach()
        with torch.no_grad():
            for index, block in blocks:
                with homes.held(block):
                    for way in ways:
                        if index >= first:
                            way.kept[index] = aside.put(self.model, way.hidden)
                        way.hidden = self._run(step, index, block, way, way.hidden)
        with homes.held(*around):
            losses = [self._head(step, way, first < len(blocks)) for way in ways]
        home.backwards = True
        try:
            for index, block in reversed(blocks[first:]):
                with homes.held(block):
                    for way in ways:
                        self._back(step, index, block, way, index > first or embeds)
        finally:
            home.backwards = False
        if embeds:
            with homes.held(*around):
                for way in ways:
                    with self._at(step, way.micro):
                        hidden, _ = reaching(self.model, way.batch, self._returned)
                    inputs.back(hidden, way.gradient)
        return losses

    def _front(self, step: int, micro: Micro) -> Way:
        batch = self.batches.collated(micro.indices, self.device)
        asked = {name: value for name, value in batch.items() if name != "labels"}
        with self._at(step, micro):
            hidden, arguments = reaching(self.model, asked, self._returned)
        if any(isinstance(value, Tensor) and value.requires_grad for told in arguments for value in told.values()):
            raise ValueError(
                f"Blocks of {type(self.model).__name__} have trained inputs besides hidden states, so they "
                "cannot be trained block by block; keep all weights on the device."
            )
        return Way(micro, batch, hidden, arguments)

    def _run(self, step: int, index: int, block: nn.Module, way: Way, states: Tensor) -> Tensor:
        with self._at(step, way.micro):
            made = block(states, **way.arguments[index])
        return made if isinstance(made, Tensor) else made[0]

    def _head(self, step: int, way: Way, wanted: bool) -> Tensor:
        """The loss; backward from it to the last block's outputs."""
        hidden = way.hidden.detach().requires_grad_(wanted)
        with self._at(step, way.micro), handing_on(self.model, hidden, self._returned):
            value = loss.of(self.model, way.batch, way.micro.divisor, 1.0)
        way.gradient = hidden.grad
        return value

    def _back(self, step: int, index: int, block: nn.Module, way: Way, further: bool) -> None:
        """Recompute the block from what it got, and go back through it."""
        states = way.kept.pop(index).to(self.device).detach().requires_grad_(further)
        outputs = self._run(step, index, block, way, states)
        if outputs.requires_grad:
            inputs.back(outputs, way.gradient)
        way.gradient = states.grad


@contextmanager
def _apart(parameter: nn.Parameter | None) -> Iterator[None]:
    """The gradient that a parameter gets within is summed up before it is added to the one that it has."""
    before = None if parameter is None else parameter.grad
    if parameter is None or before is None:
        yield
        return
    parameter.grad = None
    yield
    parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
