"""The headline table of each paper on the embedded SmolLM2-135M: no hub, two CPU cores.

Three calibration seeds.

    python -m experiments run embedded.gblm       40 minutes a table on two cores with AVX512-BF16, PERP's 100

65,536 evaluation tokens, in bfloat16: the format the model was published in, as the papers use half precision.  The
texts stand in for the papers' own, and a model this small loses more than theirs.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from experiments.labels import setting
from experiments.papers import flap as flap_tables
from experiments.papers import gblm as gblm_tables
from experiments.papers import llm_pruner as llm_pruner_tables
from experiments.papers.dense import with_dense
from experiments.papers.embedded import MODEL, label
from experiments.rates import RateGrid, Tuning, choice
from experiments.recovery import Retraining
from experiments.spec import MaskPatterns, Perplexity, Run, Table, Windows
from pruners import GBLM, Flap, LLMPruner, Magnitude, MagnitudeSP, SparseGPT, Wanda, WandaSP
from pruners.retrain import LoRA, MaskLoRA, Reconstruction, ScaleLoRA, Trainable
from pruners.retrain.units import GRANULARITIES

SEEDS = (0, 1, 2)
DTYPE = "bfloat16"
PPL = Perplexity("embedded/wiki", window=512, limit=128)
SHORT = Perplexity("embedded/wiki", window=512, limit=8)
COUNT = 32
ALPHA = 100 * 128 / COUNT  # the gradient term grows with the number of windows, and 100 belongs to 128
SPARED = llm_pruner_tables.SPARED[0.2]
GROUPS = "25 % of groups"  # beside settings that are shares of the parameters
IMPORTANCES = {"L2": "l2", "Random": "random", "Vector (Block)": "vector", "Element^2 (Block)": "element2",
               "Element^1 (Block)": "element1"}  # fmt: skip


def drawn(method: Any, model: str, seed: int, windows: Windows, measures: tuple[Any, ...] = (PPL,)) -> Run:
    return Run(model, method, replace(windows, seed=seed), measures, DTYPE)


gblm = Table(
    name="embedded.gblm",
    title="Unstructured pruning without retraining, three calibration seeds",
    rows=(None, Magnitude, SparseGPT, Wanda, partial(GBLM, norm="l1", alpha=ALPHA)),
    columns=tuple(product((MODEL,), ({"sparsity": 0.5}, {"pattern": "2:4"}), SEEDS)),
    run=lambda method, model, how, seed: drawn(
        method and method(**how),
        model,
        seed,
        Windows("embedded/c4", COUNT, 512),
        (PPL, *([MaskPatterns()] if method else [])),
    ),
    label=gblm_tables.label,
)


def _flap_label(run: Run) -> tuple[str, str]:
    if isinstance(run.method, LLMPruner):
        return "LLM-Pruner", setting(run.method)
    bias = " without bias" if isinstance(run.method, Flap) and not run.method.bias else ""
    return flap_tables.WORDS[type(run.method)] + bias, setting(run.method)


def _sharing(method: Any, model: str, share: float) -> Any:
    """LLM-Pruner in every block, as the others."""
    if method is LLMPruner:
        return llm_pruner_tables.sparing(0, 0, model, target_parameters=share)
    return method and method(target_parameters=share)


# By `ratio` 0.2 FLAP removes 20 % of the parameters and the others 15 %: no fifth of three KV groups can go.
flap = Table(
    name="embedded.flap",
    title="Structured pruning without retraining, with the same share of parameters removed and the same "
    "calibration windows",
    rows=(
        None,
        MagnitudeSP,
        WandaSP,
        LLMPruner,
        Flap,
        partial(Flap, bias=False),
    ),
    columns=tuple(product((MODEL,), (0.2, 0.5), SEEDS)),
    run=lambda method, model, share, seed: drawn(
        _sharing(method, model, share), model, seed, Windows("embedded/c4", 128, 128, sampling="stream")
    ),
    label=_flap_label,
)


def _by(importance: str, model: str, seed: int) -> LLMPruner:
    """Random groups are drawn anew for every seed; other importances draw nothing but their windows."""
    draw = seed if importance == "random" else LLMPruner.seed
    return llm_pruner_tables.sparing(*SPARED, model, ratio=0.25, importance=importance, seed=draw)


llm_pruner = Table(
    name="embedded.llm_pruner",
    title="25 % of the groups of blocks 4 to 27, which the paper calls 20 %, by importance; of this model's 3 groups "
    "of heads none can go, so that only MLP channels do",
    rows=(None, *IMPORTANCES.values()),
    columns=tuple(product((MODEL,), SEEDS)),
    run=lambda importance, model, seed: drawn(
        importance and _by(importance, model, seed),
        model,
        seed,
        Windows("embedded/c4", 10, 64, sampling="sentences"),
    ),
    label=lambda run: (
        ("Dense", "")
        if run.method is None
        else ({value: name for name, value in IMPORTANCES.items()}[run.method.importance], "20 %")
    ),
    titles={"20 %": GROUPS},
)


def _short(method: Any, model: str, seed: int) -> Run:
    """In float32, and with few tokens, so that it ends in an hour on two cores without bfloat16."""
    windows = Windows("embedded/c4", 8, 256, seed)
    if isinstance(method, Flap):
        windows = Windows("embedded/c4", 16, 128, seed, "stream")
    if method is LLMPruner:
        method, windows = _by("element1", model, seed), Windows("embedded/c4", 10, 64, seed, "sentences")
    return Run(model, method, windows, (SHORT,))


architectures = Table(
    name="embedded.architectures",
    title="Two architectures, three calibration seeds: LLaMA's (SmolLM2-135M) and Gemma 3's (270M, after make gemma)",
    rows=(
        None,
        Wanda(sparsity=0.5),
        SparseGPT(sparsity=0.5),
        GBLM(sparsity=0.5, norm="l1", alpha=100 * 128 / 8),
        Flap(target_parameters=0.2),
        LLMPruner,
    ),
    columns=tuple(product((MODEL, "gemma-3-270m-q4"), SEEDS)),
    run=_short,
    label=lambda run: (label(run)[0], GROUPS) if isinstance(run.method, LLMPruner) else label(run),
)

# Post-training at a twentieth of the length on the first 4,096 tokens, six times: enough to see it overfit.  Of the
# windows held out, 4,096 tokens, none is among these.  The rate is ten times the paper's and was not chosen.
TUNED = Retraining(
    Trainable(adapters=LoRA(rank=8, alpha=16, dropout=0.05, merge=True)),
    Windows("embedded/c4", 32, 128, sampling="first"),
    steps=96,
    learning_rate=1e-3,
)
BEST = replace(TUNED, keep="best", check_every=16, held_out=Windows("embedded/c4", 32, 128, sampling="stream"))
TUNINGS = {None: "not tuned", TUNED: "tuned, last step", BEST: "tuned, best of every 16 steps"}


def _as_released(row: tuple[str | None, Any], model: str) -> Run:
    """`row` is the dtype in which groups are scored, None for the model's own, and one of TUNINGS."""
    score_dtype, recovery = row
    run = drawn(
        replace(_by("element1", model, 0), score_dtype=score_dtype),
        model,
        0,
        Windows("embedded/c4", 10, 64, sampling="sentences"),
    )
    return replace(run, recovery=recovery)


