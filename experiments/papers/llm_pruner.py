"""LLM-Pruner's tables (Ma, Fang & Wang 2023, arXiv:2305.11627).

    python -m experiments show llm_pruner.llama_7b

10 sentences of 64 BookCorpus tokens (the paper says 128, its code takes 64), drawn with seed 42; perplexity at 128
tokens on WikiText-2 and on PTB's validation split; seven tasks.  "20 %" is ratio 0.25 in blocks 4..29, "50 %" 0.6 in
blocks 3..30, which gives the paper's parameter counts; for channels the ratio is the share itself.  The paper does not
say which of LLaMA-13B's 40 blocks are pruned.  Here any model's first and last blocks are spared as LLaMA-7B's are.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from experiments import models, protocols
from experiments.papers.dense import with_dense
from experiments.recovery import MORE_DATA, POST_TRAINING, Retraining
from experiments.spec import Efficiency, Generation, Perplexity, Run, Table, Windows
from pruners import LLMPruner
from pruners.interface.suggest import UsageError
from pruners.retrain import LoRA, Trainable

WINDOWS = Windows("bookcorpus/train", count=10, length=64, seed=42, sampling="sentences")
PPL = protocols.perplexity("llm_pruner")
MEASURES = (*PPL, protocols.zero_shot("llm_pruner"))
SPARED = {0.2: (4, 2), 0.5: (3, 1)}  # blocks at both ends
OF_22_BLOCKS = {0.2: (4, 4)}  # what the repository spares of TinyLlama
DEEPEST = 128  # blocks; no public model of these families has more
RATIOS = {0.2: 0.25, 0.5: 0.6}
METHODS: dict[str, dict[str, Any]] = {
    "L2": {"importance": "l2", "reduction": "mean"},
    "Random": {"importance": "random"},
    "Channel": {"granularity": "channel"},
    "Vector (Block)": {"importance": "vector"},
    "Element^2 (Block)": {"importance": "element2"},
    "Element^1 (Block)": {"importance": "element1"},
}
TUNED = ", tuned"  # LoRA on Alpaca after pruning: three hours on one GPU


def method(name: str, model: str, share: float, **changes: Any) -> LLMPruner | None:
    """The paper's method of that name which removes about `share` of the parameters."""
    if name == "Dense":
        return None
    if METHODS[name].get("granularity") == "channel":
        return LLMPruner(share, **METHODS[name])
    first, last = (OF_22_BLOCKS if depth(model) == 22 else {}).get(share, SPARED[share])
    return sparing(first, last, model, ratio=RATIOS[share], **{**METHODS[name], **changes})


def depth(model: str) -> int:
    """Its decoder blocks; UsageError for a model of which nobody knows them."""
    if (blocks := models.find(model).blocks) is None:
        raise UsageError(f"How many blocks {model} has is not known, and with it which of them LLM-Pruner spares.")
    return blocks


def sparing(first: int, last: int, model: str, **how: Any) -> LLMPruner:
    """LLM-Pruner on all of the model's blocks but the first and the last so many."""
    blocks = (first, depth(model) - last)
    return LLMPruner(attention_blocks=blocks, mlp_blocks=blocks, **how)


def pruned(name: str, model: str, share: float, measures: tuple[Any, ...] = MEASURES, **changes: Any) -> Run:
    """`name` is one of METHODS, followed by TUNED or not."""
    recovery = POST_TRAINING if name.endswith(TUNED) else None
    made = method(name.removesuffix(TUNED), model, share, **changes)
    return Run(model, made, WINDOWS, measures, "float16", recovery)


def label(run: Run) -> tuple[str, str]:
    if run.method is None:
        return "Dense", ""
    channel = run.method.granularity == "channel"
    shares = {ratio: share for share, ratio in RATIOS.items()}
    share = run.method.ratio if channel else shares[run.method.ratio]
    tuned = TUNED if run.recovery else ""
    return ("Channel" if channel else NAMES[run.method.importance]), f"{100 * share:g} %{tuned}"


NAMES = {how["importance"]: name for name, how in METHODS.items() if "importance" in how}


