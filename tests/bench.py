"""Times every method on the embedded model against the floor of its own work, measured in the same run.

    make bench                           16 windows of 512 tokens, about ten minutes on two cores
    python -m tests.bench wanda flap     only these

The floors: a dense forward pass of the decoder (no output head) over the same windows, and the forward and backward
pass with gradients for the pruned weights.  Every timing runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

import pruners
from experiments import models, provenance
from experiments.data import corpora
from experiments.spec import Windows
from experiments.store.records import now
from pruners import anatomy

WINDOWS = Windows("embedded/c4", count=16, length=512, sampling="first")
MODEL = "smollm2-135m"

Job = Callable[[Any, torch.Tensor], Any]


def forward(model: Any, windows: torch.Tensor) -> None:
    with torch.no_grad():
        for window in windows.split(8):
            model.get_decoder()(input_ids=window, use_cache=False)


def forward_and_backward(model: Any, windows: torch.Tensor) -> None:
    model.requires_grad_(False)
    for block in anatomy.blocks(model):
        for linear in block.linears().values():
            linear.weight.requires_grad_(True)
    for window in windows.split(1):
        model(input_ids=window, labels=window, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def pruning(name: str) -> Job:
    return lambda model, windows: pruners.prune(model, pruners.METHODS[name](), windows)


JOBS: dict[str, Job] = {
    "forward": forward,
    "forward and backward": forward_and_backward,
    **{name: pruning(name) for name in pruners.METHODS},
}
# What a method cannot do without, in passes over the windows, and the target ratio to that on two cores.
FLOORS: dict[str, tuple[tuple[str, ...], float]] = {
    "wanda": (("forward", "forward"), 1.05),
    "sparsegpt": (("wanda",), 1.6),
    "gblm": (("forward and backward", "wanda"), 1.15),
    "flap": (("forward",), 1.15),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(pruners.METHODS)} (default: all)")
    parser.add_argument("--repeat", type=int, default=1, help="the fastest of so many runs counts (default: 1)")
    parser.add_argument("--results", type=Path, default=Path("results/bench"))
    asked = parser.parse_args()
    asked.results.mkdir(parents=True, exist_ok=True)
    names = asked.methods or list(pruners.METHODS)
    if unknown := set(names) - set(pruners.METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}")
    needed = [floor for name in names for floor in FLOORS.get(name, ((), 0.0))[0]]
    figures = {name: _best(name, asked.repeat) for name in dict.fromkeys(_with_floors(needed) + names)}
    rows = [_row(name, figures) for name in figures]
    print(tabulate(rows, ("job", "seconds", "peak GiB", "floor, s", "ratio", "target"), floatfmt=".2f", missingval="-"))
    _keep(figures, asked.results)


def _with_floors(names: list[str]) -> list[str]:
    return [deeper for name in names for deeper in (*FLOORS.get(name, ((), 0.0))[0], name)]


def _best(name: str, repeat: int) -> tuple[float, float]:
    return min(_measured(name) for _ in range(repeat))


def _measured(name: str) -> tuple[float, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        seconds, peak = pool.apply(_work, (name,))
    print(f"{name}: {seconds:.2f} s, peak {peak:.2f} GiB", flush=True)
    return seconds, peak


def _work(name: str) -> tuple[float, float]:
    model, tokenizer = models.load(MODEL)
    windows = corpora.calibration(WINDOWS, tokenizer)
    forward(model, windows[:1])
    started = time.perf_counter()
    JOBS[name](model, windows)
    return time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _row(name: str, figures: dict[str, tuple[float, float]]) -> tuple[Any, ...]:
    seconds, peak = figures[name]
    if name not in FLOORS:
        return name, seconds, peak, None, None, None
    parts, target = FLOORS[name]
    floor = sum(figures[part][0] for part in parts)
    return name, seconds, peak, floor, seconds / floor, target


def _keep(figures: dict[str, tuple[float, float]], folder: Path) -> None:
    told = {
        "model": MODEL,
        "windows": [WINDOWS.count, WINDOWS.length],
        "threads": torch.get_num_threads(),
        "jobs": {name: {"seconds": round(s, 3), "peak_gib": round(p, 3)} for name, (s, p) in figures.items()},
        "made_by": made_by(),
    }
    (folder / "pruning.json").write_text(json.dumps(told, indent=1) + "\n")


def made_by() -> dict[str, Any]:
    """Of what is timed: the code, the processor and when."""
    commit, dirty = provenance.commit()
    told = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")), None)
    device = provenance.device_name(torch.device("cpu"))
    return {"commit": commit, "dirty": dirty, "device": device, "cpu": model, "at": str(now())}


if __name__ == "__main__":
    main()
