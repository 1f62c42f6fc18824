"""What each hyperparameter means, in the words of `experiments prune --help METHOD`."""

from __future__ import annotations

from typing import Any

from experiments.recovery import Retraining
from pruners import LLMPruner
from pruners.flap import METRICS, STRUCTURES, Flap
from pruners.llm_pruner import IMPORTANCES, REDUCTIONS
from pruners.retrain import Reconstruction
from pruners.retrain.units import GRANULARITIES
from pruners.select import GROUPS
from pruners.sparsegpt import COSTS, SparseGPT

MEANINGS = {
    "sparsity": "share of weights removed from each matrix, in [0, 1)",
    "pattern": "n:m keeps n of every m consecutive inputs of a row",
    "group": f"weights that compete with each other: {GROUPS}",
    "block_size": "columns that are pruned before the others are updated",
    "damping": "added to the Hessian's diagonal, as a share of its mean",
    "update": "update the weights that stay",
    "norm": "how gradients are summed over the windows: l1 or l2",
    "alpha": "factor of the gradient term",
    "ratio": "share removed, in [0, 1), as the method's paper counts it",
    "target_parameters": "share of parameters removed, in [0, 1), in place of the ratio",
    "target_of": "parameters that target-parameters is a share of: decoder (blocks) or model",
    "round_to": "keep a multiple of so many channels in each block",
    "structure": f"what is ranked together, attention first: {', '.join(STRUCTURES)} (see above)",
    "heads_removed": "query heads removed from the whole model, with the structures that end in MM",
    "bias": "compensate for what is removed by a bias",
    "importance": f"score of a group: {', '.join(IMPORTANCES)}",
    "reduction": f"how scores of a group's matrices are combined: {', '.join(REDUCTIONS)}",
    "granularity": "what is removed: block (heads and channels in blocks), channel (of the residual stream) or layer",
    "attention_blocks": "blocks whose heads are pruned: the first, and the one after the last; unless given all but "
    "the first four and the last two, or all of fewer than seven",
    "mlp_blocks": "blocks whose MLP channels are pruned, likewise",
    "scope": "local: the ratio in each block; global: all blocks ranked together",
    "steps": "steps of the optimizer",
    "learning_rate": "highest learning rate, after the warm-up",
    "batch_size": "examples in a step",
    "warmup": "share of the steps, or from 1 on their number, in which the learning rate rises",
    "micro_batch_size": "examples in a forward pass (None: all of a step)",
    "check_every": "steps between two losses on the text of --held-out",
    "stop": "stop the schedule after so many steps (None: after all)",
    "reference": "the released code's arithmetic where it differs",
}
OF_ONE = {
    (SparseGPT, "metric"): f"cost of removing a weight: {', '.join(COSTS)}",
    (SparseGPT, "group"): f"choose the mask at once, among {GROUPS} (None: along the way, in blocks of columns)",
    (Flap, "metric"): f"score of a channel: {', '.join(METRICS)}",
    (LLMPruner, "score_dtype"): "dtype of weights and gradients while groups are scored: float32 (None: the model's)",
    (LLMPruner, "steps"): "equal steps in which the ratio is reached",
    (Reconstruction, "steps"): "steps of the optimizer for each block",
    (Reconstruction, "batch_size"): "windows in a step",
    (Reconstruction, "granularity"): f"what is trained at once: {', '.join(GRANULARITIES)}",
    (Reconstruction, "inputs"): "whose hidden states it gets: those of the model pruned so far, or of the dense one",
}
ABOUT: dict[type[Any], str] = {
    Retraining: "Retrains WHAT after pruning, on the calibration corpus, by AdamW with a linear warm-up and decay.",
    Reconstruction: "Trains WHAT in each block, so that its outputs come back to the dense block's.",
}


def of(kind: type[Any], name: str) -> str:
    """Empty for a hyperparameter of a method of one's own."""
    return OF_ONE.get((kind, name)) or MEANINGS.get(name, "")
