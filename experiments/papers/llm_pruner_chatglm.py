"""LLM-Pruner's ChatGLM-6B (table 5).

    python -m experiments show llm_pruner.chatglm_6b

The released helper prunes MLPs alone: by the rows of dense_h_to_4h for Taylor scores, by the mean over both matrices
for L2.  It names no blocks, so all are pruned here; rows that prune heads as well are this project's, not the paper's.
"""

from __future__ import annotations

from typing import Any

from experiments import models, protocols
from experiments.papers.llm_pruner import METHODS, TUNED, WINDOWS, depth
from experiments.recovery import POST_TRAINING
from experiments.spec import Run, Table, Windows
from pruners import LLMPruner

HEADS_TOO = ", heads too"
OF_CHATGLM: dict[str, dict[str, Any]] = {
    "L2": METHODS["L2"],
    "Random": METHODS["Random"],
    "Vector": {"importance": "vector", "reduction": "first"},
    "Element^1": {"importance": "element1", "reduction": "first"},
    "L2" + HEADS_TOO: METHODS["L2"],
    "Vector" + HEADS_TOO: {"importance": "vector"},
    "Element^1" + HEADS_TOO: {"importance": "element1"},
}
DIALOGUES = Windows("dailydialog/train", count=10, length=128, sampling="dialogues")  # the paper names no length


def at_10(name: str, model: str) -> Run:
    """LLM-Pruner's table 5; a model that needs no marks is calibrated and asked as in the other tables."""
    found, how = models.find(model), OF_CHATGLM.get(name.removesuffix(TUNED))
    measures = (protocols.zero_shot("llm_pruner_chatglm", released_marks=found.marks),)
    windows, blocks = DIALOGUES if found.marks else WINDOWS, (0, depth(model))
    heads = blocks if name.endswith(HEADS_TOO) else (0, 0)
    made = how and LLMPruner(target_parameters=0.1, target_of="model", attention_blocks=heads, mlp_blocks=blocks, **how)
    return Run(model, made, windows, measures, "float16", POST_TRAINING if name.endswith(TUNED) else None)


def label_at_10(run: Run) -> tuple[str, str]:
    if run.method is None:
        return "Dense", ""
    name = {"l2": "L2", "random": "Random", "vector": "Vector", "element1": "Element^1"}[run.method.importance]
    heads = HEADS_TOO if any(run.method.attention_blocks) else ""
    return name + heads, f"10 %{TUNED if run.recovery else ''}"


chatglm_6b = Table(
    name="llm_pruner.chatglm_6b",
    title="ChatGLM-6B at 10 % (table 5): MLPs as in the released code; heads, which it does not prune, are ours",
    rows=("Dense", *OF_CHATGLM, "Vector" + TUNED),
    columns=(("chatglm-6b",),),
    run=at_10,
    published="llm_pruner: table 5",
    label=label_at_10,
)
