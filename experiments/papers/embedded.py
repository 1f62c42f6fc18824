"""Quick tables on the embedded SmolLM2-135M: no hub, two CPU cores.  The papers' headline tables are in `headlines`.

python -m experiments run embedded.demo       about 5 min on two idle cores
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import pruners
from experiments import labels, protocols, recovery
from experiments.measures.asked import DenseAnswers, MaskSample, OpenAnswers
from experiments.papers import llm_pruner
from experiments.recovery import Retraining
from experiments.spec import Efficiency, Generation, Perplexity, Run, Table, Windows, ZeroShot
from pruners.retrain import MaskLoRA, Trainable

MODEL = "smollm2-135m"
WINDOWS = Windows("embedded/c4", count=16, length=256, sampling="first")
SENTENCES = Windows("embedded/c4", count=10, length=64, sampling="first")  # LLM-Pruner needs no more
FEWER = replace(WINDOWS, count=10)
QUICK = Perplexity("embedded/wiki", window=512, limit=4)
COST = Efficiency(new_tokens=4, repetitions=3)
SPEED = Efficiency(batch_sizes=(1, 4), lengths=(64, 256), new_tokens=16, repetitions=5, semi_structured=True)
# A few documents of the tasks with short ones: enough to see a model break, not to rank two that work.
TASKS = ZeroShot(
    "short", (("piqa", "acc"), ("winogrande", "acc"), ("arc_easy", "acc"), ("openbookqa", "acc_norm")),
    limit=16, detail=False,
)  # fmt: skip

# As the headline table `embedded.perp`, with fewer steps: a minute.
TEXT = Windows("embedded/c4", count=24, length=128, sampling="first")
RETRAINING = Retraining(Trainable(norms=True, adapters=MaskLoRA(rank=16)), TEXT, steps=8, learning_rate=3e-3)


MIDDLE = partial(llm_pruner.sparing, 4, 4, target_parameters=0.2, importance="element1")


def sampled(row: Any, model: str) -> Run:
    """`row` is a method, how it is made for a model, or a method and its recovery stage."""
    method, recovery = row if isinstance(row, tuple) else (row, None)
    method = method(model) if callable(method) else method
    windows = SENTENCES if isinstance(method, pruners.LLMPruner) else FEWER
    return Run(model, method, windows, (QUICK, COST, TASKS), recovery=recovery)


def label(run: Run) -> tuple[str, str]:
    method = run.method
    name = {pruners.Flap: "FLAP", pruners.WandaSP: "Wanda-sp", pruners.LLMPruner: "LLM-Pruner element1"}.get(
        type(method)
    )
    norm = f" {method.norm}" if isinstance(method, pruners.GBLM) else ""
    plain = type(method).__name__ if method else "Dense"
    return (name or plain) + norm + recovery.label(run.recovery), labels.setting(method)


demo = Table(
    name="embedded.demo",
    title="Pruning the embedded model",
    rows=(
        None,
        pruners.Magnitude(sparsity=0.5),
        (pruners.Magnitude(sparsity=0.5), RETRAINING),
        pruners.Wanda(sparsity=0.5),
        pruners.SparseGPT(sparsity=0.5),
        pruners.GBLM(sparsity=0.5, norm="l1"),
        pruners.GBLM(sparsity=0.5, norm="l2"),
        pruners.Magnitude(pattern="2:4"),
        pruners.Wanda(pattern="2:4"),
        pruners.SparseGPT(pattern="2:4"),
        pruners.GBLM(pattern="2:4", norm="l1"),
        pruners.Flap(target_parameters=0.2),
        pruners.WandaSP(target_parameters=0.2),
        MIDDLE,
    ),
    columns=((MODEL,),),
    run=sampled,
    label=label,
)

speed = Table(
    name="embedded.speed",
    title="Speed by batch size and prompt length",
    rows=(None, pruners.Magnitude(sparsity=0.5), pruners.Magnitude(pattern="2:4")),
    columns=((MODEL,),),
    run=lambda method, model: Run(model, method, WINDOWS, (SPEED,)),
)

HALVED = (None, pruners.Magnitude(sparsity=0.5), pruners.Wanda(sparsity=0.5), pruners.SparseGPT(sparsity=0.5))

generation = Table(
    name="embedded.generation",
    title="Generated text of pruned models",
    rows=HALVED,
    columns=((MODEL,),),
    run=lambda method, model: Run(model, method, WINDOWS, (Generation(),)),
)

tasks = Table(
    name="embedded.tasks",
    title="Accuracy on the first ten documents of each of MMLU's 57 subjects, and on RTE",
    rows=HALVED,
    columns=((MODEL,),),
    run=lambda method, model: Run(
        model, method, WINDOWS, (protocols.tasks("mmlu", limit=10), protocols.tasks("rte")), "bfloat16"
    ),
)

open_answers = Table(
    name="embedded.open_answers",
    title="Agreement of greedy answers with the dense model, and GSM8K accuracy",
    rows=HALVED,
    columns=((MODEL,),),
    run=lambda method, model: Run(
        model, method, WINDOWS, (DenseAnswers(), OpenAnswers(examples=4, limit=25, new_tokens=128)), "bfloat16"
    ),
)

SOURCES = ("embedded/c4", "wikitext2/train", "alpaca/train", "own/text")

# By `stream`, as instructions are too short for a window each.
sources = Table(
    name="embedded.sources",
    title="Calibration on C4, WikiText-2, Alpaca and the dense model's own text: 16 x 512 tokens, three seeds",
    rows=(None, pruners.Wanda(sparsity=0.5), pruners.SparseGPT(sparsity=0.5), pruners.Flap(target_parameters=0.2),
          pruners.GBLM(sparsity=0.5, norm="l1", alpha=100 * 128 / 16)),
    columns=tuple(product((MODEL,), SOURCES, range(3))),
    run=lambda method, model, source, seed: Run(
        model, method, Windows(source, 16, 512, seed, "stream"), (Perplexity("embedded/wiki", 512, limit=64),),
        "bfloat16",
    ),
    label=lambda run: (label(run)[0], ", ".join([label(run)[1], *([run.windows.corpus] if run.windows else [])])),
)  # fmt: skip

# What one number of a table can say: as drawn, the same windows in five other orders, four other draws, other texts.
DRAWN = Windows("embedded/c4", 16, 512, 0, "stream")
VARIED = (
    DRAWN,
    *(replace(DRAWN, order=order) for order in range(5)),
    *(replace(DRAWN, seed=seed) for seed in range(1, 5)),
    *(replace(DRAWN, corpus=corpus) for corpus in ("wikitext2/train", "alpaca/train")),
)


def varied(method: Any, model: str, windows: Windows) -> Run:
    ppl = Perplexity("embedded/wiki", 512, limit=64)
    return Run(model, method, windows, (ppl, MaskSample()) if method else (ppl,), "bfloat16")


def _varied_label(run: Run) -> tuple[str, str]:
    """Draws have one name, and the orders of one draw another."""
    name, setting = label(run)
    if run.windows is None:
        return name, setting
    text = [run.windows.corpus] if run.windows.corpus != DRAWN.corpus else []
    return name, ", ".join([setting, *text, *([] if run.windows.order is None else [labels.REORDERED])])


order = Table(
    name="embedded.order",
    title="The same calibration windows in another order, other draws and other texts: 16 x 512 tokens",
    rows=(None, pruners.SparseGPT(pattern="2:4"), pruners.Wanda(pattern="2:4"),
          pruners.GBLM(pattern="2:4", norm="l1", alpha=100 * 128 / 16), pruners.Flap(target_parameters=0.2)),
    columns=tuple(product((MODEL,), VARIED)),
    run=varied,
    label=_varied_label,
)  # fmt: skip
