"""PERP's tables (Zimmer et al. 2023, arXiv:2312.15230): what a small share of the parameters recovers.

    python -m experiments show perp.magnitude

Magnitude and Wanda prune with one threshold a matrix, as PERP does.  Retraining reads C4 documents one by one, cut to
the model's length and padded.  Of the budgets only the 1,000 steps of the first version are public, of the learning
rates only that they were swept: every row takes the best of RATES by the loss on C4's validation split, chosen at 50 %
for 40 and 50 %, 2:4 and 4:8, and at 60 % for 60 and 70 %.  Run `perp.rates` first, its choices at the same time; the
other tables make those that they lack, and wait for one another's.
`perp.granularity` is after the authors' follow-up (Wagner et al. 2025, arXiv:2510.14444), none of whose values is at
hand: what is rebuilt at once, and on whose hidden states, with every weight that is left; `perp.granularity_rates` has
its rates.

Batches of two, the first 2,000 documents of the shard in an order of a run's own seed, and bfloat16 are this project's.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

from experiments import protocols
from experiments.labels import setting
from experiments.measures.asked import Costs
from experiments.rates import RateGrid, Tuning, choice
from experiments.recovery import Documents, Retraining, label
from experiments.spec import Run, Table, Windows
from pruners import Magnitude, SparseGPT, Wanda
from pruners.retrain import LoRA, LoRAPrune, MaskLoRA, Reconstruction, ScaleLoRA, Trainable
from pruners.retrain.units import GRANULARITIES

OPT = ("opt-2.7b", "opt-6.7b", "opt-13b", "opt-30b")
LLAMA = ("llama-2-7b", "llama-2-13b", "mistral-7b")
HALF: dict[str, Any] = {"sparsity": 0.5}
MORE: dict[str, Any] = {"sparsity": 0.6}
SETTINGS: tuple[dict[str, Any], ...] = (
    *({"sparsity": tenth / 10} for tenth in (4, 5, 6, 7)),
    {"pattern": "2:4"},
    {"pattern": "4:8"},
)
STEPS, RELEASED_RATE, BATCH = 1000, 5e-4, 2
RATES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # reconstruction was best at 1e-2
KEPT_BACK = 32  # windows of the validation split
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
MASKLORA = SUBSETS[-1]
OF_LLAMA = (Trainable(norms=True), Trainable(norms=True, adapters=MaskLoRA(rank=16)))  # which has no biases
MASKS = (Magnitude, lambda **how: Wanda(group="matrix", **how), SparseGPT)
DENSE = "dense"


def rebuilding(trainable: Trainable) -> Reconstruction:
    return Reconstruction(trainable, STEPS, RELEASED_RATE, BATCH)


def retraining(trainable: Trainable, model: str) -> Retraining:
    text = Documents("c4/train", count=STEPS * BATCH, length=protocols.length(model))
    return Retraining(trainable, text, STEPS, RELEASED_RATE, BATCH)


def tuning(model: str, how: dict[str, Any], method: Any) -> Tuning:
    """One for each model and group of sparsities: half of the weights or less, or more of them."""
    at = MORE if how.get("sparsity", 0.5) > 0.5 else HALF
    return Tuning(RateGrid(RATES, Windows("c4/validation", KEPT_BACK, protocols.length(model), sampling="first")),
                  method(**at))  # fmt: skip


def retrained(row: Any, model: str, how: dict[str, Any], method: Any = Magnitude) -> Run:
    """`row` is what is retrained, a Reconstruction, None for pruning alone, or DENSE."""
    measures = protocols.perplexity("perp", protocols.length(model))
    windows = Windows("c4/train", count=128, length=protocols.length(model))
    if row == DENSE:
        return Run(model, None, None, measures, "float16")
    run = Run(model, method(**how), windows, measures, "float16")
    if row is None:
        return run
    recovery = retraining(row, model) if isinstance(row, Trainable) else row
    return replace(run, recovery=recovery, tuning=tuning(model, how, method))


def asked(row: Any, model: str, how: dict[str, Any], method: Any = Magnitude) -> Run:
    """The seven tasks in place of the perplexity."""
    tasks = protocols.zero_shot("perp", parameters=protocols.parameters(model))
    return replace(retrained(row, model, how, method), measures=(tasks,))


def words(run: Run) -> tuple[str, str]:
    if run.method is None:
        return "Dense", ""
    return f"{type(run.method).__name__}{label(run.recovery)}", setting(run.method)


magnitude = Table(
    name="perp.magnitude",
    title="Magnitude pruning, then retraining of the parameters that each row names",
    rows=(DENSE, None, *SUBSETS),
    columns=tuple(product(OPT, SETTINGS)),
    run=retrained,
    label=words,
)

masks = Table(
    name="perp.masks",
    title="Retraining on the masks of magnitude, Wanda and SparseGPT",
    rows=(DENSE, None, SMALL, MASKLORA),
    columns=tuple(product(OPT, SETTINGS, MASKS)),
    run=retrained,
    label=words,
)

reconstruction = Table(
    name="perp.reconstruction",
    title="Block-wise reconstruction on the masks of magnitude, Wanda and SparseGPT",
    rows=(DENSE, None, rebuilding(MASKLORA)),
    columns=tuple(product(OPT, SETTINGS, MASKS)),
    run=retrained,
    label=words,
)

llama = Table(
    name="perp.llama",
    title="LLaMA-2 and Mistral: retraining on the masks of magnitude, Wanda and SparseGPT",
    rows=(DENSE, None, *OF_LLAMA),
    columns=tuple(product(LLAMA, SETTINGS, MASKS)),
    run=retrained,
    label=words,
)

llama_reconstruction = Table(
    name="perp.llama_reconstruction",
    title="LLaMA-2 and Mistral: block-wise reconstruction on the masks of magnitude, Wanda and SparseGPT",
    rows=(DENSE, None, rebuilding(OF_LLAMA[1])),
    columns=tuple(product(LLAMA, SETTINGS, MASKS)),
    run=retrained,
    label=words,
)

# Its experts lie in stacked parameters, beside which no adapter stands.
mixtral = Table(
    name="perp.mixtral",
    title="Mixtral: retraining and reconstruction of its norms, on the masks of magnitude and Wanda",
    rows=(DENSE, None, OF_LLAMA[0], rebuilding(OF_LLAMA[0])),
    columns=tuple(product(("mixtral-8x7b",), (HALF, MORE, {"pattern": "2:4"}), MASKS[:2])),
    run=retrained,
    label=words,
)

WAYS = tuple(product(GRANULARITIES, ("pruned", "dense")))
GRANULARITY_SETTINGS: tuple[dict[str, Any], ...] = (HALF, {"pattern": "2:4"})


def by_granularity(row: Any, model: str, how: dict[str, Any]) -> Run:
    """`row` is DENSE, None for pruning alone, or what is rebuilt at once and the inputs that it gets."""
    recovery = row
    if isinstance(row, tuple):
        recovery = replace(rebuilding(Trainable(weights=True)), granularity=row[0], inputs=row[1])
    run = retrained(recovery, model, how, MASKS[1])
    return replace(run, tuning=run.tuning and replace(run.tuning, table="perp.granularity_rates"))


granularity = Table(
    name="perp.granularity",
    title="Reconstruction of all weights by matrix, attention and MLP, one, two or four blocks, on the pruned or the "
    "dense model's inputs",
    rows=(DENSE, None, *WAYS),
    columns=tuple(product(("llama-2-7b",), GRANULARITY_SETTINGS)),
    run=by_granularity,
    label=words,
)

granularity_rates = Table(
    name="perp.granularity_rates",
    title="Learning rates of reconstruction by granularity, chosen by the loss on held-out text",
    rows=WAYS,
    columns=(("llama-2-7b", HALF),),
    run=lambda row, model, how: choice(by_granularity(row, model, how)),
    label=lambda run: (words(run)[0], "50 %, 2:4"),
)

KINDS = ((OPT, (SMALL, MASKLORA), rebuilding(MASKLORA)), (LLAMA, OF_LLAMA, rebuilding(OF_LLAMA[1])))


def _of_kind(row: Any, model: str, kind: int, how: dict[str, Any], method: Any) -> Run:
    """`row` is DENSE, None, or the place of a recovery among those of that kind of model."""
    _, trained, rebuilt = KINDS[kind]
    return asked((*trained, rebuilt)[row] if isinstance(row, int) else row, model, how, method)


def _kinds(settings: tuple[dict[str, Any], ...], methods: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
    """Columns of model, kind of model, setting and method."""
    return tuple(column for kind, (models, *_) in enumerate(KINDS)
                 for column in product(models, (kind,), settings, methods))  # fmt: skip


zero_shot = Table(
    name="perp.zero_shot",
    title="Accuracy on seven tasks after retraining",
    rows=(DENSE, None, 0, 1),
    columns=_kinds((HALF, MORE), MASKS),
    run=_of_kind,
    label=words,
)

zero_shot_reconstruction = Table(
    name="perp.zero_shot_reconstruction",
    title="Accuracy on seven tasks after block-wise reconstruction",
    rows=(DENSE, None, 2),
    columns=_kinds((HALF, MORE), MASKS),
    run=_of_kind,
    label=words,
)

cost = Table(
    name="perp.cost",
    title="Throughput and memory of retraining: 20 steps after magnitude pruning at 50 %",
    rows=SUBSETS,
    columns=tuple(product(OPT, (HALF,))),
    run=lambda row, model, how: Run(
        model, Magnitude(**how), None, (Costs(),), "float16",
        replace(retraining(row, model), text=Documents("c4/train", 20 * BATCH, protocols.length(model)), steps=20),
    ),
    label=words,
)  # fmt: skip


def _choice(row: Any, model: str, kind: int, at: dict[str, Any], method: Any) -> Run | None:
    """The rows that the tables above train on models of that kind and on the masks of that method."""
    _, trained, rebuilt = KINDS[kind]
    several = SUBSETS if kind == 0 and method is Magnitude else trained
    return choice(retrained(row, model, at, method)) if row in (*several, rebuilt) else None


rates = Table(
    name="perp.rates",
    title="Learning rates of PERP's tables, chosen by the loss on held-out text",
    rows=(*SUBSETS, OF_LLAMA[1], *(rebuilt for *_, rebuilt in KINDS)),
    columns=_kinds((HALF, MORE), MASKS),
    run=_choice,
    label=lambda run: (
        words(run)[0],
        "up to 50 %, 2:4, 4:8" if run.method.sparsity == HALF["sparsity"] else "above 50 %",
    ),
)
