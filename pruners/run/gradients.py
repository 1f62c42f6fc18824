"""Gradients of the dense model's loss, consumed one by one: the scores of GBLM-Pruner and LLM-Pruner use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

from pruners import anatomy
from pruners.anatomy import Block
from pruners.calibrate import Progress, evaluating
from pruners.lazy import Int, Tensor, nn, torch
from pruners.run import inputs, loss
from pruners.run.ranks import Ranks
from pruners.run.statistic import finite
from pruners.run.stream import ALONE, Stream, handing_on, instead, span
from pruners.weights import homes, memory

Consume = Callable[[str, Tensor, float], None]
Left = Callable[[Block], None]


def backward(
    model: Any,
    windows: Int[Tensor, "count length"],
    weights: Mapping[str, Tensor],
    consume: Consume,
    *,
    batch_size: int = 1,
    checkpointing: bool = False,
    progress: Progress | None = None,
    left: Left = lambda block: None,
    together: Ranks = ALONE,
) -> None:
    """Backward passes of the mean next-token loss; `consume(name, gradient, scale)` sees each weight's gradient once a
    batch, in the model's dtype and `scale` times too large.

    A gradient is handed over and freed as soon as backward has produced it, so memory stays at weights plus one
    gradient plus activations; `consume` may write over it.  Dropout is off; no other parameter gets a gradient.
    float16 losses are scaled by 1024, so that small gradients do not underflow; by 1 those of other dtypes.

    A model whose weights are away from home goes back one block at a time, all batches through each, with the inputs
    of every block kept; the gradients are the same.  `left(block)` is called when a block's gradients are complete.

    The batches are shared by the ranks that are `together`, each of which sees the gradients of all of them in order,
    as one process does; of weights away from home every rank computes all.

    Raises ValueError for windows of one token, which predict nothing, and for a loss or gradient that is not finite.
    """
    if windows.shape[1] < 2:
        raise ValueError("Gradients of the next-token loss need windows of two tokens or more; these have one.")
    if not weights:  # structured pruning has left nothing to take gradients of
        return
    scale = 1024.0 if model.dtype == torch.float16 else 1.0

    waiting = 1  # batches, with those of this turn
    seen: list[tuple[str, Tensor]] = []  # which gradients are finite, read off a GPU once a batch

    def handle(name: str, weight: Tensor) -> None:
        own, weight.grad = weight.grad, None
        assert own is not None  # the hook runs once the gradient is there
        for source in range(min(together.count, waiting)):
            gradient = together.tell(source, own if source == together.rank else torch.empty_like(own))
            seen.append((name, finite(gradient)))
            consume(name, gradient, scale)

    def check() -> None:
        device = seen[0][1].device if seen else None
        told = torch.stack([flag.to(device) for _, flag in seen]).tolist() if seen else []
        for (name, _), sound in zip(seen, told, strict=True):
            if not sound:
                raise ValueError(f"The gradient of {name} is not finite; use --dtype bfloat16 or float32.")
        seen.clear()

    with ExitStack() as stack:
        stack.enter_context(_only_trainable(model, weights))
        if checkpointing:
            stack.enter_context(checkpointed(model))
        within = {p for module in anatomy.modules(model) for p in module.parameters()}
        around = {name: weight for name, weight in weights.items() if weight not in within}
        for name, weight in weights.items():
            if weight in within:
                stack.callback(weight.register_post_accumulate_grad_hook(partial(handle, name)).remove)
        if homes.of(model) is not None:
            assert not around  # methods that score such weights need all of them in place
            together = ALONE
            _by_block(model, windows, weights, batch_size, scale, progress, left, check)
            return
        batches = windows.split(batch_size)
        for first in range(0, len(batches), together.count):
            waiting = len(batches) - first
            index = first + together.rank if together.rank < waiting else first  # else another's, which it drops
            batch = batches[index].to(next(iter(weights.values())).device)
            value = loss.of(model, _labelled(model, batch), scale=scale)
            for name, weight in around.items():  # whose gradients come in parts
                handle(name, weight)
            check()
            together.each(partial(_check_loss, index, value))
            if progress:
                progress(min(first + together.count, len(batches)), len(batches))
        for block in anatomy.blocks(model):
            left(block)


def _by_block(
    model: Any,
    windows: Tensor,
    weights: Mapping[str, Tensor],
    batch_size: int,
    scale: float,
    progress: Progress | None,
    left: Left,
    check: Callable[[], None],
) -> None:
    """All batches forward, block after block, and back again; a weight's gradients come in the order of the batches."""
    blocks, home = anatomy.blocks(model), homes.of(model)
    assert home is not None  # the caller has looked
    first = min(block.index for block in blocks if any(name.startswith(f"{block.name}.") for name in weights))
    batches = torch.arange(len(windows)).split(batch_size)
    with torch.no_grad():
        stream = Stream(model, windows, batch_size)
        folder = disk.folder if (disk := homes.on_disk(model)) else None
        kept = memory.roomy((len(blocks), *stream.hidden.shape), stream.hidden.dtype, folder)
        for block in blocks:
            kept[block.index].copy_(stream.hidden)
            with homes.held(block.module):
                stream.advance(block)
    gradient, device = torch.empty_like(stream.hidden), stream.device
    with homes.held(*homes.around_the_blocks(model)):  # backward reads what forward has read
        for index, rows in enumerate(batches):
            hidden = stream.hidden[span(rows)].to(device, copy=True).requires_grad_(True)
            with handing_on(model, hidden, stream.returned):
                value = loss.of(model, _labelled(model, windows[rows].to(hidden.device)), scale=scale)
            check()
            _check_loss(index, value)
            assert hidden.grad is not None  # the loss depends on it
            gradient[span(rows)] = hidden.grad
    home.backwards = True
    try:
        for done, block in enumerate(reversed(blocks[first:]), start=1):
            with homes.held(block.module):
                for rows in batches:
                    states = kept[block.index][span(rows)].to(device, copy=True).requires_grad_(block.index > first)
                    outputs = stream.run(block, rows, states)
                    if outputs.requires_grad:
                        inputs.back(outputs, gradient[span(rows)].to(device))
                    if states.grad is not None:
                        gradient[span(rows)] = states.grad
                check()
                left(block)
            if progress:
                progress(done, len(blocks) - first)
    finally:
        home.backwards = False