def _whole(
    name: str, title: str, column: tuple[str, float], published: str, tuned: tuple[str, ...], beside: str | None = None
) -> Table:
    """`beside` is a second model at the same share, of which the paper prints nothing."""
    return Table(
        name=f"llm_pruner.{name}",
        title=title,
        rows=("Dense", *METHODS, *(name + TUNED for name in tuned)),
        columns=(column, *([(beside, column[1])] if beside else [])),
        run=pruned,
        published=f"llm_pruner: {published}",
        label=label,
    )


BLOCK = ("Vector (Block)", "Element^2 (Block)", "Element^1 (Block)")
llama_7b = _whole("llama_7b", "LLaMA-7B at 20 % (table 1)", ("llama-7b", 0.2), "table 1", ("Channel", *BLOCK))
llama_13b = _whole(
    "llama_13b", "LLaMA-13B at 20 % (table 2)", ("llama-13b", 0.2), "table 2",
    ("L2", "Random", "Channel", "Element^1 (Block)"),
)  # fmt: skip
vicuna_7b = _whole(
    "vicuna_7b", "Vicuna-7B v0, and v1.3, at 20 % (table 4)", ("vicuna-7b-v0", 0.2), "table 4", BLOCK, "vicuna-7b"
)
llama_7b_half = _whole(
    "llama_7b_half", "LLaMA-7B at 50 % (table 16)", ("llama-7b", 0.5), "table 16", ("Channel", *BLOCK)
)
vicuna_7b_half = _whole(
    "vicuna_7b_half",
    "Vicuna-7B v0, and v1.3, at 50 % (table 17)",
    ("vicuna-7b-v0", 0.5),
    "table 17",
    ("Channel", *BLOCK),
    "vicuna-7b",
)

statistics = Table(
    name="llm_pruner.statistics",
    title="Parameters, MACs and speed (table 3)",
    rows=("Dense", "Channel", "Element^1 (Block)"),
    columns=(("llama-7b", 0.2), ("llama-7b", 0.5)),
    run=partial(pruned, measures=(Efficiency((), ()), Efficiency())),
    published="llm_pruner: table 3",
    label=label,
)

dependency = Table(
    name="llm_pruner.dependency",
    title="Coupled groups pruned together (table 6)",
    rows=("Element^1 (Block)", "Element^1 (Block)" + TUNED),
    columns=(("llama-7b", 0.2),),
    run=pruned,
    published="llm_pruner: table 6",
    label=label,
)
dependency = with_dense(dependency)

layer_skipping = Table(
    name="llm_pruner.layer_skipping",
    title="Half of the parameters removed, then tuned (table 8)",
    rows=("Element^1 (Block)" + TUNED,),
    columns=(("llama-7b", 0.5),),
    run=partial(pruned, measures=(*MEASURES, Efficiency((), ()))),
    published="llm_pruner: table 8",
    label=label,
)
layer_skipping = with_dense(layer_skipping)

TUNINGS = {POST_TRAINING: "Element^1 (Block)", MORE_DATA: "LLaMA-5.4B, LaMini 2.59M"}

more_data = Table(
    name="llm_pruner.more_data",
    title="Recovery on 50k samples of Alpaca and on 2.59M of LaMini-instruction (table 10)",
    rows=(None, *TUNINGS),
    columns=(("llama-7b", 0.2),),
    run=lambda recovery, model, share: replace(
        pruned("Element^1 (Block)" if recovery else "Dense", model, share), recovery=recovery
    ),
    published="llm_pruner: table 10",
    label=lambda run: (TUNINGS[run.recovery], label(run)[1]) if run.recovery else label(run),
)

# The paper says of its pruned model that 3.6B parameters are left.  The blocks are those of "50 %", which leaves 3.35B.
to_3_6b = partial(sparing, *SPARED[0.5], target_parameters=0.466, target_of="model")

STABLELM = "StableLM-3B (stablelm-tuned-alpha-3b), Alpaca-tuned"


def tuned(method: Any, model: str, pruned: bool) -> Run | None:
    """Two columns: a pruned model, and a small one that is tuned as it is."""
    if pruned is (method is None):
        return None
    measures = (MEASURES[-1], Efficiency((), ()))
    return Run(model, method and method(model), WINDOWS, measures, "float16", POST_TRAINING)


