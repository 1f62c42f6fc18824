"""Hidden states between two decoder blocks, and the arguments that the model calls every block with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pruners import anatomy
from pruners.anatomy import Block
from pruners.lazy import Float, Int, Tensor, nn, no_grad, torch
from pruners.run.matrices import owner
from pruners.run.ranks import Ranks
from pruners.run.statistic import Statistic
from pruners.weights import homes, memory

FULL = 2048  # tokens of a window, as most papers have
WITHIN = 4  # times a block's widest states are alive at once
REBUILT = 3  # hidden states of all windows where blocks are rebuilt: their inputs, outputs and what those aim at
Arguments = dict[str, Any]  # of one block, by name, without its hidden states
ALONE = Ranks()


class Caught(Exception):  # noqa: N818  (a signal that enough of a forward pass has run, not an error)
    pass


class Stream:
    """`hidden` [windows, tokens, width] is what the block to run next gets.

    A block's other arguments (mask, positions, rotary tables) are kept once for each number of windows that run
    together; where they depend on the windows' contents, as ChatGLM's do, window by window.  Of ranks that work
    together each has the windows of the batches that are its turn, and all see the inputs of every batch, in order.
    """

    def __init__(self, model: Any, windows: Tensor, batch_size: int, also: int = 0, together: Ranks = ALONE) -> None:
        """`also` is another number of windows that will run together."""
        fitting = min(together.each(lambda: _fitting(model, windows, REBUILT if also else 1)))
        if model.device.type == "cuda":
            batch_size = max(batch_size, min(filled(batch_size, windows.shape[1]), fitting // 4))
        self.batch_size = min(batch_size, len(windows), fitting)
        self.together = together
        whole = torch.arange(len(windows)).split(self.batch_size)
        self.sizes = [len(batch) for batch in whole]  # of every rank's batches, in order
        self.own = len(whole[together.rank :: together.count])
        if together.count > 1:  # a rank without any runs the first, and nobody looks
            windows = windows[torch.cat(whole[together.rank :: together.count] or whole[:1])]
        self.hidden, self.device = torch.empty(0), torch.device("cpu")
        self.returned: list[tuple[Any, ...]] = []
        self.shared: dict[int, list[Arguments]] = {}
        with homes.held(model.get_input_embeddings()):
            for here in torch.arange(len(windows)).split(self.batch_size):
                hidden, arguments = inputs_of(model, windows[here], self.returned)
                if not self.hidden.numel():
                    self.device, self.hidden = hidden.device, _buffer(model, hidden, len(windows))
                self.hidden[span(here)] = hidden
                self.shared.setdefault(len(here), arguments)
            if also:
                self.shared.setdefault(also, inputs_of(model, windows[:also], self.returned)[1])
            self.single = self._by_window(model, windows)

    def _by_window(self, model: nn.Module, windows: Tensor) -> list[list[Arguments]]:
        """The arguments for each window alone; none where all windows have the same."""
        found = [inputs_of(model, windows[:1], self.returned)[1]]
        for window in windows[1:]:
            told = inputs_of(model, window[None], self.returned)[1]
            found.append(found[0] if _equal(found[0], told, {}) else told)
        return found if any(told is not found[0] for told in found) else []

    def arguments(self, block: Block, rows: Tensor) -> Arguments:
        """The block's, for the windows of these numbers together."""
        if not self.single:
            return self.shared[len(rows)][block.index]
        return _together([self.single[int(row)][block.index] for row in rows])

    @no_grad
    def observe(
        self,
        block: Block,
        groups: tuple[tuple[str, ...], ...],
        statistic: type[Statistic] | None,
        outputs: Tensor | None,
    ) -> dict[str, Any]:
        """Run the block, gather statistics and fill `outputs`; without these, stop once every input has been seen.

        An expert that no token reaches has None for a statistic.
        """
        groups = groups if statistic else ()
        made = {names: statistic(block.linear(names[0]).in_features, self.device) for names in groups if statistic}
        reached: set[tuple[str, ...]] = set()
        pending: set[Any] = set()
        silent = set(groups)

        def seen(*which: Any) -> None:
            pending.difference_update(which)
            silent.difference_update(which)
            if not pending and outputs is None:
                raise Caught

        def look(names: tuple[str, ...], _module: nn.Module, args: tuple[Tensor, ...]) -> None:
            shared.take(names, args[:1])
            seen(names)

        def add(names: Any, args: tuple[Tensor, ...]) -> None:
            if names is not None:
                (x,) = args
                made[names].add(x if x.ndim == 3 else x.unflatten(0, (-1, self.hidden.shape[1])))
                return
            for expert, x in _routed(block, block.experts, args, self.hidden.shape[1]):
                made[expert].add(x)
                if x.shape[1]:
                    reached.add(expert)

        def look_at_experts(module: Any, args: tuple[Tensor, ...]) -> None:
            shared.take(None, args[:2])
            seen(*block.expert_groups)

        shared = _Shared(self.together, self.sizes, self.own, add)

        with ExitStack() as stack:
            for names in groups:
                if names not in block.expert_groups:
                    module = owner(block.linear(names[0]))
                    stack.callback(module.register_forward_pre_hook(partial(look, names)).remove)
            if block.experts is not None and statistic:
                stack.callback(block.experts.register_forward_pre_hook(look_at_experts).remove)
            for here in torch.arange(len(self.hidden)).split(self.batch_size):
                pending.update(groups)
                with suppress(Caught):
                    made_here = self.run(block, here)
                    if outputs is not None:
                        outputs[span(here)] = made_here
                shared.batch_done()
            shared.all_done()
        if silent:
            raise ValueError(
                f"{block.name}.{min(silent)[0]} was not called while its block ran, so its inputs are "
                "unknown; the block uses its weight in another way, and methods that need input statistics "
                "cannot prune it."
            )
        idle = set(block.expert_groups) - reached
        return {name: None if names in idle else made[names] for names in groups for name in names}

    @no_grad
    def through(self, block: Block, states: Tensor, into: Tensor | None = None) -> Tensor:
        """What the block makes of the hidden states of all windows, in a new tensor or in one that may be theirs."""
        made = torch.empty_like(states) if into is None else into
        for here in torch.arange(len(states)).split(self.batch_size):
            made[span(here)] = self.run(block, here, states[span(here)].to(self.device, copy=True))
        return made

    def advance(self, block: Block) -> None:
        self.through(block, self.hidden, self.hidden)

    def run(self, block: Block, rows: Tensor, inputs: Tensor | None = None) -> Tensor:
        """The block's outputs for the windows of these numbers, from the hidden states here or from `inputs`."""
        states = self.hidden[span(rows)].to(self.device, copy=True) if inputs is None else inputs
        outputs = block.module(states, **self.arguments(block, rows))
        return outputs if isinstance(outputs, Tensor) else outputs[0]


