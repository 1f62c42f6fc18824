"""What the papers measure, by name: perplexity over which tokens, accuracy on which tasks.

The same model has other numbers under another protocol (dense LLaMA-7B: a perplexity of 12.62 at 128 tokens and of
5.68 at 2,048; a mean accuracy of 63.25 or of 59.99), so every number carries its protocol key.
"""

from __future__ import annotations

from collections.abc import Sequence

from experiments import models
from experiments.spec import Perplexity, ZeroShot
from pruners.interface.suggest import UsageError, unknown

Metrics = tuple[tuple[str, str], ...]
LONGEST_WINDOW = 4096
OWN_LENGTH = None  # as long as the model takes, LONGEST_WINDOW at most

PERPLEXITIES: dict[str, tuple[tuple[str, int | None, int | None], ...]] = {  # corpus, window, windows kept
    "llm_pruner": (("wikitext2/test", 128, None), ("ptb/validation", 128, None)),
    "flap": (("wikitext2/test", 128, None),),
    "gblm": (("wikitext2/test", 2048, None),),
    "wanda": (("wikitext2/test", OWN_LENGTH, None),),
    "perp": (("wikitext2/test", OWN_LENGTH, None),),
    "sparsegpt": (("wikitext2/test", 2048, None), ("ptb/test", 2048, None), ("c4/validation", 2048, 256)),
}


def _metrics(tasks: str, normalised: str = "") -> Metrics:
    return tuple((task, "acc_norm" if task in normalised.split() else "acc") for task in tasks.split())


# LLM-Pruner's harness of 2023 put no BOS before a prompt and tokenised prompt and answer apart.  lm-eval has changed
# both since, so its accuracies are not met to the digit, ARC-e least of all.
_SEVEN = _metrics(
    "boolq piqa hellaswag winogrande arc_easy arc_challenge openbookqa", normalised="hellaswag arc_challenge openbookqa"
)
_WITH_RTE = _metrics("boolq rte hellaswag winogrande arc_easy arc_challenge openbookqa")
TASK_SETS = {
    "llm_pruner": _SEVEN,
    "llm_pruner_chatglm": _SEVEN[1:],  # without BoolQ
    "flap": _SEVEN,
    "wanda": _WITH_RTE,
    "perp": _WITH_RTE,
    # acc_norm is inferred: dense LLaMA-7B's published mean is 67.47, and plain acc on these six tasks gives 63.01
    "gblm": _metrics("boolq rte hellaswag winogrande arc_easy openbookqa", normalised="hellaswag arc_easy openbookqa"),
}
LARGE_PARAMETERS = 60e9
LARGE_LIMITS = {"wanda": 2000, "perp": 2000}  # documents of a task that 65B and 70B models are asked


def perplexity(name: str, positions: int | None = None) -> tuple[Perplexity, ...]:
    """The perplexities of the paper `name`, for a model that takes `positions` tokens.

    Wanda's code takes windows as long as the model does and only PERP's ends at LONGEST_WINDOW; here both do, as
    windows of the 131,072 tokens of Llama-3.1 fit neither documents nor memory, and none of Wanda's own models is so
    long.
    Raises ValueError for an unknown protocol and for one that needs the model's positions and was not given them.
    """
    if name not in PERPLEXITIES:
        raise ValueError(unknown("perplexity protocol", name, PERPLEXITIES))
    rows = PERPLEXITIES[name]
    return tuple(Perplexity(corpus, window or _own_length(name, positions), limit) for corpus, window, limit in rows)


def zero_shot(name: str, limit: int | None = None, parameters: int = 0, released_marks: bool = False) -> ZeroShot:
    """The zero-shot tasks of the paper `name`, with the metrics that enter its mean.

    `limit` keeps the first so many documents of each task; without one, models of 60e9 `parameters` and more are asked
    as many as the paper asked them (the released codes go by names, `65b` and `70b`, and ask OPT-66B everything).
    `released_marks` is ZeroShot's.  Raises ValueError with the nearest names for an
    unknown task set.
    """
    if name not in TASK_SETS:
        raise ValueError(unknown("task set", name, TASK_SETS))
    if limit is None and parameters >= LARGE_PARAMETERS:
        limit = LARGE_LIMITS.get(name)
    return ZeroShot(name, TASK_SETS[name], limit, released_marks=released_marks)


def tasks(*names: str, limit: int | None = None, examples: int = 0) -> ZeroShot:
    """Any of lm-eval's tasks by name, accuracy shown, without a mean; `examples` stand in the prompt."""
    return ZeroShot(None, tuple((name, "acc") for name in names), limit, examples=examples)


def named(names: Sequence[str], parameters: int = 0) -> ZeroShot:
    """What a command line means by them: one task set, or tasks of lm-eval.

    UsageError for a task set beside anything else, which would leave open whose mean is meant, and for a task twice.
    """
    if (sets := [name for name in names if name in TASK_SETS]) and len(names) > 1:
        raise UsageError(
            f"{sets[0]} of {', '.join(names)} is a task set with its own mean; name it alone, or single tasks "
            f"by name ({' '.join(task for task, _ in TASK_SETS[sets[0]])})."
        )
    if twice := [name for name in dict.fromkeys(names) if list(names).count(name) > 1]:
        raise UsageError(f"{', '.join(twice)} is named more than once; name each task once.")
    return zero_shot(names[0], None, parameters) if len(names) == 1 and names[0] in TASK_SETS else tasks(*names)


def length(model: str) -> int:
    """Tokens of a window as long as the model takes, LONGEST_WINDOW at most; UsageError where it does not tell."""
    return min(models.positions(model), LONGEST_WINDOW)


def parameters(model: str) -> int:
    """UsageError for a model of which nobody knows them."""
    if (known := models.find(model).parameters) is None:
        raise UsageError(
            f"The number of parameters of {model} is unknown, so the number of documents to evaluate is as well."
        )
    return known


def _own_length(name: str, positions: int | None) -> int:
    if positions is None:
        raise ValueError(f"The protocol {name} uses windows of the model's context length; give its positions.")
    return min(positions, LONGEST_WINDOW)
