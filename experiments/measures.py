"""What is measured on a model: one function per measure class, each giving values by protocol key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.perplexity import perplexity
from experiments import tokens
from experiments.spec import Perplexity
from experiments.tokens import Tokenizer

Progress = Callable[[int, int], None]
WHOLE_TEST_SET_TOKENS = 300_000


@dataclass(frozen=True)
class Subject:
    """The model under measurement and how to run it; nothing here moves a number."""

    model: Any
    tokenizer: Tokenizer
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
    stream = tokens.stream(what.corpus, subject.tokenizer, subject.data_dir)
    if what.limit:
        stream = _head(stream, what)
    result = perplexity(subject.model, stream, what.window, batch_size=subject.batch_size, progress=progress)
    return {
        what.key: {
            "perplexity": result.perplexity,
            "standard_error": result.standard_error,
            "windows": result.windows,
            "tokens": result.tokens,
            "token_sha256": result.token_sha256,
            "nll_per_window": list(result.nll_per_window),
        }
    }


def _head(stream: Tensor, what: Perplexity) -> Tensor:
    assert what.limit is not None
    wanted = what.limit * what.window
    if len(stream) < wanted:
        raise ValueError(
            f"{what.key} asks for {wanted:,} tokens and {what.corpus} has {len(stream):,}; ask for at most "
            f"{len(stream) // what.window} windows."
        )
    return stream[:wanted]


FUNCTIONS: dict[type, Callable[[Any, Subject, Progress | None], dict[str, dict[str, Any]]]] = {Perplexity: _perplexity}
