"""Times methods and measures in real LLaMA and Mixtral shapes on a CUDA device, beside floors and the memory formula.

    python -m tests.bench_card                                    every case of the 7B shape with its 32 blocks
    python -m tests.bench_card wanda perplexity --home host
    python -m tests.bench_card wanda gblm --shape 65b --blocks 4 --windows 32 --home disk
    python -m tests.bench_card wanda perplexity --shape mixtral-8x7b --blocks 2 --windows 16 --home disk

The weights are random, in float16, and so are the tokens: 128 windows of 2,048 for calibration, 166 for perplexity as
WikiText-2 has with LLaMA's tokenizer, 1,024 of 128 for FLAP, 10 of 64 for LLM-Pruner.  A case that fails is told at the
end; what was timed is kept.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

import pruners
from eval import latency
from eval.perplexity import perplexity
from experiments import provenance
from experiments.placement import needs
from experiments.recovery import Retraining
from experiments.spec import Perplexity, Run, Windows
from experiments.store.records import now
from pruners import retrain
from pruners.retrain import MaskLoRA, Reconstruction, Trainable
from pruners.weights import homes, opening, sources
from tests import bench

SHAPES = {  # width, channels, heads, blocks
    "7b": (4096, 11008, 32, 32),
    "13b": (5120, 13824, 40, 40),
    "65b": (8192, 22016, 64, 80),
    "mixtral-8x7b": (4096, 14336, 32, 32),
}
METHODS: dict[str, Any] = {
    "magnitude": pruners.Magnitude(0.5),
    "wanda": pruners.Wanda(0.5),
    "wanda 2:4": pruners.Wanda(pattern="2:4"),
    "sparsegpt": pruners.SparseGPT(0.5),
    "sparsegpt 2:4": pruners.SparseGPT(pattern="2:4"),
    "gblm": pruners.GBLM(0.5),
    "flap": pruners.Flap(ratio=0.2),
    "llm_pruner": pruners.LLMPruner(ratio=0.25),
}
LENGTHS = {"flap": (1024, 128), "llm_pruner": (10, 64)}
FLOORS = ("forward", "forward and backward")
RETRAINED = {"MaskLoRA": Trainable(adapters=MaskLoRA(rank=16)), "norms": Trainable(norms=True)}
STEPS, BATCH, SCORED, DTYPE = 4, 8, 166, "float16"
CASES = (*FLOORS, *METHODS, "perplexity", "decoding", "reconstruction", *RETRAINED)


def configuration(shape: str, blocks: int | None) -> Any:
    width, channels, heads, whole = SHAPES[shape]
    sizes = {
        "vocab_size": 32_000, "hidden_size": width, "intermediate_size": channels, "num_attention_heads": heads,
        "num_hidden_layers": blocks or whole, "max_position_embeddings": 4096,
    }  # fmt: skip
    routed = shape.startswith("mixtral")
    config = MixtralConfig(num_key_value_heads=8, **sizes) if routed else LlamaConfig(**sizes)
    config.architectures, config.dtype = ["MixtralForCausalLM" if routed else "LlamaForCausalLM"], "float16"
    return config


def made(config: Any) -> Any:
    torch.manual_seed(0)
    with torch.device("cuda"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float16).eval()


def opened(home: str, config: Any, folder: Path) -> Any:
    if home == "disk":
        if not list(folder.glob("*.safetensors")):
            made(config).to("cpu").save_pretrained(folder, max_shard_size="2GB")
            torch.cuda.empty_cache()
        return opening.open_folder(folder, device="cuda")
    model = made(config)
    if home == "host":
        model.to("cpu")
        homes.settle(model, sources.Memory(model), "cuda")
    return model


def tokens(name: str, count: int) -> torch.Tensor:
    shape = LENGTHS.get(name, (count, 2048))
    return torch.randint(5, 32_000, shape, generator=torch.Generator().manual_seed(1))


def work(name: str, model: Any, count: int) -> dict[str, Any]:
    windows = tokens(name, count)
    if name in FLOORS:
        bench.JOBS[name](model, windows.to("cuda"))
    elif name in METHODS:
        pruners.prune(model, METHODS[name], windows, batch_size=BATCH)
    elif name == "perplexity":
        perplexity(model, tokens(name, SCORED).flatten(), 2048, batch_size=BATCH)
    elif name == "decoding":
        return latency.measure(model, 1, 128, 32, 5)
    elif name == "reconstruction":
        wanted = Reconstruction(RETRAINED["norms"], steps=STEPS)
        pruners.prune(model, METHODS["magnitude"], windows[:32], batch_size=BATCH, reconstruct=wanted)
    else:
        pruners.prune(model, METHODS["magnitude"])
        _, _ = torch.cuda.synchronize(), torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        retrain.finetune(
            model, RETRAINED[name], windows[:8], steps=STEPS, batch_size=2, learning_rate=1e-4, checkpointing=True
        )
        torch.cuda.synchronize()
        return {"tokens_per_s": STEPS * 2 * 2048 / (time.perf_counter() - started)}
    return {}


def run_of(name: str, model: str, count: int) -> Run | None:
    """The cell whose formula says what the case takes."""
    text = Windows("c4/train", *LENGTHS.get(name, (count, 2048)))
    pruned = Run(model, METHODS["magnitude"], replace(text, count=32), (), DTYPE)
    if name in METHODS:
        return Run(model, METHODS[name], text, (), DTYPE)
    if name == "perplexity":
        return Run(model, None, None, (Perplexity("wikitext2/test", 2048),), DTYPE)
    if name == "reconstruction":
        return replace(pruned, recovery=Reconstruction(RETRAINED["norms"], steps=STEPS))
    if name in RETRAINED:
        recovery = Retraining(RETRAINED[name], text, steps=STEPS, learning_rate=1e-4, batch_size=2)
        return replace(pruned, recovery=recovery)
    return None


def measured(name: str, shape: str, home: str, config: Any, folder: Path, count: int) -> dict[str, Any]:
    model = opened(home, config, folder)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    told = work(name, model, count)
    torch.cuda.synchronize()
    seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated()
    found = {"seconds": round(seconds, 2), "peak_gb": round(1e-9 * peak, 2), **told}
    whole = config.num_hidden_layers == SHAPES[shape][3]  # some of the blocks alone are known by their files
    run = run_of(name, str(folder) if home == "disk" else shape if "-" in shape else f"llama-{shape}", count)
    if run is not None and (whole or home == "disk"):
        formula = sum(needs.device_bytes(run, home != "device", BATCH).values())
        found |= {"formula_gb": round(1e-9 * formula, 2), "ratio": round(formula / peak, 2)}
    if (away := homes.of(model)) is not None:
        read = away.source.bytes_read
        found |= {"sweeps": away.sweeps, "read_gb": round(1e-9 * read, 1), "gb_per_s": round(1e-9 * read / seconds, 1)}
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)} (default: all)")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--blocks", type=int, help="how many of them (default: all)")
    parser.add_argument("--windows", type=int, default=128, help="for calibration (default: 128)")
    parser.add_argument("--home", choices=("device", "host", "disk"), default="device")
    parser.add_argument("--results", type=Path, default=Path("results/bench"))
    asked = parser.parse_args()
    if unknown := set(asked.cases) - set(CASES):
        parser.error(f"no case {', '.join(sorted(unknown))}")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device here")
    asked.results.mkdir(parents=True, exist_ok=True)
    config = configuration(asked.shape, asked.blocks)
    made(configuration("7b", 1))(torch.ones(1, 8, dtype=torch.long, device="cuda"))  # the libraries start
    found: dict[str, Any] = {}
    failed = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config.save_pretrained(folder)
        for name in asked.cases or CASES:
            try:
                found[name] = measured(name, asked.shape, asked.home, config, folder, asked.windows)
            except Exception:  # noqa: BLE001  (told at the end)
                traceback.print_exc()
                failed.append(name)
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            print(name, json.dumps(found[name]), flush=True)
            _keep(found, asked, config)
    rows = [
        (name, *(told.get(key) for key in ("seconds", "peak_gb", "formula_gb", "ratio")))
        for name, told in found.items()
    ]
    print(tabulate(rows, ("case", "seconds", "peak GB", "formula GB", "ratio"), floatfmt=".2f", missingval="-"))
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


def _keep(found: dict[str, Any], asked: argparse.Namespace, config: Any) -> None:
    commit, dirty = provenance.commit()
    told = {
        "shape": asked.shape,
        "blocks": config.num_hidden_layers,
        "windows": asked.windows,
        "weights": asked.home,
        "cases": found,
        "made_by": {
            "commit": commit,
            "dirty": dirty,
            "device": provenance.device_name(torch.device("cuda")),
            "torch": torch.__version__,
            "at": str(now()),
        },
    }
    name = f"card-{asked.shape}-{config.num_hidden_layers}-{asked.home}.json"
    (asked.results / name).write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
