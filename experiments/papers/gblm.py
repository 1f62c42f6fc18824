"""GBLM-Pruner's tables (Das et al. 2023, arXiv:2311.04902).

    python -m experiments show gblm.perplexity

128 windows of 2,048 C4 tokens, perplexity at 2,048 tokens for every model (Wanda reads LLaMA-2 at 4,096: another
number).  alpha = 100 belongs to 128 windows; the gradient is not divided by their number.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pruners
from experiments import protocols
from experiments.labels import setting
from experiments.papers.dense import with_dense
from experiments.spec import MaskPatterns, Run, Table, Windows

MODELS = ("llama-7b", "llama-13b", "llama-30b", "llama-2-7b", "llama-2-13b", "llama-2-70b")
SETTINGS: tuple[dict[str, Any], ...] = ({"sparsity": 0.5}, {"pattern": "4:8"}, {"pattern": "2:4"})
WINDOWS = Windows("c4/train", count=128, length=2048)
PPL = protocols.perplexity("gblm")
METHODS = (None, pruners.Magnitude, pruners.SparseGPT, pruners.Wanda, partial(pruners.GBLM, norm="l1"))
WORDS = {
    type(None): "Dense",
    pruners.Magnitude: "Magnitude",
    pruners.SparseGPT: "SparseGPT",
    pruners.Wanda: "Wanda",
    pruners.GBLM: "GBLM-Pruner",
}


def label(run: Run) -> tuple[str, str]:
    norm = f" ({run.method.norm})" if isinstance(run.method, pruners.GBLM) else ""
    return WORDS[type(run.method)] + norm, setting(run.method)


def pruned(method: Any, model: str, how: dict[str, Any]) -> Run:
    return Run(model, method and method(**how), WINDOWS, PPL, "float16")


perplexity = Table(
    name="gblm.perplexity",
    title="WikiText-2 perplexity without retraining (table 2)",
    rows=METHODS,
    columns=tuple(product(MODELS, SETTINGS)),
    run=pruned,
    published="gblm: table 2",
    label=label,
)

chat = Table(
    name="gblm.chat",
    title="Chat models (the repository's model zoo)",
    rows=METHODS,
    columns=tuple(product(("llama-2-7b-chat", "llama-2-13b-chat"), SETTINGS[:1])),
    run=pruned,
    published="gblm: MODEL_ZOO (chat models)",
    label=label,
)

zero_shot = Table(
    name="gblm.zero_shot",
    title="Mean accuracy on six tasks at 50 % (table 3)",
    rows=METHODS,
    columns=tuple(product(MODELS[:3], SETTINGS[:1])),
    run=lambda method, model, how: Run(
        model, method and method(**how), WINDOWS, (protocols.zero_shot("gblm"),), "float16"
    ),
    published="gblm: table 3",
    label=label,
)

TERMS = {
    pruners.Gradient(sparsity=0.5, norm="l1"): "|W|*||G||_1 (gradient term only)",
    pruners.Gradient(sparsity=0.5, norm="l2"): "|W|*||G||_2 (gradient term only)",
    pruners.GBLM(sparsity=0.5, norm="l1"): "|W|*||X||_2 + alpha*|W|*||G||_1, alpha=100 (final)",
    pruners.GBLM(sparsity=0.5, norm="l2"): "|W|*||X||_2 + alpha*|W|*||G||_2, alpha=100",
}

metric_ablation = Table(
    name="gblm.metric_ablation",
    title="Terms of the metric (tables 4 and 5)",
    rows=tuple(TERMS),
    columns=(("llama-2-7b",),),
    run=lambda method, model: Run(model, method, WINDOWS, PPL, "float16"),
    published="gblm: table 4, table 5",
    label=lambda run: (TERMS[run.method], setting(run.method)),
    titles={
        word: f"{'GBLM-Pruner' if isinstance(method, pruners.GBLM) else 'Gradient term alone'} ({method.norm})"
        for method, word in TERMS.items()
    },
)
metric_ablation = with_dense(metric_ablation)

alpha = Table(
    name="gblm.alpha",
    title="Weight of the gradient term",
    rows=tuple(10.0**power for power in range(-3, 6)),
    columns=(("llama-2-7b",),),
    run=lambda alpha, model: Run(model, pruners.GBLM(sparsity=0.5, alpha=alpha), WINDOWS, PPL, "float16"),
    published="gblm: Scaling factor ablation",
    label=lambda run: (f"GBLM-Pruner alpha={run.method.alpha:g}", setting(run.method)),
)
alpha = with_dense(alpha)

sparsity = Table(
    name="gblm.sparsity",
    title="Perplexity by sparsity (a figure without printed numbers)",
    rows=METHODS,
    columns=tuple(product(("llama-2-13b", "llama-30b"), ({"sparsity": tenth / 10} for tenth in range(1, 7)))),
    run=pruned,
    label=label,
)

calibration_seeds = Table(
    name="gblm.calibration_seeds",
    title="Five calibration seeds",
    rows=(partial(pruners.GBLM, norm="l1"),),
    columns=tuple(product(("llama-2-7b",), range(5))),
    run=lambda method, model, seed: Run(
        model, method(sparsity=0.5), Windows("c4/train", 128, 2048, seed), PPL, "float16"
    ),
    published="gblm: Calibration-set robustness (5 random draws)",
    label=lambda run: (label(run)[0], f"{setting(run.method)}, {WINDOWS.count} samples"),
)
calibration_seeds = with_dense(calibration_seeds)

# With alpha as it is, though the gradient grows with the number of windows: the released code does not divide it.
calibration_size = Table(
    name="gblm.calibration_size",
    title="Number of calibration windows (a figure without printed numbers)",
    rows=(pruners.SparseGPT, partial(pruners.GBLM, norm="l1")),
    columns=tuple(product(("llama-2-7b",), (1, 8, 32, 64, 128, 256, 512))),
    run=lambda method, model, count: Run(model, method(sparsity=0.5), Windows("c4/train", count, 2048), PPL, "float16"),
    label=lambda run: (label(run)[0], f"{setting(run.method)}, {run.windows.count if run.windows else 0} samples"),
)
calibration_size = with_dense(calibration_size)

patterns = Table(
    name="gblm.patterns",
    title="Structure in the masks of the first block (a figure without printed numbers)",
    rows=METHODS[1:],
    columns=(("llama-2-7b", SETTINGS[0]),),
    run=lambda method, model, how: replace(pruned(method, model, how), measures=(MaskPatterns(),)),
    label=label,
)