stablelm = Table(
    name="llm_pruner.stablelm",
    title="LLaMA-7B pruned to 3.6B parameters beside StableLM-3B, both tuned (table 9)",
    rows=(to_3_6b, None),
    columns=(("llama-7b", True), ("stablelm-tuned-alpha-3b", False)),
    run=tuned,
    published="llm_pruner: table 9",
    label=lambda run: ("Element^1 (Block), 3.6B parameters" if run.method else STABLELM, "tuned"),
)

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
TARGETS = {
    None: "Element^1 (Block)",
    ATTENTION: "- MLP (MLP not tuned)",
    MLP: "- MHA (MHA not tuned)",
}


def tuning(targets: tuple[str, ...] | None) -> Retraining:
    adapters = LoRA(rank=8, targets=targets, alpha=16, dropout=0.05, merge=True)
    return replace(POST_TRAINING, trainable=Trainable(adapters=adapters))


tuned_modules = Table(
    name="llm_pruner.tuned_modules",
    title="Which projections recovery tunes (table 12)",
    rows=tuple(TARGETS),
    columns=(("llama-7b", 0.2),),
    run=lambda targets, model, share: replace(pruned("Element^1 (Block)", model, share, PPL), recovery=tuning(targets)),
    published="llm_pruner: table 12",
    label=lambda run: (TARGETS[run.recovery.trainable.adapters.targets], label(run)[1]),
    titles={
        TARGETS[None]: "Every projection tuned",
        TARGETS[ATTENTION]: "Attention alone tuned",
        TARGETS[MLP]: "MLP alone tuned",
    },
)
tuned_modules = with_dense(tuned_modules)


def stopped(step: int, model: str, share: float) -> Run:
    """Recovery left after so many of its steps; cells of one table go on from each other's."""
    run = pruned("Element^1 (Block)", model, share)
    return replace(run, recovery=replace(POST_TRAINING, stop=step)) if step else run


tuning_steps = with_dense(
    Table(
        name="llm_pruner.tuning_steps",
        title="Perplexity and accuracy by step of recovery (table 15)",
        rows=tuple(range(0, 1600, 200)),
        columns=(("llama-7b", 0.2),),
        run=stopped,
        published="llm_pruner: table 15",
        label=lambda run: ("Element^1 (Block)", f"20 %, LoRA step {run.recovery.stop if run.recovery else 0}"),
    )
)

KEPT = {None: "not tuned", "last": "tuned, last step", "best": "tuned, best of every 200 steps"}


def as_released(row: tuple[str | None, str | None], model: str, share: float) -> Run:
    """`row` is the dtype in which groups are scored, None for the model's own, and a key of KEPT."""
    score_dtype, keep = row
    run = pruned("Element^1 (Block)", model, share, score_dtype=score_dtype)
    return replace(run, recovery=keep and replace(POST_TRAINING, keep=keep))


# The released commands score in float32 and evaluate in float16, and load the best checkpoint after post-training: of
# those every 200 steps by the loss on 2,000 records of Alpaca.  The other tables have float16 and the last step.
as_released_table = Table(
    name="llm_pruner.as_released",
    title="Groups scored in float16 or float32; the last or the best step of post-training, at 20 %",
    rows=tuple(product((None, "float32"), KEPT)),
    columns=(("llama-7b", 0.2),),
    run=as_released,
    label=lambda run: (
        f"Element^1 (Block), scored in {run.method.score_dtype or run.dtype}",
        f"20 %, {KEPT[run.recovery and run.recovery.keep]}",
    ),
)
as_released_table = with_dense(as_released_table)

REDUCTIONS = {"sum": "Summation", "max": "Max", "prod": "Production", "last": "Last-only"}

aggregation = Table(
    name="llm_pruner.aggregation",
    title="Aggregation of a group's scores (table 7), at 20 %, which the paper does not state",
    rows=tuple(REDUCTIONS),
    columns=(("llama-7b", 0.2),),
    run=lambda reduction, model, share: pruned("Element^1 (Block)", model, share, reduction=reduction),
    published="llm_pruner: table 7",
    label=lambda run: (REDUCTIONS[run.method.reduction], "not stated; 20 % here"),
    titles={"not stated; 20 % here": "20 %"},
)
aggregation = with_dense(aggregation)

