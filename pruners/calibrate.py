"""Input statistics and the one block-by-block loop: the only place with hooks.

The decoder is replayed one block at a time.  The first block's inputs are caught together with all of its keyword
arguments and replayed unchanged, cache off; a single buffer of hidden states [windows, tokens, width] is updated in
place.  Projections that read the same input share one statistic.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from pruners import anatomy, checks, inputs
from pruners.anatomy import Block
from pruners.checks import Count, Flag
from pruners.lazy import Float, Int, Tensor, nn, no_grad, torch

Progress = Annotated[Callable[[int, int], None], checks.FUNCTION]


class Statistic(ABC):
    """What is kept of a projection's inputs; made with their width and device, fed batch by batch."""

    @abstractmethod
    def __init__(self, width: int, device: torch.device) -> None: ...

    @abstractmethod
    def add(self, x: Float[Tensor, "windows tokens inp"]) -> None: ...

    @abstractmethod
    def finite(self) -> bool: ...


class InputNorm(Statistic):
    """||x_i|| over all calibration tokens; `windows` counts the sequences.  Summed in float64 over windows."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_of_squares = torch.zeros(width, dtype=torch.float64, device=device)
        self.windows = 0

    def add(self, x: Float[Tensor, "windows tokens inp"]) -> None:
        self.sum_of_squares += x.float().square().sum(1).double().sum(0)
        self.windows += len(x)

    @property
    def norm(self) -> Float[Tensor, " inp"]:
        return self.sum_of_squares.sqrt().float()

    def finite(self) -> bool:
        return bool(self.sum_of_squares.isfinite().all())


class Moments(Statistic):
    """Mean and spread of every channel over all calibration tokens; windows merge in float64 (Chan et al. 1979)."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.windows = self.tokens = 0
        self.mean, self.squares, self.running = torch.zeros(3, width, dtype=torch.float64, device=device)

    def add(self, x: Float[Tensor, "windows tokens inp"]) -> None:
        count, length, _ = x.shape
        x = x.float()
        means = x.mean(1, keepdim=True)
        squares = (x - means).square_().sum(1).double()
        means = means.squeeze(1).double()
        number = torch.arange(self.windows + 1, self.windows + count + 1, device=x.device)[:, None]
        so_far = (self.mean * self.windows + means.cumsum(0)) / number
        self.running += ((squares + length * (means - so_far).square()) * (number - 1) / number).sum(0)
        self._merge(means.mean(0), (squares + length * (means - means.mean(0)).square()).sum(0), count, count * length)

    def _merge(self, mean: Tensor, squares: Tensor, windows: int, tokens: int) -> None:
        total = self.tokens + tokens
        self.squares += squares + (mean - self.mean).square() * (self.tokens * tokens / total)
        self.mean += (mean - self.mean) * (tokens / total)
        self.windows, self.tokens = self.windows + windows, total

    @property
    def variance(self) -> Float[Tensor, " inp"]:
        return self.squares / self.tokens

    @property
    def mean_square(self) -> Float[Tensor, " inp"]:
        return self.variance + self.mean.square()

    @property
    def released_fluctuation(self) -> Float[Tensor, " inp"]:
        """What FLAP's released code computes: 1/(N-1) sum_n (n-1)/n sum_t (x_nt - mean of windows 1..n)^2."""
        return self.running / max(self.windows - 1, 1)

    def finite(self) -> bool:
        return bool(self.squares.isfinite().all())


