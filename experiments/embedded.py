"""Tables on the embedded SmolLM2-135M: no hub, two CPU cores.

python -m experiments run embedded.demo       about 7 min on two idle cores
python -m experiments run embedded.perp       about 20 min
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pruners
from experiments import labels, recovery
from experiments.recovery import Retraining
from experiments.spec import Efficiency, Generation, Perplexity, Run, Table, Windows, ZeroShot
from pruners.retrain import MaskLoRA, Reconstruction, ScaleLoRA, Trainable

MODEL = "smollm2-135m"
WINDOWS = Windows("embedded/c4", count=16, length=256, sampling="first")
SENTENCES = Windows("embedded/c4", count=10, length=64, sampling="first")  # LLM-Pruner needs no more
PPL = Perplexity("embedded/wiki", window=512, limit=16)
QUICK = Perplexity("embedded/wiki", window=512, limit=8)
COST = Efficiency(new_tokens=4, repetitions=3)
SPEED = Efficiency(batch_sizes=(1, 4), lengths=(64, 256), new_tokens=16, repetitions=5, semi_structured=True)
# A few documents of the tasks with short ones: enough to see a model break, not to rank two that work.
TASKS = ZeroShot(
    "short", (("piqa", "acc"), ("winogrande", "acc"), ("arc_easy", "acc"), ("openbookqa", "acc_norm")),
    limit=16, detail=False,
)  # fmt: skip

# 8,192 tokens of retraining for every row, or of reconstruction for every block.  Learning rates: of ScaleLoRA 1e-3 and
# 5e-3, of MaskLoRA 1e-3 and 3e-3, of all weights 1e-4 and 5e-4 were tried on magnitude 50 %, and the one with the lower
# loss on windows not yet trained on taken; norms have the first that was tried.  The model has no biases.
STEPS = 32
TEXT = Windows("embedded/c4", count=64, length=128, sampling="first")
MASKED = Trainable(norms=True, adapters=MaskLoRA(rank=16))
RETRAININGS = (
    Retraining(Trainable(biases=True, norms=True), TEXT, STEPS, learning_rate=1e-2),
    Retraining(Trainable(adapters=ScaleLoRA(rank=16)), TEXT, STEPS, learning_rate=5e-3),
    Retraining(MASKED, TEXT, STEPS, learning_rate=3e-3),
    Retraining(Trainable.full(), TEXT, STEPS, learning_rate=5e-4),
)
RECONSTRUCTION = Reconstruction(MASKED, STEPS, learning_rate=1e-3, batch_size=1)


def recovered(row: Any, model: str, measures: tuple[Any, ...]) -> Run:
    """`row` is a method, or a method and its recovery stage."""
    method, recovery = row if isinstance(row, tuple) else (row, None)
    return Run(model, method, WINDOWS, measures, recovery=recovery)


MIDDLE: dict[str, Any] = {
    "attention_blocks": (4, 26),
    "mlp_blocks": (4, 26),
}  # of 30 blocks; LLM-Pruner spares both ends


def sampled(row: Any, model: str) -> Run:
    run = recovered(row, model, (QUICK, COST, TASKS))
    return replace(run, windows=SENTENCES) if isinstance(run.method, pruners.LLMPruner) else run


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
        (pruners.Magnitude(sparsity=0.5), replace(RETRAININGS[2], steps=12)),  # a minute
        pruners.Wanda(sparsity=0.5),
        pruners.SparseGPT(sparsity=0.5),
        pruners.GBLM(sparsity=0.5, norm="l1"),
        pruners.GBLM(sparsity=0.5, norm="l2"),
        pruners.Magnitude(pattern="2:4"),
        pruners.Wanda(pattern="2:4"),
        pruners.SparseGPT(pattern="2:4"),
        pruners.GBLM(pattern="2:4", norm="l1"),
        pruners.Flap(ratio=0.2),
        pruners.WandaSP(ratio=0.2),
        pruners.LLMPruner(target_parameters=0.2, importance="element1", **MIDDLE),
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

generation = Table(
    name="embedded.generation",
    title="What pruned models write",
    rows=(None, pruners.Magnitude(sparsity=0.5), pruners.Wanda(sparsity=0.5), pruners.SparseGPT(sparsity=0.5)),
    columns=((MODEL,),),
    run=lambda method, model: Run(model, method, WINDOWS, (Generation(),)),
)

perp = Table(
    name="embedded.perp",
    title="What a small share of the parameters recovers",
    rows=(
        (None, None),
        (pruners.Magnitude, None),
        *((pruners.Magnitude, retraining) for retraining in RETRAININGS),
        (pruners.Magnitude, RECONSTRUCTION),
        (pruners.Wanda, None),
        (pruners.Wanda, RECONSTRUCTION),
        (pruners.SparseGPT, None),
        (pruners.SparseGPT, RECONSTRUCTION),
    ),
    columns=((MODEL, 0.5), (MODEL, 0.6)),
    run=lambda row, model, sparsity: recovered((row[0] and row[0](sparsity=sparsity), row[1]), model, (PPL,)),
)
