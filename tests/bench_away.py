"""Prunes and measures (perplexity, answers) a checkpoint of 6 GB and more in a process that may take 2.5 GB, and
compares with one that may take what it wants.

    python -m tests.bench_away                          every method, both ways, about an hour on two cores
    python -m tests.bench_away wanda --skip-whole       only these, without the run in memory

The model has random weights in float32 and the layer shapes of TinyLlama-1.1B.  Memory is capped by RLIMIT_DATA, which
counts what a process allocates and not the pages of files.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tabulate import tabulate
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import pruners
from eval.perplexity import perplexity
from eval.scorer import Scorer
from pruners import checkpoint
from pruners.weights import homes, opening
from tests import small_table as small

SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4}
VOCABULARY, SHARD_BLOCKS = 32_000, 4
METHODS: dict[str, Any] = {
    "wanda": pruners.Wanda(0.5),
    "sparsegpt": pruners.SparseGPT(0.5),
    "gblm": pruners.GBLM(0.5),
    "flap": pruners.Flap(ratio=0.2),
    "llm_pruner": pruners.LLMPruner(ratio=0.25),
}
WINDOWS, LENGTH = 2, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--blocks", type=int, default=34)
    parser.add_argument("--cap-gb", type=float, default=2.5)
    parser.add_argument("--folder", type=Path, help="where the checkpoint lies or comes to lie (default: temporary)")
    parser.add_argument("--skip-whole", action="store_true", help="leave out the runs in memory")
    asked = parser.parse_args()
    if unknown := set(asked.methods) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        folder = asked.folder or Path(temporary) / "model"
        size = synthetic(folder, asked.blocks)
        print(f"{size / 1e9:.2f} GB of weights, {asked.cap_gb:g} GB of memory")
        print(f"in memory within that: {_apart(_load_whole, folder, asked.cap_gb)}")
        rows = []
        for name in asked.methods or METHODS:
            away = _apart(_pruned, folder, asked.cap_gb, name, True)
            whole = {} if asked.skip_whole else _apart(_pruned, folder, None, name, False)
            same = "-" if asked.skip_whole else away["digest"] == whole["digest"]
            rows.append((name, away["seconds"], away["sweeps"], away["read_gb"], away["peak_gb"], away["ppl"],
                         away["answers"], whole.get("seconds"), whole.get("peak_gb"), same))  # fmt: skip
            print(tabulate([rows[-1]]), flush=True)
    heads = ("method", "s", "sweeps", "GB read", "peak GB", "perplexity", "answers", "s in memory", "peak GB", "same")
    print(tabulate(rows, heads, floatfmt=".2f"))


def synthetic(folder: Path, blocks: int) -> int:
    """Write the checkpoint, a few blocks a file, unless it is there; returns its bytes."""
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=blocks, max_position_embeddings=2048, **SHAPE)
    folder.mkdir(parents=True, exist_ok=True)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "float32"
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    groups: dict[str, list[str]] = {}
    for name in shapes:
        number = int(name.split(".")[2]) // SHARD_BLOCKS if ".layers." in name else "other"
        groups.setdefault(f"model-{number}.safetensors", []).append(name)
    generator = torch.Generator().manual_seed(0)
    for file, names in groups.items():
        if not (folder / file).exists():
            save_file({name: _weight(shapes[name], generator) for name in names}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in groups.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return sum((folder / file).stat().st_size for file in groups)


def _weight(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    return 0.02 * torch.randn(shape, generator=generator) if len(shape) > 1 else torch.ones(shape)


def _apart(work: Any, folder: Path, cap_gb: float | None, *rest: Any) -> Any:
    """In a process of its own, with so much memory to allocate."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_capped, (work, folder, cap_gb, *rest))


def _capped(work: Any, folder: Path, cap_gb: float | None, *rest: Any) -> Any:
    torch.set_num_threads(1)
    if cap_gb is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(1e9 * cap_gb),) * 2)
    return work(folder, *rest)


def _load_whole(folder: Path) -> str:
    try:
        AutoModelForCausalLM.from_pretrained(folder)
    except (RuntimeError, MemoryError, OSError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    return "loads"


def _pruned(folder: Path, name: str, away: bool) -> dict[str, Any]:
    """Prune, measure perplexity, save, and tell what all weights are by a digest."""
    tokens = torch.randint(5, VOCABULARY, (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(1))
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as saved:
        if away:
            model = opening.open_folder(folder, work=Path(saved) / "weights")
        else:
            model = AutoModelForCausalLM.from_pretrained(folder).eval()
        pruners.prune(model, METHODS[name], tokens)
        found = (perplexity(model, tokens.flatten(), LENGTH).perplexity, *_answers(model))
        seconds = time.perf_counter() - started
        checkpoint.save(model, None, Path(saved) / "out")
        home = homes.of(model)
        return {
            "seconds": seconds,
            "ppl": found[0],
            "answers": sum(found[1:]),
            "sweeps": home.sweeps if home else 0,
            "read_gb": home.source.bytes_read / 1e9 if home else 0.0,
            "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
            "digest": _digest(model, found),
        }


def _answers(model: Any) -> list[float]:
    """Log-likelihoods of a few answers, as zero-shot tasks ask for them."""
    generator = torch.Generator().manual_seed(2)
    rows = [torch.randint(5, VOCABULARY, (length,), generator=generator).tolist() for length in range(20, 36)]
    asked = [(("before", str(row[0])), row[:-4], row[-4:]) for row in rows]
    tokenizer = AutoTokenizer.from_pretrained(small.MODEL)
    return [nats for nats, _ in Scorer(model, tokenizer)._loglikelihood_tokens(asked)]


def _digest(model: Any, found: tuple[float, ...]) -> str:
    parts = {
        name: hashlib.sha256(p.detach().numpy().tobytes()).hexdigest()
        for part in homes.each(model)
        for name, p in part.items()
    }
    return hashlib.sha256(repr((sorted(parts.items()), found)).encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