@dataclass
class _Shared:
    """What projections got, of every rank's batches in the order in which one process would see them.

    `sizes` are the windows of all batches, `own` how many of them are this rank's; `see` takes what one projection got.
    """

    together: Ranks
    sizes: Sequence[int]
    own: int
    see: Callable[[Any, tuple[Tensor, ...]], None]
    kept: list[tuple[Any, tuple[Tensor, ...]]] = field(default_factory=list)
    rounds: int = 0
    over: bool = False  # what is kept is of the batch before

    def take(self, names: Any, args: tuple[Tensor, ...]) -> None:
        """Of this rank's batch, while it runs; the block may write over it afterwards."""
        if self.together.count == 1:
            self.see(names, args)
            return
        if self.over:
            self.kept, self.over = [], False
        self.kept.append((names, tuple(x.clone() for x in args)))

    def batch_done(self) -> None:
        """Every rank has run a batch, or has none left."""
        ranks = self.together
        if ranks.count == 1:
            return
        mine = min(self.rounds, self.own - 1) * ranks.count + ranks.rank if self.own else 0
        first = self.rounds * ranks.count
        for source, number in enumerate(range(first, min(first + ranks.count, len(self.sizes)))):
            for names, args in self.kept:
                if source == ranks.rank:
                    told = args
                else:
                    told = tuple(
                        x.new_empty(len(x) // self.sizes[mine] * self.sizes[number], *x.shape[1:]) for x in args
                    )
                self.see(names, tuple(ranks.tell(source, x) for x in told))
        self.rounds, self.over = self.rounds + 1, True

    def all_done(self) -> None:
        """The other ranks' last batches, where this one has one less."""
        while self.rounds * self.together.count < len(self.sizes) and self.together.count > 1:
            self.batch_done()


def filled(batch_size: int, length: int) -> int:
    """More windows where they are short: as many tokens as that many windows of `FULL` have, to keep a GPU busy."""
    return batch_size * max(1, FULL // length)


def span(rows: Int[Tensor, " windows"]) -> slice | Tensor:
    """Rows one after the other as a slice: a GPU waits for an index that comes from the CPU."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows


def _fitting(model: Any, windows: Tensor, states: int) -> int:
    """How many windows have room within a block, on a GPU beside its weights and the hidden states of all windows, so
    many times; one at least.

    By the GPU's whole memory: what is free on it differs from run to run, and with the windows at once the last bits.
    """
    if model.device.type == "cpu":
        return len(windows)
    width = model.get_input_embeddings().weight.shape[1]
    blocks = [list(module.parameters()) for module in anatomy.modules(model)]
    widest = max((max(p.shape) for block in blocks for p in block), default=1)
    here = [sum(p.numel() for p in block) for block in blocks]
    weights = model.num_parameters() if homes.of(model) is None else 2 * max(here, default=0)
    size, tokens = model.dtype.itemsize, windows.shape[1]
    room = memory.total_bytes(model.device) - size * (weights + states * width * tokens * len(windows))
    return max(1, int(memory.SHARE * room) // (WITHIN * widest * size * tokens))


def _buffer(model: nn.Module, hidden: Tensor, count: int) -> Tensor:
    """For the hidden states of so many windows: on the device, or where weights are away from home and those states
    would take most of the room there, in CPU memory."""
    shape = (count, *hidden.shape[1:])
    if homes.of(model) is not None and hidden.device.type != "cpu":
        size = hidden[0].nbytes * count
        if size > memory.SHARE * memory.free_bytes(hidden.device):
            disk = homes.on_disk(model)
            return memory.roomy(shape, hidden.dtype, disk.folder if disk else None)
    return hidden.new_empty(shape)


def _routed(
    block: Block, module: Any, args: tuple[Tensor, ...], length: int
) -> Iterator[tuple[tuple[str, ...], Float[Tensor, "1 tokens inp"]]]:
    """What the matrices of each expert get of one window's tokens, window by window; nothing of most, as routed."""
    hidden, index = (told.unflatten(0, (-1, length)) for told in args[:2])
    experts = list(zip(*[iter(block.expert_groups)] * 2, strict=True))
    numbers = torch.arange(len(experts) + 1, device=hidden.device)
    for x, chosen in zip(hidden, index, strict=True):
        by_expert, order = chosen.flatten().sort(stable=True)
        bounds = torch.searchsorted(by_expert, numbers.to(by_expert.dtype)).tolist()  # read off the device once
        for expert, (inward, outward) in enumerate(experts):
            tokens = x[order[bounds[expert] : bounds[expert + 1]] // chosen.shape[-1]]
            gate, up = nn.functional.linear(tokens, module.gate_up_proj[expert]).chunk(2, -1)
            yield inward, tokens[None]
            yield outward, (module.act_fn(gate) * up)[None]


@no_grad
def inputs_of(
    model: nn.Module, windows: Tensor | Mapping[str, Tensor], returned: list[tuple[Any, ...]]
) -> tuple[Tensor, list[Arguments]]:
    """As `reaching`, without gradients."""
    return reaching(model, windows, returned)


def reaching(
    model: nn.Module, windows: Tensor | Mapping[str, Tensor], returned: list[tuple[Any, ...]]
) -> tuple[Tensor, list[Arguments]]:
    """The hidden states [windows, tokens, width] that reach the blocks, and with which other arguments each is called.

    `windows` are tokens, or what the model is called with by name.  The blocks hand their input on unchanged.
    `returned` is what they return beside it (nothing where that is no tuple); while it is empty, the first one runs for
    real to tell.
    """
    blocks = anatomy.modules(model)
    hidden: list[Tensor] = []
    found: list[Arguments] = []

    def stand_in(forward: Any, *args: Any, **kwargs: Any) -> Any:
        told = inspect.signature(forward).bind(*args, **kwargs)
        states, others = _split(told)
        hidden.append(states)
        found.append(others)
        if len(found) == len(blocks):
            raise Caught
        if not returned:
            made = forward(*args, **kwargs)
            returned.append(() if isinstance(made, Tensor) else made[1:])
        return (states, *returned[0]) if returned[0] else states

    with ExitStack() as stack, suppress(Caught):
        for module in blocks:
            stack.enter_context(instead(module, partial(stand_in, module.forward)))
        told = {"input_ids": windows} if isinstance(windows, Tensor) else windows
        device = next(model.parameters()).device
        model(**{name: value.to(device) for name, value in told.items()}, use_cache=False)
    return hidden[0], found


@contextmanager
def handing_on(model: nn.Module, hidden: Tensor, returned: Sequence[tuple[Any, ...]]) -> Iterator[None]:
    """For a while the blocks compute nothing and the last one hands on `hidden`, what it made of the same tokens.

    RuntimeError for another number of tokens.
    """
    modules = anatomy.modules(model)

    def stand_in(last: bool, states: Tensor, *_: Any, **__: Any) -> Any:
        if states.shape != hidden.shape:
            raise RuntimeError(f"Hidden states {list(hidden.shape)} are handed on in a pass of {list(states.shape)}.")
        states = hidden if last else states
        return (states, *returned[0]) if returned and returned[0] else states

    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(instead(module, partial(stand_in, module is modules[-1])))
        yield


def _split(told: inspect.BoundArguments) -> tuple[Tensor, Arguments]:
    """The first argument, and the others by name."""
    others = dict(told.arguments)
    for name, parameter in told.signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            others |= others.pop(name, {})
    states = others.pop(next(iter(told.signature.parameters)))
    return states, others


@contextmanager
def instead(module: nn.Module, forward: Any) -> Iterator[None]:
    """Another forward pass for a while; what stood there before, such as accelerate's wrapper, comes back."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _equal(one: Any, other: Any, known: dict[tuple[int, int], bool]) -> bool:
    """`known` are pairs of tensors that were compared already: every block has the same ones."""
    if one is other:
        return True
    if isinstance(one, Tensor):
        pair = id(one), id(other)
        if pair not in known:
            same = isinstance(other, Tensor) and one.shape == other.shape
            known[pair] = same and bool((one == other).all())
        return known[pair]
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(value, other[name], known) for name, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_equal(*pair, known) for pair in zip(one, other, strict=True))
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
    """Dropout off for a while; afterwards every module is in the mode that it was in."""
    with modes_kept(model):
        model.eval()
        yield


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Whatever trains or does not train meanwhile: every module is then as it was, a frozen part of a model too."""
    before = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in before:
            module.training = training
