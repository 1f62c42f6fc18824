"""Peaks of memory beside the formula of `experiments.placement.needs`, for every method and measure at every home.

    python -m tests.bench_memory                    all, about half an hour on two cores
    python -m tests.bench_memory wanda perplexity   only these
    python -m tests.bench_memory --homes disk
    python -m tests.bench_memory wanda norms --experts --length 512

The model is a LLaMA, or a Mixtral, with random weights in float32, on the CPU, where what a home keeps counts as well.
Every case runs in a process of its own, whose peak of resident memory is counted from before the model is opened:
interpreter and libraries are left out, as they are of the formula.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, MixtralConfig

import pruners
from eval.perplexity import perplexity
from eval.scorer import Scorer
from experiments.placement import needs
from experiments.recovery import Retraining
from experiments.spec import Perplexity, Run, Windows, ZeroShot
from pruners import retrain
from pruners.retrain import LoRA, MaskLoRA, Reconstruction, Trainable
from pruners.weights import homes, memory, opening, sources
from tests import small_table as small

SHAPE = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}
ROUTED = {"hidden_size": 512, "intermediate_size": 1792, "num_attention_heads": 8, "num_key_value_heads": 2}
BLOCKS, VOCABULARY, BATCH, TINY = 4, 8_000, 4, "tiny"
HOLES = 2**16  # bytes; larger pieces leave none in glibc's heap, whose holes are a large share of so small a model
HOMES = ("device", "host", "disk")
WINDOWS = Windows("c4/train", 8, 128)
EVERY = {"attention_blocks": (0, BLOCKS), "mlp_blocks": (0, BLOCKS)}
METHODS: dict[str, Any] = {
    **{name: pruners.METHODS[name](0.5) for name in ("magnitude", "wanda", "sparsegpt", "gblm", "gradient", "random")},
    **{name: pruners.METHODS[name](ratio=0.2) for name in ("flap", "wanda_sp", "magnitude_sp")},
    "llm_pruner": pruners.LLMPruner(ratio=0.2, **EVERY),
    "llm_pruner mixed": pruners.LLMPruner(ratio=0.2, importance="element_mix", **EVERY),
    "llm_pruner channels": pruners.LLMPruner(ratio=0.2, granularity="channel"),
    "llm_pruner layers": pruners.LLMPruner(ratio=0.2, granularity="layer"),
}
RECOVERIES: dict[str, Any] = {
    **{
        name: Retraining(trainable, WINDOWS, steps=2, learning_rate=1e-4, batch_size=4)
        for name, trainable in {
            "norms": Trainable(norms=True),
            "MaskLoRA": Trainable(adapters=MaskLoRA(rank=16)),
            "LoRA": Trainable(adapters=LoRA(rank=8, merge=True)),
            "head": Trainable(norms=True, head=True),
            "embeddings": Trainable(embeddings=True),
            "all weights": Trainable.full(),
        }.items()
    },
    "reconstruction": Reconstruction(Trainable(norms=True), steps=2),
    **{
        f"reconstruction MaskLoRA{name}": Reconstruction(Trainable(adapters=MaskLoRA(rank=16)), steps=2, **how)
        for name, how in {
            "": {},
            " matrix": {"granularity": "matrix"},
            " apart": {"granularity": "attention_mlp"},
            " two": {"granularity": "two_blocks"},
            " dense": {"inputs": "dense"},
            " matrix dense": {"granularity": "matrix", "inputs": "dense"},
        }.items()
    },
}
MEASURES: dict[str, Any] = {
    "perplexity": Perplexity("ptb/test", 128, limit=8),
    "zero-shot": ZeroShot(None, (("boolq", "acc"),)),
}
NAMES = (*METHODS, *RECOVERIES, *MEASURES)


def run_of(name: str, folder: Path, length: int) -> Run:
    """The cell whose formula it is."""
    windows = replace(WINDOWS, length=length)
    bare = Run(str(folder), pruners.Magnitude(0.5) if name in RECOVERIES else METHODS.get(name), windows, ())
    if name in RECOVERIES:
        recovery = RECOVERIES[name]
        return replace(bare, recovery=replace(recovery, text=windows) if isinstance(recovery, Retraining) else recovery)
    if isinstance(measure := MEASURES.get(name), Perplexity):
        measure = replace(measure, window=length)
    return replace(bare, measures=(measure,)) if measure else bare


def work(name: str, model: Any, length: int) -> None:
    size = (WINDOWS.count, length)
    tokens = torch.randint(5, model.config.vocab_size, size, generator=torch.Generator().manual_seed(1))
    if name in METHODS:
        pruners.prune(model, METHODS[name], tokens, batch_size=BATCH)
    elif name in RECOVERIES:
        recovery = RECOVERIES[name]
        rebuilt = isinstance(recovery, Reconstruction)
        pruners.prune(
            model, pruners.Magnitude(0.5), tokens, batch_size=BATCH, reconstruct=recovery if rebuilt else None
        )
        if not rebuilt:
            told = {"batch_size": recovery.batch_size, "steps": recovery.steps, "checkpointing": False}
            retrain.finetune(model, recovery.trainable, tokens, learning_rate=1e-4, **told)
    elif name == "perplexity":
        perplexity(model, tokens.flatten(), length, batch_size=BATCH)
    else:
        before, answers = tokens[:2].flatten().tolist(), tokens[2:].view(-1, 64).tolist()
        asked = [(("before", str(at)), before, answer) for at, answer in enumerate(answers[:4])]
        Scorer(model, AutoTokenizer.from_pretrained(small.MODEL))._loglikelihood_tokens(asked)


def opened(home: str, folder: Path) -> Any:
    if home == "disk":
        return opening.open_folder(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    for parameter in model.parameters():  # else pages of the file stay where weights go
        parameter.data = parameter.data.clone()
    if home == "host":
        homes.settle(model, sources.Memory(model), "cpu")
    return model


def measured(name: str, home: str, folder: Path, length: int) -> tuple[float, float]:
    """The peak of the work, in bytes above what the process had before, and seconds.

    It is done on a tiny model first, by which what is loaded when it is asked for is there; what is freed goes back at
    once, as an accelerator's peak counts what is allocated.
    """
    torch.set_num_threads(1)
    memory.LARGE = HOLES
    memory.give_back()
    work(name, opened(home, folder / TINY), length)
    before, started = _resident("VmRSS"), time.perf_counter()
    model = opened(home, folder)
    _forget_peak()
    work(name, model, length)
    return _resident("VmHWM") - before, time.perf_counter() - started


def _resident(which: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def synthetic(folder: Path, kind: Any, shape: dict[str, int]) -> None:
    for place, changes in ((folder, {}), (folder / TINY, {"hidden_size": 64, "intermediate_size": 128})):
        sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": BLOCKS, "max_position_embeddings": 512}
        config = kind(**sizes, **{**shape, **changes})
        AutoModelForCausalLM.from_config(config).save_pretrained(place, max_shard_size="100MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(NAMES)} (default: all)")
    parser.add_argument("--homes", nargs="*", choices=HOMES, default=HOMES)
    parser.add_argument("--experts", action="store_true", help="a Mixtral: 8 experts a block, 2 of them for a token")
    parser.add_argument("--length", type=int, default=WINDOWS.length, help="of a window, in tokens (default: 128)")
    asked = parser.parse_args()
    if unknown := set(asked.names) - set(NAMES):
        parser.error(f"nothing is called {', '.join(sorted(unknown))}")
    rows, context = [], multiprocessing.get_context("fork")  # with the libraries loaded
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        with context.Pool(1) as pool:
            pool.apply(synthetic, (folder, *((MixtralConfig, ROUTED) if asked.experts else (LlamaConfig, SHAPE))))
        for name in asked.names or NAMES:
            for home in asked.homes:
                run = run_of(name, folder, asked.length)
                if home != "device" and needs.needs_all_weights(run):
                    continue
                told = needs.cpu_bytes(run, home, BATCH)
                with context.Pool(1) as pool:
                    peak, seconds = pool.apply(measured, (name, home, folder, asked.length))
                parts = ", ".join(f"{what} {1e-6 * size:.0f}" for what, size in told.items())
                formula = sum(told.values())
                rows.append((name, home, seconds, 1e-6 * peak, 1e-6 * formula, formula / peak, parts))
                print(tabulate([rows[-1]], tablefmt="plain"), flush=True)
    heads = ("what", "home", "s", "peak, MB", "formula, MB", "ratio", "of which")
    print(tabulate(rows, heads, floatfmt=("", "", ".1f", ".0f", ".0f", ".2f", "")))


if __name__ == "__main__":
    sys.exit(main())