as_released = with_dense(
    Table(
        name="embedded.as_released",
        title="LLM-Pruner's groups scored in bfloat16 or float32; the last or the best step of LoRA",
        rows=tuple(product((None, "float32"), TUNINGS)),
        columns=((MODEL,),),
        run=_as_released,
        label=lambda run: (
            f"Element^1 (Block), scored in {run.method.score_dtype or run.dtype}",
            f"{GROUPS}, {TUNINGS[run.recovery]}",
        ),
        rates="One learning rate, ten times the paper's, which was not chosen among others",
    )
)

# 8,192 tokens of retraining for every row, or of reconstruction for every block.  Each learning rate is the one that
# embedded.rates chose on magnitude 50 % and text that was not trained on, but reconstruction's: an older and coarser
# grid had 1e-2 before 3e-3 and 3e-2.  The model has no biases, so that biases and norms are norms.
STEPS = 32
MASKED = Trainable(norms=True, adapters=MaskLoRA(rank=16))
RATES = {
    Trainable(biases=True, norms=True): 5e-3,
    Trainable(adapters=ScaleLoRA(rank=16)): 2e-3,
    MASKED: 5e-3,
    Trainable.full(): 1e-3,
}
RECONSTRUCTION = Reconstruction(MASKED, STEPS, learning_rate=1e-2, batch_size=1)


