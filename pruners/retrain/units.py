"""What a reconstruction rebuilds at once: a matrix, attention or the MLP, a block, several blocks in a row.

Each has inputs, and aims at what the dense model's part makes of them (Wagner et al. 2025, arXiv:2510.14444).  The
inputs of a part of a block are those that reach it through the block's earlier parts: pruned and rebuilt ones, or with
dense inputs the dense ones.  What belongs to attention is what its outputs depend on, norms before it included; the
rest is the MLP's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pruners.anatomy import Block
from pruners.calibrate import Passage
from pruners.lazy import Tensor, nn, no_grad, torch
from pruners.retrain.trainable import Attached, Trainable
from pruners.run.matrices import owner
from pruners.run.stream import Caught, span

GRANULARITIES = {"matrix": 1, "attention_mlp": 1, "block": 1, "two_blocks": 2, "four_blocks": 4}  # blocks at once


@dataclass(frozen=True)
class Unit:
    """`pair` gives outputs and aims for windows of these numbers; of `blocks` only `own` parameters train, None: all.

    The block's other parameters have the values in `meanwhile` as long as it is rebuilt.
    """

    name: str
    blocks: Sequence[Block]
    passage: Passage
    pair: Callable[[Tensor], tuple[Tensor, Tensor]]
    own: frozenset[nn.Parameter] | None = None
    meanwhile: Mapping[nn.Parameter, Tensor] = field(default_factory=dict)

    def attach(self, trainable: Trainable, seed: int) -> Iterator[Attached]:
        return (trainable.attach_to_block(block, seed, self.own) for block in self.blocks)

    def changing(self, trainable: Trainable) -> set[nn.Parameter]:
        found = {p for block in self.blocks for p in trainable.changing(block)}
        return found if self.own is None else found & self.own

    @no_grad
    def error(self) -> float:
        """Mean squared error of the outputs as they are now."""
        total, numbers = torch.zeros((), dtype=torch.float64), 0
        for rows in torch.arange(len(self.passage.inputs)).split(self.passage.batch_size):
            outputs, aims = self.pair(rows)
            difference = outputs.float() - aims.float()
            total = total.to(difference.device) + difference.square().sum(dtype=torch.float64)
            numbers += difference.numel()
        return float(total) / numbers


def of(
    passage: Passage, granularity: str, dense: Mapping[nn.Parameter, Tensor], dense_inputs: bool, rows: int
) -> Iterator[Unit]:
    """One after the other; each is rebuilt before the next one is asked for.

    `dense` are the values that a block's parameters had before it was pruned, `rows` windows that can run at once.
    """
    if granularity == "matrix":
        yield from _matrices(passage, dense, dense_inputs)
    elif granularity == "attention_mlp":
        yield from _attention_and_mlp(passage, dense, dense_inputs, rows)
    else:
        first, last = passage.blocks[0], passage.blocks[-1]
        name = first.name if first is last else f"{first.name} to {last.index}"
        yield Unit(name, passage.blocks, passage, partial(_compared, passage, passage.outputs, passage.targets))


def _compared(passage: Passage, made: Callable[[Tensor], Tensor], aims: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    return made(rows), aims[span(rows)].to(passage.device)


def _matrices(passage: Passage, dense: Mapping[nn.Parameter, Tensor], dense_inputs: bool) -> Iterator[Unit]:
    (block,) = passage.blocks
    for projection in (name for names in block.shared_inputs for name in names):
        module = owner(block.linear(projection))
        own = frozenset(module.parameters(recurse=False))
        with holding({p: dense[p] for p in own}):
            was = copy.deepcopy(module).requires_grad_(False)

        def pair(rows: Tensor, projection: str = projection, was: nn.Module = was) -> tuple[Tensor, Tensor]:
            (x, *_), outputs = _until(block, projection, lambda: passage.outputs(rows))
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                return outputs, was(x.to(next(was.parameters()).dtype))

        others = {p: value for p, value in dense.items() if p not in own} if dense_inputs else {}
        yield Unit(f"{block.name}.{projection}", passage.blocks, passage, pair, own, others)


def _attention_and_mlp(
    passage: Passage, dense: Mapping[nn.Parameter, Tensor], dense_inputs: bool, rows: int
) -> Iterator[Unit]:
    (block,) = passage.blocks

    def attended(rows: Tensor) -> Tensor:
        return _until(block, block.family.attention, lambda: passage.outputs(rows))[1]

    own = _reached(block, lambda: attended(torch.arange(rows)))
    with holding(dense):
        aims = _all(passage, attended)
    pair = partial(_compared, passage, attended, aims)
    yield Unit(f"{block.name}: attention", passage.blocks, passage, pair, own)
    rest = frozenset(dense.keys() - own)
    if dense_inputs:
        others, whole = {p: dense[p] for p in own}, passage.targets
    else:
        others = {}
        with holding({p: dense[p] for p in rest}):
            whole = _all(passage, passage.outputs)
    pair = partial(_compared, passage, passage.outputs, whole)
    yield Unit(f"{block.name}: MLP", passage.blocks, passage, pair, rest, others)


@no_grad
def _all(passage: Passage, made: Callable[[Tensor], Tensor]) -> Tensor:
    """For all windows, where the inputs are kept."""
    found = torch.empty_like(passage.inputs)
    for rows in torch.arange(len(found)).split(passage.batch_size):
        found[span(rows)] = made(rows)
    return found


def _until(block: Block, name: str, run: Callable[[], Any]) -> tuple[tuple[Any, ...], Tensor]:
    """The arguments and outputs of a module of the block, behind which a pass through the block stops."""
    caught: list[Any] = []

    def stop(_: nn.Module, args: tuple[Any, ...], outputs: Any) -> None:
        caught.extend((args, outputs if isinstance(outputs, Tensor) else outputs[0]))
        raise Caught

    hook = block.module.get_submodule(name).register_forward_hook(stop)
    try:
        run()
    except Caught:
        return caught[0], caught[1]
    finally:
        hook.remove()
    raise ValueError(f"{block.name}.{name} was not called while its block ran; rebuild whole blocks of this model.")


def _reached(block: Block, run: Callable[[], Tensor]) -> frozenset[nn.Parameter]:
    """The block's parameters that the result depends on."""
    required = {p: p.requires_grad for p in block.module.parameters()}
    try:
        for p in required:
            p.requires_grad_(True)
        with torch.enable_grad():
            ahead: list[Any] = [run().grad_fn]
    finally:
        for p, flag in required.items():
            p.requires_grad_(flag)
    found: set[Any] = set()
    seen: set[Any] = set()
    while ahead:
        node = ahead.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(getattr(node, "variable", None))
        ahead += [following for following, _ in node.next_functions]
    return frozenset(found & required.keys())


@contextmanager
def holding(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Parameters have other values for a while."""
    now = {p: p.data for p in values}
    for p, value in values.items():
        p.data = value
    try:
        yield
    finally:
        for p, value in now.items():
            p.data = value
