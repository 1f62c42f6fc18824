"""Steps, learning rate, precision and random draws of a training, and how it ends where it goes wrong."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from pruners.interface import checks
from pruners.interface.checks import Count, Finite, Positive
from pruners.lazy import nn, torch

FORMATS = ("float32", "bfloat16")


class Diverged(ArithmeticError):  # noqa: N818  (what happened, in one word)
    """The loss is not finite or keeps rising, and the model is left as it was at the last checkpoint; or, at the end, a
    weight is too large for float16, and the model has to be loaded again."""


@dataclass(frozen=True)
class Schedule:
    """`steps` of AdamW on `batch_size` examples each: warm-up from 0 to `learning_rate`, then linear decay to 0.

    `warmup` is a share of the steps, or from 1 on their number.  Raises TypeError or ValueError for values that are
    none, or out of range.
    """

    steps: Count
    learning_rate: Positive
    batch_size: Count = 2
    warmup: Finite = 0.1

    def __post_init__(self) -> None:
        checks.fields(self)

    def checked(self, stop: int | None) -> int:
        """The step after which training stops; ValueError for one outside the schedule."""
        if stop is not None and not 1 <= stop <= self.steps:
            raise ValueError(
                f"A schedule of {self.steps} steps stops after 1 to {self.steps} of them; got stop={stop}."
            )
        return stop or self.steps

    def micro_batch_size(self, asked: int | None, reference: bool) -> int:
        """Examples that go through the model at once; ValueError where a `reference` step is no whole ones."""
        size = asked or self.batch_size
        if reference and self.batch_size % size:
            raise ValueError(
                f"With reference=True a step is whole micro-batches; a batch_size of {self.batch_size} is not "
                "a multiple "
                f"of the micro_batch_size of {size}."
            )
        return size

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0; the first one is 0 where there is a warm-up."""
        warm = self.warmup if self.warmup >= 1 else math.ceil(self.steps * self.warmup)
        rising, falling = step / max(1, warm), (self.steps - step) / max(1, self.steps - warm)
        return self.learning_rate * min(1.0, rising if step < warm else falling)

    def optimizer(self, tensors: dict[str, nn.Parameter]) -> torch.optim.AdamW:
        # one tensor after the other on a GPU, too: together, a step would hold another copy of all that is trained
        return torch.optim.AdamW(tensors.values(), lr=self.learning_rate, weight_decay=0.0, foreach=False)

    def step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Take a step at its rate and drop the gradients."""
        for group in optimizer.param_groups:
            group["lr"] = self.rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def precision_for(asked: str | None, model_dtype: torch.dtype, device: torch.device) -> torch.dtype | None:
    """What matrix products run in: a dtype for autocast, or None for the model's own float32.

    By default bfloat16 on a GPU that has it and for half-precision models.  Raises ValueError where a device lacks
    bfloat16 that was asked for or that a half-precision model needs, since trained tensors are float32.
    """
    half = model_dtype in (torch.float16, torch.bfloat16)
    capable = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    wanted = asked or ("bfloat16" if half or (device.type == "cuda" and capable) else "float32")
    if wanted not in FORMATS:
        raise ValueError(f"precision is {' or '.join(FORMATS)}; got {wanted!r}.")
    if wanted == "bfloat16" and not capable:
        raise ValueError(f"{device} has no bfloat16; load the model in float32 and train with precision='float32'.")
    if wanted == "float32" and half:
        raise ValueError(f"A model in {model_dtype} cannot train in float32; load it in float32, or drop precision.")
    return None if wanted == "float32" else getattr(torch, wanted)


@contextmanager
def autocast(precision: torch.dtype | None, device: torch.device, cached: bool = True) -> Iterator[None]:
    """`cached`: the cast of a weight is kept until the end, for its next use."""
    with torch.autocast(device.type, dtype=precision, enabled=precision is not None, cache_enabled=cached):
        if precision is None or device.type != "cpu":
            yield
            return
        from pruners.retrain.norms import NormsInFloat32

        with NormsInFloat32():
            yield


@contextmanager
def seeded(device: torch.device, *numbers: int) -> Iterator[None]:
    """What is dropped out depends on these numbers alone; the global generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big"))
        yield
