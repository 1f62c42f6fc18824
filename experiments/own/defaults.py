"""What a bare `experiments prune MODEL --method NAME` takes over from the papers."""

from __future__ import annotations

from typing import Any

from experiments import models
from experiments.papers import flap, gblm, llm_pruner, perp
from experiments.spec import Perplexity, Windows
from pruners import LLMPruner
from pruners.retrain import LoRA, LoRAPrune, MaskLoRA, ScaleLoRA, Trainable

LONGEST = gblm.WINDOWS.length  # that of Wanda, SparseGPT and GBLM-Pruner on the models of their first versions
WINDOWS = {"flap": flap.WIKITEXT, "wanda_sp": flap.C4, "magnitude_sp": flap.C4, "llm_pruner": llm_pruner.WINDOWS}
TRAINABLE = {
    "full": Trainable.full(),
    "biases": Trainable(biases=True),
    "norms": Trainable(norms=True),
    "biases+norms": perp.SMALL,
    "head": Trainable(head=True),
    "lora": Trainable(adapters=LoRA(merge=True)),
    "loraprune": Trainable(biases=True, norms=True, adapters=LoRAPrune(rank=16)),
    "scalelora": Trainable(biases=True, norms=True, adapters=ScaleLoRA(rank=16)),
    "masklora": Trainable(biases=True, norms=True, adapters=MaskLoRA(rank=16)),
}


def windows(method: str, model: str) -> Windows:
    """The calibration of the method's own paper, in windows that the model takes; for a new method Wanda's."""
    found = WINDOWS.get(method, gblm.WINDOWS)
    return Windows(found.corpus, found.count, min(found.length, length(model)), found.seed, found.sampling)


def length(model: str) -> int:
    """Tokens of a window: 2,048, or as many as the model takes."""
    return min(models.positions(model), LONGEST)


def measure(model: str) -> Perplexity:
    return Perplexity("wikitext2/test", length(model))


def dtype(model: str) -> str:
    """The model's own number format."""
    return models.own_dtype(model)


def hyperparameters(method: str, model: str) -> dict[str, Any]:
    """Where the class's own default belongs to the depth of one model: LLM-Pruner spares blocks from both ends."""
    if method != "llm_pruner":
        return {}
    made: LLMPruner = llm_pruner.sparing(4, 2, model, ratio=0.2)
    return {"attention_blocks": made.attention_blocks, "mlp_blocks": made.mlp_blocks}
