"""PERP's tables (Zimmer et al. 2023, arXiv:2312.15230): what a small share of the parameters recovers.

    python -m experiments show perp.magnitude

Magnitude and Wanda prune with one threshold a matrix, as PERP does.  Retraining reads C4 documents one by one, cut to
the model's length and padded.  Of the budgets only the 1,000 steps of the first version are public; the learning rate
is the released default, and batches of two are this project's choice, the same for every row.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

from experiments import protocols
from experiments.labels import setting
from experiments.recovery import Documents, Retraining, label
from experiments.spec import Run, Table, Windows
from pruners import Magnitude, SparseGPT, Wanda
from pruners.retrain import LoRA, LoRAPrune, MaskLoRA, Reconstruction, ScaleLoRA, Trainable

OPT = ("opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b")
LLAMA = ("llama-2-7b", "llama-2-13b", "mistral-7b")
SETTINGS: tuple[dict[str, Any], ...] = (
    *({"sparsity": tenth / 10} for tenth in (4, 5, 6, 7)),
    {"pattern": "2:4"},
    {"pattern": "4:8"},
)
STEPS, LEARNING_RATE, BATCH = 1000, 5e-4, 2
SMALL = Trainable(biases=True, norms=True)
SUBSETS = (
    Trainable.full(),
    Trainable(biases=True),
    Trainable(norms=True),
    SMALL,
    Trainable(head=True),
    Trainable(biases=True, norms=True, adapters=LoRA(rank=16, alpha=32, dropout=0.0)),
    *(Trainable(biases=True, norms=True, adapters=kind(rank=16)) for kind in (LoRAPrune, ScaleLoRA, MaskLoRA)),
)
MASKS = (Magnitude, lambda **how: Wanda(group="matrix", **how), SparseGPT)


def retraining(trainable: Trainable, model: str) -> Retraining:
    text = Documents("c4/train", count=STEPS * BATCH, length=protocols.length(model))
    return Retraining(trainable, text, STEPS, LEARNING_RATE, BATCH)


def retrained(trainable: Trainable | None, model: str, how: dict[str, Any], method: Any = Magnitude) -> Run:
    measures = protocols.perplexity("perp", protocols.length(model))
    windows = Windows("c4/train", count=128, length=protocols.length(model))
    return Run(model, method(**how), windows, measures, "float16", trainable and retraining(trainable, model))


def words(run: Run) -> tuple[str, str]:
    return f"{type(run.method).__name__}{label(run.recovery)}", setting(run.method)


magnitude = Table(
    name="perp.magnitude",
    title="Magnitude pruning, then retraining of what each row names",
    rows=(None, *SUBSETS),
    columns=tuple(product(OPT, SETTINGS)),
    run=retrained,
    label=words,
)

masks = Table(
    name="perp.masks",
    title="Retraining on the masks of magnitude, Wanda and SparseGPT",
    rows=(None, SMALL, SUBSETS[-1]),
    columns=tuple(product(OPT, SETTINGS, MASKS)),
    run=retrained,
    label=words,
)

reconstruction = Table(
    name="perp.reconstruction",
    title="Block-wise reconstruction on the masks of magnitude, Wanda and SparseGPT",
    rows=(None, Trainable(biases=True, norms=True, adapters=MaskLoRA(rank=16))),
    columns=tuple(product(OPT, SETTINGS, MASKS)),
    run=lambda trainable, model, how, method: replace(
        retrained(None, model, how, method),
        recovery=trainable and Reconstruction(trainable, STEPS, LEARNING_RATE, BATCH),
    ),
    label=words,
)

llama = Table(
    name="perp.llama",
    title="LLaMA-2 and Mistral: retraining on the masks of magnitude, Wanda and SparseGPT",
    rows=(None, Trainable(norms=True), Trainable(norms=True, adapters=MaskLoRA(rank=16))),
    columns=tuple(product(LLAMA, SETTINGS, MASKS)),
    run=retrained,
    label=words,
)

zero_shot = Table(
    name="perp.zero_shot",
    title="Accuracy on seven tasks after retraining",
    rows=(None, SMALL, SUBSETS[-1]),
    columns=tuple(product((*OPT, *LLAMA), ({"sparsity": 0.5}, {"sparsity": 0.6}), MASKS)),
    run=lambda trainable, model, how, method: replace(
        retrained(trainable, model, how, method),
        measures=(protocols.zero_shot("perp", parameters=protocols.parameters(model)),),
    ),
    label=words,
)
