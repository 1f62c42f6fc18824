"""FLAP's tables (An et al. 2024, arXiv:2312.11983).

    python -m experiments show flap.perplexity

As in the paper, FLAP sees 1,024 windows of 128 tokens of WikiText-2's train split, Wanda-sp 128 windows of C4 and
LLM-Pruner 10 sentences of BookCorpus: on WikiText-2 that is no fair race (flap.same_calibration is).  All are evaluated
at 128 tokens.  The printed numbers come from the released arithmetic, `reference=True`, which knows no grouped queries;
"FLAP (formula)" is the method as the paper writes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

from experiments import models, protocols
from experiments.labels import setting
from experiments.papers import llm_pruner
from experiments.papers.dense import with_dense
from experiments.spec import Efficiency, Run, Table, Windows
from pruners import Flap, LLMPruner, MagnitudeSP, WandaSP
from pruners.interface.suggest import UsageError

MODELS = ("llama-7b", "llama-13b", "llama-30b", "llama-65b")
RATIOS = (0.2, 0.3, 0.5)
WIKITEXT = Windows("wikitext2/train", count=1024, length=128, sampling="stream")
C4 = Windows("c4/train", count=128, length=128)
C4_STREAM = replace(WIKITEXT, corpus="c4/train")
PPL = protocols.perplexity("flap")
METRICS = ("WIFV", "IFV", "WIFN")
STRUCTURES = {"UL-UM": None, "UL-MM": 384, "AL-MM": 380, "AL-AM": None}  # heads that the script removes of LLaMA-7B's
HEADS = 1024
LARGEST = 14e9  # parameters of the models that LLM-Pruner's own tables have, 7B and 13B

flap = partial(Flap, reference=True)
QUOTED = ("Element^1 (Block)", "Element^1 (Block)" + llm_pruner.TUNED)  # rows of LLM-Pruner's tables
METHODS: tuple[Callable[..., Any] | str | None, ...] = (None, MagnitudeSP, WandaSP, *QUOTED, flap, Flap)
WORDS = {type(None): "Dense", MagnitudeSP: "Magnitude-sp", WandaSP: "Wanda-sp", Flap: "FLAP", LLMPruner: "LLM-Pruner"}


def label(run: Run) -> tuple[str, str]:
    formula = " (formula)" if isinstance(run.method, Flap) and not run.method.reference else ""
    share = llm_pruner.label(run)[1] if isinstance(run.method, LLMPruner) else setting(run.method)
    return WORDS[type(run.method)] + formula, share


def pruned(method: Any, model: str, ratio: float, measures: tuple[Any, ...] = PPL) -> Run | None:
    """LLM-Pruner as its own tables have it, which know two sizes of models and two shares of FLAP's."""
    if isinstance(method, str):
        known = ratio in llm_pruner.RATIOS and protocols.parameters(model) < LARGEST
        return llm_pruner.pruned(method, model, ratio, measures) if known else None
    made = method and method(ratio)
    return Run(model, made, C4 if isinstance(made, WandaSP) else WIKITEXT, measures, "float16")


def heads_removed(structure: str, model: str) -> int | None:
    """The share of the model's own heads that the script removes of LLaMA-7B's, as many in every block for UL."""
    removed = STRUCTURES[structure]
    if removed is None:
        return None
    found = models.find(model)
    if found.blocks is None or found.heads is None:
        raise UsageError(
            f"The number of heads of {model} is unknown, so the number that {structure} removes is as well."
        )
    parts = found.blocks if structure.startswith("UL") else 1
    return parts * round(removed / HEADS * found.blocks * found.heads / parts)


perplexity = Table(
    name="flap.perplexity",
    title="WikiText-2 perplexity without retraining (table 1)",
    rows=METHODS,
    columns=tuple(product(MODELS, RATIOS)),
    run=pruned,
    published="flap: table 1",
    label=label,
)

zero_shot = Table(
    name="flap.zero_shot",
    title="Accuracy on seven tasks (table 2)",
    rows=METHODS,
    columns=tuple(product(MODELS[:1], (0.2, 0.5))),
    run=partial(pruned, measures=(protocols.zero_shot("flap"),)),
    published="flap: table 2",
    label=label,
)

structures = Table(
    name="flap.structures",
    title="Metric and structure at 50 % (table 3)",
    rows=METRICS,
    columns=tuple(product(MODELS[:1], STRUCTURES)),
    run=lambda metric, model, structure: pruned(
        partial(flap, metric=metric, structure=structure, heads_removed=heads_removed(structure, model)), model, 0.5
    ),
    label=lambda run: (f"{run.method.metric} {run.method.structure}", setting(run.method)),
)
structures = with_dense(structures)

speed = Table(
    name="flap.speed",
    title="Parameters and decoding speed (table 4)",
    rows=METHODS,
    columns=tuple(product(MODELS[:1], (0.2, 0.5))),
    run=partial(pruned, measures=(Efficiency((), ()), Efficiency(lengths=(128,), new_tokens=128))),
    published="flap: table 4",
    label=label,
)

bias_compensation = Table(
    name="flap.bias_compensation",
    title="With and without bias compensation",
    rows=(True, False),
    columns=tuple(product(MODELS[:1], RATIOS)),
    run=lambda bias, model, ratio: pruned(partial(flap, bias=bias), model, ratio),
    label=lambda run: ("FLAP" if run.method.bias else "FLAP without bias", setting(run.method)),
)
bias_compensation = with_dense(bias_compensation)

calibration_size = Table(
    name="flap.calibration_size",
    title="Number of calibration windows",
    rows=(16, 64, 256, 1024, 2048),
    columns=tuple(product(MODELS[:1], (0.2, 0.5))),
    run=lambda count, model, ratio: Run(
        model, flap(ratio), Windows("wikitext2/train", count, 128, sampling="stream"), PPL, "float16"
    ),
    label=lambda run: ("FLAP", f"{setting(run.method)}, {run.windows.count if run.windows else 0} samples"),
)
calibration_size = with_dense(calibration_size)

same_calibration = Table(
    name="flap.same_calibration",
    title="All methods calibrated on the same 1,024 windows of WikiText-2",
    rows=METHODS,
    columns=tuple(product(MODELS[:1], RATIOS)),
    run=lambda method, model, ratio: (run := pruned(method, model, ratio)) and replace(run, windows=WIKITEXT),
    label=label,
)

vicuna = Table(
    name="flap.vicuna",
    title="Vicuna-7B, WikiText-2 perplexity without retraining",
    rows=METHODS,
    columns=tuple(product(("vicuna-7b",), RATIOS)),
    run=pruned,
    label=label,
)

on_c4 = Table(
    name="flap.c4",
    title="FLAP calibrated on C4 (as the name of the authors' checkpoint says) and on WikiText-2",
    rows=(C4_STREAM, WIKITEXT),
    columns=tuple(product(MODELS[:2], RATIOS)),
    run=lambda windows, model, ratio: Run(model, flap(ratio), windows, PPL, "float16"),
    label=lambda run: (f"FLAP on {run.windows.corpus}" if run.windows else "FLAP", setting(run.method)),
)
on_c4 = with_dense(on_c4)
