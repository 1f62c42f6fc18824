"""Gradients of the dense model's loss, handed over one by one: what GBLM-Pruner and LLM-Pruner score weights by."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial

from pruners import anatomy, inputs
from pruners.calibrate import Progress, evaluating
from pruners.lazy import Int, Tensor, nn, torch


def backward(
    model: nn.Module,
    windows: Int[Tensor, "count length"],
    weights: Mapping[str, Tensor],
    consume: Callable[[str, Tensor], None],
    *,
    batch_size: int = 1,
    checkpointing: bool = False,
    progress: Progress | None = None,
) -> None:
    """Backward passes of the mean next-token loss; `consume(name, gradient)` sees each weight's gradient once a batch.

    A gradient is handed over and freed as soon as backward has produced it, so memory stays at weights plus one
    gradient plus activations.  Dropout is off; no other parameter gets a gradient.  float16 losses are scaled by
    1024 during backward and unscaled before `consume`, so that small gradients do not underflow.

    Raises ValueError for windows of one token, which predict nothing, and for a loss or gradient that is not finite.
    """
    if windows.shape[1] < 2:
        raise ValueError("Gradients of the next-token loss need windows of two tokens or more; these have one.")
    if not weights:  # structured pruning has left nothing to take gradients of
        return
    scale = 1024.0 if model.dtype == torch.float16 else 1.0

    def handle(name: str, weight: Tensor) -> None:
        gradient, weight.grad = weight.grad, None
        assert gradient is not None  # the hook runs once the gradient is there
        if not gradient.isfinite().all():
            raise ValueError(f"The gradient of {name} is not finite; use --dtype bfloat16 or float32.")
        consume(name, gradient.float().div_(scale) if scale != 1 else gradient)

    with ExitStack() as stack:
        stack.enter_context(_only_trainable(model, weights))
        if checkpointing:
            stack.enter_context(checkpointed(model))
        for name, weight in weights.items():
            stack.callback(weight.register_post_accumulate_grad_hook(partial(handle, name)).remove)
        batches = windows.split(batch_size)
        for index, batch in enumerate(batches):
            batch = batch.to(next(iter(weights.values())).device)
            loss = model(input_ids=batch, labels=inputs.labels(model.config, batch), use_cache=False).loss
            (loss * scale).backward()
            if not loss.isfinite():  # a gradient that is not finite has been named by now
                raise ValueError(
                    f"The loss on calibration batch {index} is {loss.item()}; look for NaN in the model, or use "
                    "--dtype bfloat16 or float32."
                )
            if progress:
                progress(index + 1, len(batches))


def of_mean_loss(
    model: nn.Module,
    windows: Int[Tensor, "count length"],
    weights: Mapping[str, Tensor],
    consume: Callable[[str, Tensor], None],
    *,
    at_once: int,
    progress: Progress | None = None,
) -> None:
    """`consume(name, gradient)` sees each weight's gradient of the mean loss over all windows once, in float32.

    Up to `at_once` windows go through the model together; where there are more, their gradients are added up in one
    float32 copy of the weights.
    """
    sums: dict[str, Tensor] = {}
    batches = windows.split(at_once)
    for index, batch in enumerate(batches):
        share, last = len(batch) / len(windows), index == len(batches) - 1

        def add(name: str, gradient: Tensor, share: float = share, last: bool = last) -> None:
            total = share * gradient.float()
            if name in sums:
                total += sums.pop(name)
            if last:
                consume(name, total)
            else:
                sums[name] = total

        backward(model, batch, weights, add, batch_size=len(batch))
        if progress:
            progress(index + 1, len(batches))


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
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Blocks recompute their activations during backward (transformers' own switch works in training mode only)."""
    modules = list(model.get_submodule(anatomy.family(model).blocks).children())
    for module in modules:
        module.forward = partial(torch.utils.checkpoint.checkpoint, module.forward, use_reentrant=False)
    try:
        yield
    finally:
        for module in modules:
            del module.forward