def _labelled(model: Any, batch: Int[Tensor, "windows length"]) -> dict[str, Tensor]:
    return {"input_ids": batch, "labels": inputs.labels(model.config, batch)}


def _check_loss(index: int, value: Tensor) -> None:
    if not value.isfinite():  # a gradient that is not finite has been named by now
        raise ValueError(
            f"The loss on calibration batch {index} is {value.item()}; look for NaN in the model, or use "
            "--dtype bfloat16 or float32."
        )


def of_mean_loss(
    model: nn.Module,
    windows: Int[Tensor, "count length"],
    weights: Mapping[str, Tensor],
    consume: Consume,
    *,
    at_once: int,
    progress: Progress | None = None,
) -> None:
    """`consume(name, gradient, 1.0)` sees each weight's gradient of the mean loss over all windows once, in float32.

    Up to `at_once` windows go through the model together; where there are more, their gradients are added up in
    float32, one copy of the weights, or of one block's where the weights are away from home.  Windows that predict
    unlike numbers of tokens (ChatGLM's dialogues) must go together: batches count by their windows.
    """
    sums: dict[str, Tensor] = {}
    seen: Counter[str] = Counter()
    batches = windows.split(at_once)

    def add(name: str, gradient: Tensor, scale: float) -> None:
        total = len(batches[seen[name]]) / len(windows) / scale * gradient.float()
        seen[name] += 1
        if name in sums:
            total += sums.pop(name)
        if seen[name] == len(batches):
            consume(name, total, 1.0)
        else:
            sums[name] = total

    backward(model, windows, weights, add, batch_size=at_once, progress=progress)


@contextmanager
def _only_trainable(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Evaluation mode, with gradients for these weights alone; everything as before afterwards."""
    before = {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False)
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        with evaluating(model), torch.enable_grad():
            yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
            parameter.grad = None


@contextmanager
def checkpointed(model: nn.Module, again: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[None]:
    """Blocks recompute their activations during backward (transformers' own switch works in training mode only).

    They do so within `again`, where what they were first computed in does not last into a backward pass.
    """
    with ExitStack() as stack:
        for module in anatomy.modules(model):
            recomputing = partial(
                torch.utils.checkpoint.checkpoint,
                module.forward,
                use_reentrant=False,
                context_fn=lambda: (nullcontext(), again()),
            )
            stack.enter_context(instead(module, recomputing))
        yield