global_local = Table(
    name="llm_pruner.global_local",
    title="Groups ranked within each block or over all blocks (table 14)",
    rows=("local", "global"),
    columns=(("llama-7b", 0.2),),
    run=lambda scope, model, share: pruned("Element^1 (Block)", model, share, scope=scope),
    published="llm_pruner: table 14",
    label=lambda run: (f"Element^1 - {run.method.scope}", label(run)[1]),
)
global_local = with_dense(global_local)

WINDOWS_BOTH = tuple(Perplexity(what.corpus, window) for window in (128, 2048) for what in PPL)

more_models = Table(
    name="llm_pruner.more_models",
    title="Grouped-query models, 25 % of the groups (further results of the repository)",
    rows=("Dense", "L2", "Element^1 (Block)"),
    columns=tuple(
        product(
            ("llama-3-8b", "tinyllama-1.1b", "llama-3-8b-instruct", "llama-3.1-8b", "llama-3.1-8b-instruct"), (0.2,)
        )
    ),
    run=partial(pruned, measures=(*WINDOWS_BOTH, Efficiency((), ()))),
    published="llm_pruner: more results",
    label=lambda run: (label(run)[0], "25 % of the groups" if run.method else ""),
)


def alone(block: int, model: str) -> Run | None:
    if depth(model) > DEEPEST:
        raise UsageError(f"{model} has {depth(model)} blocks and this table rows for {DEEPEST}.")
    if block >= depth(model):
        return None
    made = LLMPruner(0.25, attention_blocks=(block, block + 1), mlp_blocks=(block, block + 1))
    return Run(model, made, WINDOWS, PPL, "float16")


layer_sensitivity = Table(
    name="llm_pruner.layer_sensitivity",
    title="One block pruned at a time, by its index (figure 3)",
    rows=tuple(range(DEEPEST)),
    columns=(("llama-7b",),),
    run=alone,
    label=lambda run: (f"Block {run.method.mlp_blocks[0]}", f"{100 * run.method.ratio:g} %"),
)
layer_sensitivity = with_dense(layer_sensitivity)

ratios = Table(
    name="llm_pruner.ratios",
    title="Perplexity by ratio of the groups, Taylor against L2 (figure 4)",
    rows=("L2", "Vector (Block)", "Element^2 (Block)", "Element^1 (Block)"),
    columns=tuple(product(("llama-7b",), (tenth / 20 for tenth in range(1, 13)))),
    run=lambda name, model, ratio: Run(model, LLMPruner(ratio, **METHODS[name]), WINDOWS, PPL, "float16"),
    label=lambda run: (NAMES[run.method.importance], f"{100 * run.method.ratio:g} %"),
)
ratios = with_dense(ratios)

TUNED_ON_LAMINI = "LLaMA-5.4B (pruned, LaMini-tuned)"
OF_INT8 = {  # pruned and quantised
    (False, False): "Dense",
    (False, True): "LLM.int8",
    (True, False): TUNED_ON_LAMINI,
    (True, True): "LLaMA-5.4B + LLM.int8",
}


def in_8_bits(row: tuple[bool, bool], model: str, share: float) -> Run:
    was_pruned, quantised = row
    run = pruned("Element^1 (Block)" if was_pruned else "Dense", model, share, (MEASURES[-1], Efficiency((), ())))
    return replace(run, recovery=MORE_DATA if was_pruned else None, quantised=quantised)


quantised = Table(
    name="llm_pruner.quantised",
    title="Pruning and LLM.int8 (table 13)",
    rows=tuple(OF_INT8),
    columns=(("llama-7b", 0.2),),
    run=in_8_bits,
    published="llm_pruner: table 13",
    label=lambda run: (OF_INT8[run.method is not None, run.quantised], "see method"),
)

generation = Table(
    name="llm_pruner.generation",
    title="Generated text of pruned models (tables 11 and 18 to 21, whose texts are not compared)",
    rows=("Dense", "Element^1 (Block)", "Element^1 (Block)" + TUNED),
    columns=tuple(product(("llama-7b", "vicuna-7b", "vicuna-7b-v0"), (0.2,))),
    run=partial(pruned, measures=(Generation(new_tokens=128),)),
    label=label,
)
