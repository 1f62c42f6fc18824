"""The tables of Wanda (Sun et al. 2023, arXiv:2306.11695) and SparseGPT (Frantar & Alistarh 2023, arXiv:2301.00774).

    python -m experiments show baselines.perplexity

128 C4 windows as long as the model takes; Wanda reads WikiText-2 at that length too (LLaMA-2: 4,096), SparseGPT reads
WikiText-2, PTB and C4 at 2,048.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pruners
from experiments import protocols
from experiments.labels import setting
from experiments.measures.asked import Costs, DenseAnswers, OpenAnswers
from experiments.papers.dense import with_dense
from experiments.recovery import Retraining
from experiments.spec import Run, Table, Windows
from pruners.retrain import LoRA, Trainable

LLAMA = ("llama-7b", "llama-13b", "llama-30b", "llama-65b")
LLAMA_2 = ("llama-2-7b", "llama-2-13b", "llama-2-70b")
BLOOM = ("bloom-560m", "bloom-1.1b", "bloom-1.7b", "bloom-3b", "bloom-7.1b")
OPT = ("opt-125m", "opt-350m", "opt-1.3b", "opt-2.7b", "opt-6.7b", "opt-13b")
METHODS = (None, pruners.Magnitude, pruners.SparseGPT, pruners.Wanda)
PATTERNS: tuple[dict[str, Any], ...] = ({"sparsity": 0.5}, {"pattern": "4:8"}, {"pattern": "2:4"})
GROUPS = {
    "matrix": "layer",
    "column": "(input,1)",
    "columns:128": "(input,128)",
    "row": "(output,1)",
    "rows:128": "(output,128)",
}


def windows(model: str, count: int = 128, seed: int = 0) -> Windows:
    return Windows("c4/train", count, protocols.length(model), seed)


def read(model: str) -> tuple[Any, ...]:
    return protocols.perplexity("wanda", protocols.length(model))


def label(run: Run) -> tuple[str, str]:
    return "Dense" if run.method is None else type(run.method).__name__, setting(run.method)


def pruned(method: Any, model: str, how: dict[str, Any]) -> Run:
    return Run(model, method and method(**how), windows(model), read(model), "float16")


perplexity = Table(
    name="baselines.perplexity",
    title="WikiText-2 perplexity without retraining (Wanda, tables 3, 19, 20)",
    rows=METHODS,
    columns=tuple(product(LLAMA + LLAMA_2, (*PATTERNS, {"sparsity": 0.6}, {"sparsity": 0.8}))),
    run=pruned,
    published="wanda: table 3, table 19, table 20, README LLaMA-2 table",
    label=label,
)

zero_shot = Table(
    name="baselines.zero_shot",
    title="Accuracy on seven tasks (Wanda, tables 2 and 23 to 28)",
    rows=METHODS,
    columns=tuple(product(LLAMA + LLAMA_2, PATTERNS)),
    run=lambda method, model, how: Run(
        model,
        method and method(**how),
        windows(model),
        (protocols.zero_shot("wanda", parameters=protocols.parameters(model)),),
        "float16",
    ),
    published="wanda: table 2, table 23, table 24, table 25, table 26, table 27, table 28",
    label=label,
)

comparison_group = Table(
    name="baselines.comparison_group",
    title="Comparison group of the weights, at 50 % (Wanda, table 7)",
    rows=(pruners.Magnitude, partial(pruners.SparseGPT, update=False), pruners.Wanda),
    columns=tuple(product(("llama-7b",), ({"sparsity": 0.5, "group": group} for group in GROUPS))),
    run=pruned,
    published="wanda: table 7",
    label=lambda run: (
        "SparseGPT metric, no weight update" if isinstance(run.method, pruners.SparseGPT) else label(run)[0],
        f"50 %, group {GROUPS[run.method.group]}",
    ),
)
comparison_group = with_dense(comparison_group)

sparsity = Table(
    name="baselines.sparsity",
    title="OPT-13B and Pythia-12B by sparsity (Wanda, table 9)",
    rows=METHODS,
    columns=tuple(product(("opt-13b", "pythia-12b"), ({"sparsity": tenth / 10} for tenth in range(1, 6)))),
    run=pruned,
    published="wanda: table 9",
    label=label,
)

opt_sizes = Table(
    name="baselines.opt_sizes",
    title="OPT at 50 % (Wanda, table 10)",
    rows=METHODS,
    columns=tuple(product(OPT, PATTERNS[:1])),
    run=pruned,
    published="wanda: table 10",
    label=label,
)

bloom_sizes = Table(
    name="baselines.bloom_sizes",
    title="BLOOM at 50 % (Wanda, table 11)",
    rows=METHODS,
    columns=tuple(product(BLOOM, PATTERNS[:1])),
    run=pruned,
    published="wanda: table 11",
    label=label,
)


def _group_label(run: Run) -> tuple[str, str]:
    return "Wanda", f"50 %, per {'layer' if run.method.group == 'matrix' else 'output'}"


opt_groups = Table(
    name="baselines.opt_groups",
    title="Wanda on OPT by comparison group (Wanda, table 12)",
    rows=(pruners.Wanda,),
    columns=tuple(product(OPT, ({"sparsity": 0.5, "group": group} for group in ("matrix", "row")))),
    run=pruned,
    published="wanda: table 12",
    label=_group_label,
)
opt_groups = with_dense(opt_groups)

bloom_groups = replace(
    opt_groups,
    name="baselines.bloom_groups",
    title="Wanda on BLOOM by comparison group (Wanda, table 13)",
    columns=tuple(product(BLOOM, ({"sparsity": 0.5, "group": group} for group in ("matrix", "row")))),
    published="wanda: table 13",
)
bloom_groups = with_dense(bloom_groups)

calibration_size = Table(
    name="baselines.calibration_size",
    title="Number of calibration windows at 50 % (Wanda, table 17)",
    rows=METHODS[2:],
    columns=tuple(product(("llama-7b", "llama-2-7b"), (1, *(2**power for power in range(4, 12))))),
    run=lambda method, model, count: Run(model, method(sparsity=0.5), windows(model, count), read(model), "float16"),
    published="wanda: table 17",
    label=lambda run: (label(run)[0], f"50 %, {run.windows.count if run.windows else 0} samples"),
)
calibration_size = with_dense(calibration_size)

calibration_seeds = Table(
    name="baselines.calibration_seeds",
    title="Five calibration seeds (Wanda, table 18)",
    rows=METHODS[2:],
    columns=tuple(product(LLAMA[:2] + LLAMA_2[:2], PATTERNS, range(5))),
    run=lambda method, model, how, seed: Run(model, method(**how), windows(model, seed=seed), read(model), "float16"),
    published="wanda: table 18",
    label=label,
)
calibration_seeds = with_dense(calibration_seeds)

mmlu = Table(
    name="baselines.mmlu",
    title="Accuracy on MMLU over all documents, five few-shot examples (Wanda, table 21)",
    rows=METHODS,
    columns=tuple(product(LLAMA[:2] + LLAMA_2[:2], PATTERNS[:1])),
    run=lambda method, model, how: Run(
        model, method and method(**how), windows(model), (protocols.tasks("mmlu", examples=5),), "float16"
    ),
    published="wanda: table 21",
    label=label,
)

sparsegpt = Table(
    name="baselines.sparsegpt",
    title="OPT on WikiText-2, PTB and C4 (SparseGPT, tables 1, 3, 4)",
    rows=METHODS[:3],
    columns=tuple(product((*OPT, "opt-30b", "opt-66b"), PATTERNS)),
    run=lambda method, model, how: (
        None
        if method is pruners.Magnitude and "pattern" in how
        else Run(model, method and method(**how), windows(model), protocols.perplexity("sparsegpt"), "float16")
    ),
    published="sparsegpt: table 1, table 3, table 4",
    label=label,
)

sparsegpt_seeds = Table(
    name="baselines.sparsegpt_seeds",
    title="Five calibration seeds on OPT-2.7B (SparseGPT, appendix A)",
    rows=(pruners.SparseGPT,),
    columns=tuple(product(("opt-2.7b",), PATTERNS[:1], range(5))),
    run=lambda method, model, how, seed: Run(
        model, method(**how), windows(model, seed=seed), protocols.perplexity("sparsegpt")[:1], "float16"
    ),
    published="sparsegpt: Appendix A (seeds)",
    label=label,
)
sparsegpt_seeds = with_dense(sparsegpt_seeds)

pruning_time = Table(
    name="baselines.pruning_time",
    title="Pruning time and peak memory at 50 %, on this machine (Wanda, table 4: on an A6000)",
    rows=METHODS[1:],
    columns=tuple(product(LLAMA, PATTERNS[:1])),
    run=lambda method, model, how: Run(model, method(**how), windows(model), (Costs(),), "float16"),
    label=label,
)

open_answers = Table(
    name="baselines.open_answers",
    title="GSM8K accuracy, and agreement of greedy answers with the dense model (in no paper)",
    rows=METHODS,
    columns=tuple(product(LLAMA_2[:2], (PATTERNS[0], PATTERNS[2]))),
    run=lambda method, model, how: Run(
        model, method and method(**how), windows(model), (OpenAnswers(), DenseAnswers()), "float16"
    ),
    label=label,
)

# The authors' 30,000 sequences of 1,024 tokens at 1e-4; batches of 8 and an alpha of 16 are this project's.
TUNED = Retraining(
    Trainable(adapters=LoRA(rank=8, alpha=16, dropout=0.05, targets=("q_proj", "v_proj"))),
    Windows("c4/train", 30_000, 1024), steps=3_750, learning_rate=1e-4, batch_size=8, micro_batch_size=1,
)  # fmt: skip
FINE_TUNED = {None: "Wanda + fine-tuning: none", TUNED: "Wanda + fine-tuning: LoRA r=8 q,v (1 GPU, 12 h)"}

fine_tuning = Table(
    name="baselines.fine_tuning",
    title="LoRA after Wanda, not merged (Wanda, table 6)",
    rows=tuple(FINE_TUNED),
    columns=tuple(product(LLAMA[:1], PATTERNS)),
    run=lambda recovery, model, how: Run(
        model, pruners.Wanda(**how), windows(model), (*read(model), protocols.zero_shot("wanda")), "float16", recovery
    ),
    published="wanda: table 6",
    label=lambda run: (FINE_TUNED[run.recovery], setting(run.method)),
)
fine_tuning = with_dense(fine_tuning)

UPDATES: dict[str, Callable[..., Any]] = {
    "Magnitude, layer, no update": pruners.Magnitude,
    "Magnitude, layer, sequential update": partial(pruners.SparseGPT, metric="magnitude", group="matrix"),
    "Magnitude, (input,128), iterative update": partial(pruners.SparseGPT, metric="magnitude"),
    "Wanda, (output,1), no update": pruners.Wanda,
    "Wanda, (output,1), sequential update": partial(pruners.SparseGPT, metric="wanda", group="row"),
    "Wanda, (input,128), iterative update": partial(pruners.SparseGPT, metric="wanda"),
}
MADE = {make(**how): name for name, make in UPDATES.items() for how in PATTERNS}

weight_updates = Table(
    name="baselines.weight_updates",
    title="SparseGPT's weight update with the masks of magnitude and Wanda (Wanda, table 8)",
    rows=tuple(UPDATES.values()),
    columns=tuple(product(LLAMA[:1], PATTERNS)),
    run=pruned,
    published="wanda: table 8",
    label=lambda run: (MADE[run.method], setting(run.method)),
)
weight_updates = with_dense(weight_updates)
