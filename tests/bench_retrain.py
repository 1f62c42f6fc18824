"""Times retraining on the embedded model, by what is trained, and MaskLoRA against its naive form.

    python -m tests.bench_retrain                        steps of 2 x 128 tokens, about eight minutes on two cores
    python -m tests.bench_retrain --model FOLDER --steps 2 MaskLoRA

Every timing runs in a process of its own, so that peak memory is its own; the model itself is part of it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn
from torch.nn import functional as F

import pruners
from experiments import models
from experiments.data import corpora
from experiments.spec import Windows
from pruners.retrain import LoRA, MaskLoRA, ScaleLoRA, Trainable, finetune
from pruners.retrain.masks import BitMask
from tests.bench import made_by

WINDOWS = Windows("embedded/c4", count=16, length=128, sampling="first")


class NaiveLinear(nn.Module):
    """W + s (BA . M) as autograd would have it: the product, the mask and the sum kept until backward."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale
        self.a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.b = nn.Parameter(torch.empty(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = (self.b @ self.a).masked_fill(self.linear.weight == 0, 0)
        return F.linear(x, self.linear.weight + self.scale * product, self.linear.bias)


@dataclass(frozen=True)
class NaiveMaskLoRA(MaskLoRA):
    def make(self, linear: nn.Linear, mask: BitMask) -> tuple[nn.Module, nn.Parameter, nn.Parameter]:
        module = NaiveLinear(linear, self.rank, self.alpha / self.rank)
        return module, module.a, module.b


JOBS = {
    "norms": Trainable(norms=True),
    "LoRA": Trainable(adapters=LoRA(rank=16, alpha=32)),
    "MaskLoRA": Trainable(adapters=MaskLoRA()),
    "naive MaskLoRA": Trainable(adapters=NaiveMaskLoRA()),
    "ScaleLoRA": Trainable(adapters=ScaleLoRA()),
    "full": Trainable.full(),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("jobs", nargs="*", help=f"of {', '.join(JOBS)} (default: all)")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--results", type=Path, default=Path("results/bench"))
    asked = parser.parse_args()
    asked.results.mkdir(parents=True, exist_ok=True)
    if unknown := set(asked.jobs) - set(JOBS):
        parser.error(f"no job {', '.join(sorted(unknown))}")
    figures = {name: _measured(name, asked.model, asked.steps) for name in asked.jobs or JOBS}
    lora = figures.get("LoRA", {}).get("tokens_per_second")
    rows = [
        (name, *told.values(), told["tokens_per_second"] / lora if lora else None) for name, told in figures.items()
    ]
    print(tabulate(rows, ("trained", "% of all", "tokens/s", "peak GiB", "x LoRA"), floatfmt=".2f", missingval="-"))
    _keep(figures, asked)


def _measured(name: str, model: str, steps: int) -> dict[str, float]:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_work, (name, model, steps))


def _work(name: str, where: str, steps: int) -> dict[str, float]:
    model, tokenizer = models.load(where)
    windows = corpora.calibration(WINDOWS, tokenizer)
    pruners.prune(model, pruners.Magnitude(sparsity=0.5))
    finetune(model, Trainable(norms=True), windows, steps=1, learning_rate=1e-6)  # memory and caches warmed alike
    report = finetune(model, JOBS[name], windows, steps=steps, learning_rate=1e-5)
    return {
        "share_percent": round(100 * report.share, 3),
        "tokens_per_second": round(report.tokens / report.seconds, 1),
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
    }


def _keep(figures: dict[str, Any], asked: argparse.Namespace) -> None:
    told = {
        "model": asked.model,
        "steps": asked.steps,
        "batch": [2, WINDOWS.length],
        "threads": torch.get_num_threads(),
        "jobs": figures,
        "made_by": made_by(),
    }
    (asked.results / "retraining.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