class Hessian(Statistic):
    """H = 2/N sum_t x_t x_t^T over all calibration tokens of N windows, in float32 (SparseGPT, eq. 1)."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum = torch.zeros(width, width, dtype=torch.float32, device=device)
        self.windows = 0

    def add(self, x: Float[Tensor, "windows tokens inp"]) -> None:
        tile = -(-x.shape[-1] // 4)  # H is symmetric: what lies below the diagonal tiles is not computed
        for window in x.float():  # one by one, so that the sum does not depend on the batch size
            for start in range(0, x.shape[-1], tile):
                rows = slice(start, start + tile)
                self.sum[rows, start:].addmm_(window[:, rows].T, window[:, start:])
        self.windows += len(x)

    @property
    def matrix(self) -> Float[Tensor, "inp inp"]:
        upper = self.sum.triu()
        return (upper + upper.triu(1).T) * (2 / self.windows)

    def finite(self) -> bool:
        return bool(self.sum.isfinite().all())


@dataclass(frozen=True)
class Passage:
    """One block's `inputs` on the calibration windows and what the dense block made of them, `targets`."""

    inputs: Float[Tensor, "windows tokens width"]
    targets: Float[Tensor, "windows tokens width"]
    batch_size: int
    run: Callable[[Block, Tensor], Tensor]

    @no_grad
    def error(self, block: Block) -> float:
        """Mean squared error of the block's outputs as it is now."""
        total = 0.0
        for start in range(0, len(self.inputs), self.batch_size):
            here = slice(start, start + self.batch_size)
            difference = self.run(block, self.inputs[here]).float() - self.targets[here].float()
            total += float(difference.square().sum(dtype=torch.float64))
        return total / self.targets.numel()


class Keeper:
    """Is told of every finished block; this one keeps nothing.

    One that keeps blocks lets a run that was killed go on at the next one.  One whose `rebuild_batch` is not 0 may also
    change a pruned block before later ones see its outputs, and runs it on so many windows at once.
    """

    rebuild_batch: int = 0

    def restore(self, block: Block) -> bool:
        """Whether the block was kept; it is as it was then, now."""
        return False

    def rebuild(self, block: Block, passage: Passage) -> None:
        """Bring a pruned block's outputs back towards the dense block's."""

    def keep(self, block: Block) -> None:
        """The block is finished."""


NOTHING = Keeper()


@dataclass(frozen=True)
class Execution:
    """How a method does its work; none of it but `cut` and a rebuilding `keeper` changes what comes out.

    `batch_size` windows go through a block at once.  `device` holds one block at a time (None: where the model is).
    `progress(done, total)` is called per block.  `keeper` is for unstructured methods that read inputs.  `cut` is
    whether structured methods take units out or zero them.
    Raises TypeError or ValueError for values that are none of these, and for a device that is not there.
    """

    batch_size: Count = 8
    device: Any = None  # a torch.device or its name; torch is not loaded for the annotation
    progress: Progress | None = None
    keeper: Keeper = NOTHING
    cut: Flag = True

    def __post_init__(self) -> None:
        checks.fields(self)
        if not isinstance(self.keeper, Keeper):
            raise TypeError(f"keeper is a pruners.calibrate.Keeper; got {checks.typed(self.keeper)}.")
        object.__setattr__(self, "device", inputs.usable_device(self.device))

    def report(self, block: Block, total: int) -> None:
        """Call `progress` once the block is done."""
        if self.progress:
            self.progress(block.index + 1, total)


PLAIN = Execution()


def walk(
    model: nn.Module,
    windows: Int[Tensor, "count length"],
    statistic: type[Statistic] | None,
    how: Execution = PLAIN,
    *,
    keeper: Keeper = NOTHING,
    sequential: bool = True,
    groups: Callable[[Block], tuple[tuple[str, ...], ...]] = lambda block: block.shared_inputs,
) -> Iterator[tuple[Block, dict[str, Any]]]:
    """Yield each block with the statistics of its projections' inputs, by projection name.

    Whatever the caller does to the block before asking for the next one is seen by the later blocks when
    `sequential`; else later blocks get dense outputs and one pass serves both.  `keeper` is told when the caller is
    done with a block; blocks that it restores are not yielded.  Raises ValueError, naming block and projection, for
    inputs that are not finite.
    """
    blocks = anatomy.blocks(model)
    with evaluating(model):
        stream = _Stream(model, windows, how.batch_size, how.device, also=keeper.rebuild_batch)
        for block in blocks:
            with _moved(block.module, how.device):
                last = block is blocks[-1]
                if not keeper.restore(block):
                    outputs = torch.empty_like(stream.hidden) if keeper.rebuild_batch else None
                    if not sequential and not last:
                        outputs = stream.hidden
                    seen = stream.observe(block, groups(block), statistic, outputs)
                    _refuse_non_finite(block, seen)
                    yield block, seen
                    if keeper.rebuild_batch and outputs is not None:
                        keeper.rebuild(block, Passage(stream.hidden, outputs, stream.batch_size, stream.run))
                    keeper.keep(block)
                if sequential and not last:
                    stream.advance(block)