def recovered(row: tuple[Any, Any], model: str, sparsity: float, seed: int) -> Run:
    """`row` is a method and what is trained after it, or a reconstruction, or None."""
    method, recovery = row
    run = drawn(method and method(sparsity=sparsity), model, seed, Windows("embedded/c4", 16, 256))
    if isinstance(recovery, Trainable):
        text = Windows("embedded/c4", 2 * STEPS, 128, seed)
        recovery = Retraining(recovery, text, STEPS, RATES[recovery], seed=seed)
    return replace(run, recovery=recovery)


perp = Table(
    name="embedded.perp",
    title="Recovery by training a small share of the parameters, 32 steps of 2 x 128 tokens, or by reconstruction, 32 "
    "steps of one calibration window a block",
    rows=(
        (None, None),
        (Magnitude, None),
        *((Magnitude, trainable) for trainable in RATES),
        (Magnitude, RECONSTRUCTION),
        (Wanda, None),
        (Wanda, RECONSTRUCTION),
        (SparseGPT, None),
        (SparseGPT, RECONSTRUCTION),
    ),
    columns=tuple(product((MODEL,), (0.5, 0.6), SEEDS)),
    run=recovered,
    rates=(
        "Each row's learning rate is the best of six from 0.0005 to 0.02 by the loss on text that was not trained on, "
        "at magnitude 50 % (embedded.rates); but reconstruction has 0.01, and 0.005 was better there by 0.06 nats"
    ),
    titles={"Magnitude + norms, biases": "Magnitude + norms"},  # the model has no biases
)

# Of these 4,096 tokens no twelve in a row are in what any seed trains or calibrates on.
GRID = RateGrid((5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2), Windows("embedded/c4", 16, 256, seed=13))


def _choice(recovery: Any, model: str, sparsity: float) -> Run:
    tuning = Tuning(GRID, Magnitude(sparsity=sparsity), table="embedded.rates")
    return choice(replace(recovered((Magnitude, recovery), model, sparsity, 0), tuning=tuning))


rates = Table(
    name="embedded.rates",
    title="Learning rates for the rows of embedded.perp, chosen on magnitude pruning by the loss on held-out text",
    rows=(*RATES, RECONSTRUCTION),
    columns=((MODEL, 0.5),),
    run=_choice,
    titles=perp.titles,
)

REBUILT = "Wanda + reconstruction (weights)"
WAYS = tuple(product(GRANULARITIES, ("pruned", "dense")))
BY_WAY = Reconstruction(Trainable(weights=True), STEPS, learning_rate=1e-3, batch_size=1)


def _by_way(row: Any, model: str, sparsity: float) -> Run:
    """`row` is None for pruning alone, or what is rebuilt at once and the inputs that it gets."""
    recovery = row and replace(BY_WAY, granularity=row[0], inputs=row[1])
    run = drawn(Wanda(sparsity=sparsity), model, 0, Windows("embedded/c4", 16, 256))
    return replace(run, recovery=recovery)


granularity = with_dense(
    Table(
        name="embedded.granularity",
        title="Reconstruction of all weights by matrix, attention and MLP, one, two or four blocks, on inputs of the "
        "pruned or the dense model",
        rows=(None, *WAYS),
        columns=((MODEL, 0.5),),
        run=_by_way,
        label=label,
        rates="One learning rate for every row, that of all weights in embedded.perp",
        titles={REBUILT + inputs: f"{REBUILT} by block{inputs}" for inputs in ("", ", dense inputs")},
    )
)
