"""How long prefill and decoding take on this device, and the memory they need.

A machine that others use is slower at some times than at others.  Every decoding is timed between two copies of the
same bytes, a fixed reference: its ratio to them is the model's, what the machine did to both cancels.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from copy import deepcopy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from eval.checks import check_fits, check_model, measuring
from eval.marks import begun
from pruners.interface import checks
from pruners.interface.checks import Count

WARM_UP = 2
COPIED_BYTES = {"cpu": 2**28}  # beyond a CPU's caches
ACCELERATOR_COPIED_BYTES = 2**30
STEADY = 0.1  # by how much the reference's quartiles may differ
ATTEMPTS = 3  # at a measurement during which they differ by more


@checks.arguments
def measure(
    model: PreTrainedModel, batch: Count, length: Count, new_tokens: Count, repetitions: Count
) -> dict[str, Any]:
    """Seconds of a prefill of [batch, length] tokens and of one decoding step after it; medians with quartiles.

    `decode_to_reference` is the ratio of a step to a copy that reads and writes `reference["bytes"]` in all, timed
    before and after it.  While the reference moves by more than a tenth the decoding is timed again, `attempts` in all,
    the steadiest of which counts; `noisy` where it moved in that, too.
    """
    check_model(model)
    check_fits(model, length, new_tokens)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    prompt = begun(model, ids).to(model.device)
    forget_peak(model.device)
    with measuring(model):
        for _ in range(WARM_UP):
            _prefill(model, prompt)
        prefill = [_prefill(model, prompt)[0] for _ in range(repetitions)]
        _decode(model, _prefill(model, prompt)[1], new_tokens)
        peak = peak_bytes(model.device)  # before the reference and a second cache take memory of their own
        state, reference = _prefill(model, prompt)[1], Copy(model.device)

        def step() -> float:
            return _decode(model, deepcopy(state), new_tokens)

        for _ in range(WARM_UP - 1):
            step()
        decode, told = _steadiest(lambda: _alternately(step, reference, repetitions))
    return {
        "batch": batch,
        "length": length,
        "new_tokens": new_tokens,
        "prefill_s": spread(prefill),
        "decode_s": spread(decode),
        "prefill_tokens_per_s": batch * length / float(np.median(prefill)),
        "decode_tokens_per_s": batch / float(np.median(decode)),
        "peak_bytes": peak,
        **told,
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles of repetitions, in the unit that they have."""
    low, median, high = map(float, np.percentile(seconds, [25, 50, 75]))
    return {"median": median, "q1": low, "q3": high, "repetitions": len(seconds)}


class Copy:
    """A plain copy on the device; `bytes` are those that it reads and writes together."""

    def __init__(self, device: torch.device) -> None:
        size = COPIED_BYTES.get(device.type, ACCELERATOR_COPIED_BYTES)
        self.bytes = 2 * size
        self._source = torch.ones(size, dtype=torch.uint8, device=device)
        self._target = torch.empty_like(self._source)
        for _ in range(WARM_UP):
            self.seconds()

    def seconds(self) -> float:
        return timed(lambda: self._target.copy_(self._source), self._source.device)[0]


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that `work` takes, the device's queue included, and what it returns."""
    _wait(device)
    start = time.perf_counter()
    result = work()
    _wait(device)
    return time.perf_counter() - start, result


def where(model: PreTrainedModel) -> dict[str, Any]:
    """Device, its threads and the dtype: without them a latency says nothing."""
    cuda = model.device.type == "cuda"
    name = torch.cuda.get_device_name(model.device) if cuda else platform.processor() or platform.machine()
    return {"device": f"{model.device.type}: {name}", "threads": torch.get_num_threads(), "dtype": str(model.dtype)}


def forget_peak(device: torch.device) -> None:
    """Start measuring peak memory from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # not every system lets a process do so; peak_bytes then covers its whole life
        Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes that torch held on a CUDA device, or that the process held on a CPU; None where nobody counts."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)
    return None


def _alternately(work: Callable[[], float], reference: Copy, repetitions: int) -> tuple[list[float], dict[str, Any]]:
    """Seconds that each `work` says, and what the copies between them say."""
    copies, seconds = [reference.seconds()], []
    for _ in range(repetitions):
        seconds.append(work())
        copies.append(reference.seconds())
    around = [(before + after) / 2 for before, after in pairwise(copies)]
    ratios = [one / copy for one, copy in zip(seconds, around, strict=True)]
    return seconds, {
        "decode_to_reference": spread(ratios),
        "reference": {"bytes": reference.bytes, **spread(copies), "fastest": min(copies)},
    }


def _steadiest(measured: Callable[[], tuple[list[float], dict[str, Any]]]) -> tuple[list[float], dict[str, Any]]:
    """The first one whose reference is steady, or the steadiest of several; how many, and whether it is noisy."""
    found: list[tuple[list[float], dict[str, Any]]] = []
    while len(found) < ATTEMPTS and (not found or _moved(found[-1][1]) > STEADY):
        found.append(measured())
    seconds, told = min(found, key=lambda one: _moved(one[1]))
    return seconds, {**told, "attempts": len(found), "noisy": _moved(told) > STEADY}


def _moved(told: Mapping[str, Any]) -> float:
    """By which share of its median the reference's quartiles differ."""
    return float(told["reference"]["q3"] - told["reference"]["q1"]) / float(told["reference"]["median"])


def _prefill(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[float, Any]:
    return timed(lambda: model(prompt, use_cache=True, logits_to_keep=1), model.device)


def _decode(model: PreTrainedModel, state: Any, new_tokens: int) -> float:
    """Seconds of one step, averaged over `new_tokens` greedy ones after a prefill, whose cache they extend."""
    cache = "cache" if "cache" in state else "past_key_values"  # its name before transformers 5.24

    def steps() -> None:
        output = state
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, use_cache=True, **{cache: output[cache]})

    return timed(steps, model.device)[0] / new_tokens


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