class _Caught(Exception):  # noqa: N818  (a signal that enough of a forward pass has run, not an error)
    pass


class _Stream:
    """Hidden states between two blocks, and the keyword arguments that every block is called with."""

    def __init__(
        self, model: nn.Module, windows: Tensor, batch_size: int, device: torch.device | str | None, also: int = 0
    ) -> None:
        """`also` is another batch size in which blocks will be run."""
        first = anatomy.blocks(model)[0].module
        self.batch_size = min(batch_size, len(windows))
        self.kwargs: dict[int, dict[str, Any]] = {}  # by batch size: masks and positions depend on nothing else here
        self.hidden = torch.empty(0)
        for start in range(0, len(windows), self.batch_size):
            hidden, kwargs = _inputs_of(first, model, windows[start : start + self.batch_size])
            if not start:
                self.hidden = hidden.new_empty((len(windows), *hidden.shape[1:]), device=device or hidden.device)
            self.hidden[start : start + len(hidden)] = hidden
            self.kwargs.setdefault(len(hidden), _sent(kwargs, self.hidden.device))
        if also:
            _, kwargs = _inputs_of(first, model, windows[:also])
            self.kwargs.setdefault(also, _sent(kwargs, self.hidden.device))

    @no_grad
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
                raise _Caught

        with ExitStack() as stack:
            for which, linear in enumerate(linears):
                stack.callback(linear.register_forward_pre_hook(partial(look, which)).remove)
            for start in range(0, len(self.hidden), self.batch_size):
                pending.update(range(len(linears)))
                here = slice(start, start + self.batch_size)
                with suppress(_Caught):
                    made_here = self.run(block, self.hidden[here])
                    if outputs is not None:
                        outputs[here] = made_here
        return {name: made[which] for which, names in enumerate(groups) for name in names}

    @no_grad
    def advance(self, block: Block) -> None:
        for start in range(0, len(self.hidden), self.batch_size):
            here = slice(start, start + self.batch_size)
            self.hidden[here] = self.run(block, self.hidden[here])

    def run(self, block: Block, inputs: Tensor) -> Tensor:
        outputs = block.module(inputs, **self.kwargs[len(inputs)])
        return outputs if isinstance(outputs, Tensor) else outputs[0]


def _inputs_of(block: nn.Module, model: nn.Module, windows: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The hidden states [windows, tokens, width] and keyword arguments with which the model calls `block`."""
    caught: list[tuple[Tensor, dict[str, Any]]] = []

    def catch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        kwargs = dict(kwargs)
        hidden = args[0] if args else kwargs.pop("hidden_states")
        if len(args) > 1:
            raise TypeError("The model calls its blocks with more than one positional argument; name them.")
        caught.append((hidden, kwargs))
        raise _Caught

    handle = block.register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with torch.no_grad(), suppress(_Caught):
            model(input_ids=windows.to(next(model.parameters()).device), use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def _refuse_non_finite(block: Block, seen: Mapping[str, Any]) -> None:
    for name, statistic in seen.items():
        if not statistic.finite():
            raise ValueError(
                f"The inputs of {block.name}.{name} hold NaN or inf. Check the checkpoint, or use --dtype bfloat16 or "
                "float32: float16 overflows in some models."
            )


@contextmanager
def _moved(module: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """The module on `device` for a while, then back where it was."""
    home = next(module.parameters()).device
    if device is not None:
        module.to(device)
    try:
        yield
    finally:
        if device is not None:
            module.to(home)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _sent(kwargs: dict[str, Any], device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(kwargs, device)
