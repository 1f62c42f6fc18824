"""How long prefill and decoding take on this device, and the memory they need."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from eval.checks import check_fits, check_model
from eval.marks import begun
from pruners import checks
from pruners.checks import Count

WARM_UP = 2
COPIED_BYTES = {"cpu": 2**28}  # beyond a CPU's caches
ACCELERATOR_COPIED_BYTES = 2**30


@checks.arguments
def measure(
    model: PreTrainedModel, batch: Count, length: Count, new_tokens: Count, repetitions: Count
) -> dict[str, Any]:
    """Seconds of a prefill of [batch, length] tokens and of one decoding step after it; medians with quartiles."""
    check_model(model)
    check_fits(model, length, new_tokens)
    ids = torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(0))
    prompt = begun(model, ids).to(model.device)
    forget_peak(model.device)
    with torch.inference_mode():
        prefill = [_prefill(model, prompt)[0] for _ in range(WARM_UP + repetitions)][WARM_UP:]
        decode = [_decode(model, prompt, new_tokens) for _ in range(WARM_UP + repetitions)][WARM_UP:]
    return {
        "batch": batch,
        "length": length,
        "new_tokens": new_tokens,
        "prefill_s": spread(prefill),
        "decode_s": spread(decode),
        "prefill_tokens_per_s": batch * length / float(np.median(prefill)),
        "decode_tokens_per_s": batch / float(np.median(decode)),
        "peak_bytes": peak_bytes(model.device),
    }


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles of repetitions, in seconds."""
    low, median, high = map(float, np.percentile(seconds, [25, 50, 75]))
    return {"median": median, "q1": low, "q3": high, "repetitions": len(seconds)}


def bandwidth(device: torch.device) -> float:
    """Bytes a second that a plain copy reads and writes on the device: the best of five."""
    size = COPIED_BYTES.get(device.type, ACCELERATOR_COPIED_BYTES)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source), device)[0] for _ in range(WARM_UP + 5)][WARM_UP:]
    return 2 * size / min(times)


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


def _prefill(model: PreTrainedModel, prompt: torch.Tensor) -> tuple[float, Any]:
    return timed(lambda: model(prompt, use_cache=True, logits_to_keep=1), model.device)


def _decode(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int) -> float:
    """Seconds of one step, averaged over `new_tokens` greedy ones."""
    state = _prefill(model, prompt)[1]
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
