"""Defaults of `experiments prune MODEL --method NAME`, taken from the papers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

from experiments import models, protocols
from experiments.papers import flap, gblm, llm_pruner, perp
from experiments.spec import Perplexity, Windows
from pruners import LLMPruner
from pruners.retrain import LoRA, LoRAPrune, MaskLoRA, Reconstruction, ScaleLoRA, Trainable

LONGEST = gblm.WINDOWS.length  # that of Wanda, SparseGPT and GBLM-Pruner on the models of their first versions
WINDOWS = {"flap": flap.WIKITEXT, "wanda_sp": flap.C4, "magnitude_sp": flap.C4, "llm_pruner": llm_pruner.WINDOWS}
DEEP = 7  # blocks of which LLM-Pruner spares six
TRAINABLE = {
    "full": Trainable.full(),
    "weights": Trainable(weights=True),
    "biases": Trainable(biases=True),
    "norms": Trainable(norms=True),
    "biases+norms": perp.SMALL,
    "head": Trainable(head=True),
    "lora": Trainable(adapters=LoRA(merge=True)),
    "loraprune": Trainable(biases=True, norms=True, adapters=LoRAPrune(rank=16)),
    "scalelora": Trainable(biases=True, norms=True, adapters=ScaleLoRA(rank=16)),
    "masklora": Trainable(biases=True, norms=True, adapters=MaskLoRA(rank=16)),
}


def trainable(kind: type[Any]) -> dict[str, Trainable]:
    """By name what this kind of recovery can train: decoder blocks hold no head and no embeddings."""
    rebuilds = kind is Reconstruction
    return {name: what for name, what in TRAINABLE.items() if not (rebuilds and (what.head or what.embeddings))}


def windows(method: str, model: str) -> Windows:
    """The calibration of the method's own paper, in windows that the model takes; for a new method Wanda's."""
    found = WINDOWS.get(method, gblm.WINDOWS)
    return Windows(found.corpus, found.count, min(found.length, length(model)), found.seed, found.sampling)


def length(model: str) -> int:
    """Tokens of a window: 2,048, or as many as the model takes."""
    return min(models.positions(model), LONGEST)


def measures(model: str, keys: Sequence[str], tasks: Sequence[str], limit: int | None) -> tuple[Any, ...]:
    """Perplexities by their protocol keys (none: WikiText-2's test split), and zero-shot tasks where any are asked."""
    kept: list[Any] = [Perplexity.of(key) for key in keys] or [Perplexity("wikitext2/test", length(model))]
    if tasks:
        asked = protocols.named(tasks, models.find(model).parameters or 0)
        kept.append(replace(asked, limit=limit) if limit else asked)
    return tuple(dict.fromkeys(kept))


def seed(kind: type[Any], value: int) -> dict[str, int]:
    """As a hyperparameter of the class, if it draws."""
    return {"seed": value} if any(f.name == "seed" for f in fields(kind)) else {}


def hyperparameters(method: str, model: str) -> dict[str, Any]:
    """Where the class's own default belongs to the depth of one model: LLM-Pruner spares blocks from both ends, the
    first four and the last two, where there are DEEP or more."""
    if method != "llm_pruner":
        return {}
    spared = (4, 2) if llm_pruner.depth(model) >= DEEP else (0, 0)  # of few blocks none would be left
    made: LLMPruner = llm_pruner.sparing(*spared, model, ratio=0.2)
    return {"attention_blocks": made.attention_blocks, "mlp_blocks": made.mlp_blocks}
