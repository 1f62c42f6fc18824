"""What the papers measure, by name: perplexity over which tokens, accuracy on which tasks.

The same model has other numbers under another protocol (dense LLaMA-7B: a perplexity of 12.62 at 128 tokens and of
5.68 at 2,048; a mean accuracy of 63.25 or of 59.99), so every number carries its protocol key.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.spec import Perplexity
from pruners.suggest import unknown

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


@dataclass(frozen=True)
class Convention:
    """Zero-shot tasks, each with the metric that enters the unweighted mean.

    `large_limit`: how many documents of a task models of 65B and more are asked, None for all.
    """

    metrics: dict[str, str]
    large_limit: int | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.metrics)


def _metrics(tasks: str, normalised: str = "") -> dict[str, str]:
    return {task: "acc_norm" if task in normalised.split() else "acc" for task in tasks.split()}


# LLM-Pruner's harness of 2023 put no BOS before a prompt and tokenised prompt and answer apart.  lm-eval has changed
# both since, so its accuracies are not met to the digit, ARC-e least of all.
_SEVEN = _metrics(
    "boolq piqa hellaswag winogrande arc_easy arc_challenge openbookqa", normalised="hellaswag arc_challenge openbookqa"
)
_WITH_RTE = _metrics("boolq rte hellaswag winogrande arc_easy arc_challenge openbookqa")
CONVENTIONS = {
    "llm_pruner": Convention(_SEVEN),
    "flap": Convention(_SEVEN),
    "wanda": Convention(_WITH_RTE, large_limit=2000),
    "perp": Convention(_WITH_RTE, large_limit=2000),
    # acc_norm is inferred: dense LLaMA-7B's published mean is 67.47, and plain acc on these six tasks gives 63.01
    "gblm": Convention(
        _metrics("boolq rte hellaswag winogrande arc_easy openbookqa", normalised="hellaswag arc_easy openbookqa")
    ),
}


def perplexity(name: str, positions: int | None = None) -> tuple[Perplexity, ...]:
    """The perplexities of the paper `name`, for a model that takes `positions` tokens.

    Raises ValueError for an unknown protocol, one that needs the model's positions and was not given them, and one
    whose windows are longer than the model takes.
    """
    if name not in PERPLEXITIES:
        raise ValueError(unknown("perplexity protocol", name, PERPLEXITIES))
    rows = PERPLEXITIES[name]
    return tuple(Perplexity(corpus, window or _own_length(name, positions), limit) for corpus, window, limit in rows)


def zero_shot(name: str) -> Convention:
    """The zero-shot convention of the paper `name`; ValueError with the nearest names for an unknown one."""
    if name not in CONVENTIONS:
        raise ValueError(unknown("zero-shot convention", name, CONVENTIONS))
    return CONVENTIONS[name]


def _own_length(name: str, positions: int | None) -> int:
    if positions is None:
        raise ValueError(f"The protocol {name} reads windows as long as the model takes; give the model's positions.")
    return min(positions, LONGEST_WINDOW)
