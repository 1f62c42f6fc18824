"""Refuses texts that a cell cannot read, by configurations alone: before anything is loaded or measured."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from experiments import models
from experiments.labels import WRITTEN
from experiments.rates import RateGrid
from experiments.recovery import Documents, Retraining
from experiments.spec import Efficiency, Perplexity, Run, Windows
from pruners.interface.suggest import UsageError


def check(*runs: Run) -> None:
    """UsageError for windows that are longer than the context length (some families have none, such as BLOOM), and for
    a corpus that the dense model writes as calibration text where another text is read."""
    rooms = {model: _rooms(model) for model in {run.model for run in runs}}
    for run in runs:
        for what, corpus, length in _read(run):
            if corpus in WRITTEN:
                raise UsageError(
                    f"{what} cannot be: the dense model writes {corpus}, which is calibration text alone; name "
                    "another corpus."
                )
            room = rooms[run.model][what.partition(" ")[0]]
            if length > room:
                raise UsageError(
                    f"{what} takes {length:,} tokens at once, and the context length of {run.model_name} is {room:,}; "
                    "use shorter windows."
                )


def _rooms(model: str) -> Mapping[str, float]:
    """Tokens of a sequence, by the first word of what reads it."""
    try:
        config: Any = models.without_weights(model).config
    except ValueError:  # which says why where the model is loaded
        config = None
    longest = getattr(config, "max_position_embeddings", None)
    rooms: dict[str, float] = defaultdict(lambda: longest or math.inf)
    rooms["Perplexity"] -= len(getattr(config, "text_prefix", ()))  # other windows begin with these marks
    rooms["Calibration"] = longest or getattr(config, "max_seq_len", None) or math.inf  # MPT's
    return rooms


def _read(run: Run) -> Iterator[tuple[str, str, int]]:
    """What is read, from which corpus where it has to be one of texts, and how many tokens stand in a sequence."""
    if run.windows and run.calibrates:
        yield f"Calibration on {run.windows.corpus}", "", run.windows.length
    if isinstance(run.recovery, Retraining):
        for text in (run.recovery.text, run.recovery.held_out):
            if isinstance(text, Windows | Documents):
                yield f"Retraining on {text.corpus}", text.corpus, text.length
    for measure in run.measures:
        if isinstance(measure, Perplexity):
            yield f"Perplexity {measure.key}", measure.corpus, measure.window
        elif isinstance(measure, RateGrid):
            yield f"The {measure.key} on {measure.text.corpus}", measure.text.corpus, measure.text.length
        elif isinstance(measure, Efficiency) and measure.batch_sizes and measure.lengths:
            yield f"The measure {measure.key}", "", max(measure.lengths) + measure.new_tokens
