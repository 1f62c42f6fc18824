"""How time grows with windows, length, width and depth: log-log slopes of every method on random LLaMAs.

    python -m tests.bench_scaling                     about ten minutes of one core
    python -m tests.bench_scaling wanda sparsegpt

1 is linear.  Time linear in the weights has slope 2 over the width; SparseGPT's solving has 3 there; attention has 2
over the length.  CPU seconds of one thread, the faster of two; each slope is that of a least-squares line, along which
the other sizes stay at MIDDLE.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from transformers import LlamaConfig, LlamaForCausalLM

import pruners
from tests.bench import forward, made_by

METHODS = ("magnitude", "wanda", "sparsegpt", "gblm", "flap", "llm_pruner")
REPEAT = 2


@dataclass(frozen=True)
class Size:
    windows: int = 8
    length: int = 256
    width: int = 512
    depth: int = 4


MIDDLE = Size()
AXES = {"windows": (4, 8, 16, 32), "length": (128, 256, 512, 1024), "width": (256, 384, 512, 768, 1024),
        "depth": (2, 4, 8, 12)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--results", type=Path, default=Path("results/bench"))
    asked = parser.parse_args()
    if unknown := set(asked.methods) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}")
    asked.results.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    told = {name: _slopes(name) for name in ("forward", *(asked.methods or METHODS))}
    rows = [[name, *(found[axis]["slope"] for axis in AXES)] for name, found in told.items()]
    print(tabulate(rows, ("job", *AXES), floatfmt=".2f"))
    kept = {"middle": asdict(MIDDLE), "threads": 1, "jobs": told, "made_by": made_by()}
    (asked.results / "scaling.json").write_text(json.dumps(kept, indent=1) + "\n")


def _slopes(name: str) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = {}
    for axis, sizes in AXES.items():
        seconds = [min(_seconds(name, replace(MIDDLE, **{axis: size})) for _ in range(REPEAT)) for size in sizes]
        slope = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
        found[axis] = {"slope": round(slope, 3), "seconds": dict(zip(map(str, sizes), seconds, strict=True))}
        print(f"{name}, {axis}: {slope:.2f}", flush=True)
    return found


def _seconds(name: str, size: Size) -> float:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=512, hidden_size=size.width, intermediate_size=3 * size.width,
                         num_hidden_layers=size.depth, num_attention_heads=size.width // 32)  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    windows = torch.randint(512, (size.windows, size.length))
    how = {"attention_blocks": (0, size.depth), "mlp_blocks": (0, size.depth)} if name == "llm_pruner" else {}
    started = time.process_time()
    if name == "forward":
        forward(model, windows)
    else:
        pruners.prune(model, pruners.METHODS[name](**how), windows)
    return round(time.process_time() - started, 4)


if __name__ == "__main__":
    main()
