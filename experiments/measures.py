"""What is measured on a model: one function per measure class, each giving values by protocol key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.perplexity import perplexity

from experiments import corpora
from experiments.spec import Perplexity

Progress = Callable[[int, int], None]
WHOLE_TEST_SET_TOKENS = 300_000


@dataclass(frozen=True)
class Subject:
    """The model under measurement and how to run it; nothing here moves a number."""

    model: Any
    tokenizer: Any
    batch_size: int
    data_dir: Path | None


def measure(what: Any, subject: Subject, progress: Progress | None = None) -> dict[str, dict[str, Any]]:
    """Values by protocol key, plain JSON; TypeError for a measure nobody knows."""
    try:
        function = FUNCTIONS[type(what)]
    except KeyError:
        raise TypeError(f"{what!r} is no measure; known are {[kind.__name__ for kind in FUNCTIONS]}.") from None
    return function(what, subject, progress)


def work_tokens(what: Any) -> int:
    """Roughly how many tokens go through the model, for estimates of the time left."""
    window, limit = getattr(what, "window", None), getattr(what, "limit", None)
    return window * limit if window and limit else WHOLE_TEST_SET_TOKENS


def corpora_of(what: Any) -> list[str]:
    """The corpora that a measure reads, by name."""
    return [what.corpus] if hasattr(what, "corpus") else []


def _perplexity(what: Perplexity, subject: Subject, progress: Progress | None) -> dict[str, dict[str, Any]]:
    tokens = corpora.token_ids(what.corpus, subject.tokenizer, subject.data_dir)
    if what.limit:
        tokens = _head(tokens, what)
    result = perplexity(subject.model, tokens, what.window, batch_size=subject.batch_size, progress=progress)
    return {
        what.key: {
            "perplexity": float(result.perplexity),
            "standard_error": float(result.standard_error),
            "windows": int(result.windows),
            "tokens": int(result.tokens),
            "token_sha256": result.token_sha256,
            "nll_per_window": [float(value) for value in result.nll_per_window],
        }
    }


def _head(tokens: Any, what: Perplexity) -> Any:
    assert what.limit is not None
    wanted = what.limit * what.window
    if len(tokens) < wanted:
        raise ValueError(
            f"{what.key} asks for {wanted:,} tokens and {what.corpus} has {len(tokens):,}; ask for at most "
            f"{len(tokens) // what.window} windows."
        )
    return tokens[:wanted]


FUNCTIONS: dict[type, Callable[[Any, Subject, Progress | None], dict[str, dict[str, Any]]]] = {Perplexity: _perplexity}
