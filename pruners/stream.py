"""Hidden states between two decoder blocks, and the arguments that the model calls every block with."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from pruners import anatomy
from pruners.anatomy import Block
from pruners.matrices import owner
from pruners.statistic import Statistic

Arguments = dict[str, Any]  # of one block, by name, without its hidden states


class Caught(Exception):  # noqa: N818  (a signal that enough of a forward pass has run, not an error)
    pass


class Stream:
    """`hidden` [windows, tokens, width] is what the block to run next gets.

    A block's other arguments (mask, positions, rotary tables) are kept once for each number of windows that run
    together; where they depend on the windows' contents, as ChatGLM's do, window by window.
    """

    def __init__(
        self, model: nn.Module, windows: Tensor, batch_size: int, device: torch.device | str | None, also: int = 0
    ) -> None:
        """`also` is another number of windows that will run together."""
        self.batch_size, self.device = min(batch_size, len(windows)), device
        self.shared: dict[int, list[Arguments]] = {}
        self.single: list[list[Arguments]] = []
        self.hidden = torch.empty(0)
        alike = True
        for here in torch.arange(len(windows)).split(self.batch_size):
            hidden, arguments = self._caught(model, windows[here])
            if not self.hidden.numel():
                self.hidden = hidden.new_empty((len(windows), *hidden.shape[1:]), device=device or hidden.device)
            self.hidden[here] = hidden.to(self.hidden.device)
            alike = alike and _equal(self.shared.setdefault(len(here), arguments), arguments)
        if also:
            self.shared.setdefault(also, self._caught(model, windows[:also])[1])
        if not alike:
            self.single = [self._caught(model, window[None])[1] for window in windows]

    def _caught(self, model: nn.Module, windows: Tensor) -> tuple[Tensor, list[Arguments]]:
        hidden, arguments = inputs_of(model, windows)
        moved: dict[int, Tensor] = {}  # blocks share most of their arguments
        place = self.device or hidden.device

        def move(tensor: Tensor) -> Tensor:
            return moved.setdefault(id(tensor), tensor.to(place))

        return hidden, [recursively_apply(move, told) for told in arguments]

    def arguments(self, block: Block, rows: Tensor) -> Arguments:
        """The block's, for the windows of these numbers together."""
        if not self.single:
            return self.shared[len(rows)][block.index]
        return _together([self.single[int(row)][block.index] for row in rows])

    @torch.no_grad()
    def observe(
        self,
        block: Block,
        groups: tuple[tuple[str, ...], ...],
        statistic: type[Statistic] | None,
        outputs: Tensor | None,
    ) -> dict[str, Any]:
        """Run the block, gather statistics and fill `outputs`; without these, stop once every input has been seen."""
        length = self.hidden.shape[1]
        groups = groups if statistic else ()
        linears = [block.linear(names[0]) for names in groups]
        made = [statistic(linear.in_features, self.hidden.device) for linear in linears] if statistic else []
        pending: set[int] = set()

        def look(which: int, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0] if args[0].ndim == 3 else args[0].unflatten(0, (-1, length))
            made[which].add(x)
            pending.discard(which)
            if not pending and outputs is None:
                raise Caught

        with ExitStack() as stack:
            for which, linear in enumerate(linears):
                stack.callback(owner(linear).register_forward_pre_hook(partial(look, which)).remove)
            for here in torch.arange(len(self.hidden)).split(self.batch_size):
                pending.update(range(len(linears)))
                with suppress(Caught):
                    made_here = self.run(block, here)
                    if outputs is not None:
                        outputs[here] = made_here
        return {name: made[which] for which, names in enumerate(groups) for name in names}

    @torch.no_grad()
    def advance(self, block: Block) -> None:
        for here in torch.arange(len(self.hidden)).split(self.batch_size):
            self.hidden[here] = self.run(block, here)

    def run(self, block: Block, rows: Tensor) -> Tensor:
        """The block's outputs for the windows of these numbers."""
        outputs = block.module(self.hidden[rows], **self.arguments(block, rows))
        return outputs if isinstance(outputs, Tensor) else outputs[0]


@torch.no_grad()
def inputs_of(model: nn.Module, windows: Tensor) -> tuple[Tensor, list[Arguments]]:
    """The hidden states [windows, tokens, width] that reach the blocks, and with which other arguments each is called.

    Needs the embeddings and the first block; the others hand their input on unchanged.
    """
    blocks = [block.module for block in anatomy.blocks(model)]
    hidden: list[Tensor] = []
    found: list[Arguments] = []
    rest: list[Any] = []  # what blocks return beside hidden states, where they return a tuple

    def stand_in(forward: Any, *args: Any, **kwargs: Any) -> Any:
        told = inspect.signature(forward).bind(*args, **kwargs)
        states, others = _split(told)
        if not found:
            hidden.append(states)
            made = None if len(blocks) == 1 else forward(*args, **kwargs)
            rest.extend([] if made is None or isinstance(made, Tensor) else [made[1:]])
        found.append(others)
        if len(found) == len(blocks):
            raise Caught
        return (states, *rest[0]) if rest else states

    with ExitStack() as stack, suppress(Caught):
        for module in blocks:
            stack.enter_context(_instead(module, partial(stand_in, module.forward)))
        model(input_ids=windows.to(next(model.parameters()).device), use_cache=False)
    return hidden[0], found


def _split(told: inspect.BoundArguments) -> tuple[Tensor, Arguments]:
    """The first argument, and the others by name."""
    others = dict(told.arguments)
    for name, parameter in told.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            others |= others.pop(name, {})
    states = others.pop(next(iter(told.signature.parameters)))
    return states, others


@contextmanager
def _instead(module: nn.Module, forward: Any) -> Iterator[None]:
    """Another forward pass for a while; what stood there before, such as accelerate's wrapper, comes back."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _equal(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.shape == other.shape and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[name]) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_equal, one, other))
    return bool(one == other)


def _together(each: Sequence[Any]) -> Any:
    """One window's arguments after the other, along the first dimension of what has one for windows."""
    first = each[0]
    if isinstance(first, Tensor):
        return torch.cat(list(each)) if first.ndim > 1 and len(first) == 1 else first
    if isinstance(first, dict):
        return {name: _together([one[name] for one in each]) for name in first}
    if isinstance(first, list | tuple):
        return type(first)(_together(values) for values in zip(*each, strict=True))
    return first


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
