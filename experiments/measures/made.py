"""Measures that need more than the finished model: something of the dense one, or the cost of making the cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments import provenance
from experiments.measures import Subject
from experiments.measures.asked import DenseAnswers, MaskSample
from experiments.recovery import Retraining
from experiments.spec import Run
from pruners.run.ranks import Ranks
from pruners.structured import Structured

BESIDE_DENSE = (DenseAnswers, MaskSample)  # they need something of the model before it is pruned


def check(run: Run) -> None:
    """ValueError for a cell whose finished model does not tell what pruning has kept."""
    key = next((what.key for what in run.measures if isinstance(what, MaskSample)), None)
    if key is None:
        return
    after = "retraining" if isinstance(run.recovery, Retraining) else "LLM.int8" if run.quantised else ""
    if after:
        raise ValueError(f"{key} is of what pruning keeps, and {after} changes weights; measure the cell without it.")
    if getattr(run.method, "granularity", None) == "channel":
        raise ValueError(
            f"{key} knows units by their weights, and granularity='channel' shortens every row; leave the measure out."
        )


def agree(subject: Subject, together: Ranks) -> None:
    """ValueError unless every rank is about to measure the same model."""
    if together.count > 1:
        from eval.scorer import fingerprint

        together.agree(fingerprint(subject.model))


def before(what: DenseAnswers | MaskSample, subject: Subject, method: Any) -> Any:
    """What a measure needs of the dense model, which the model still is: its greedy answers, or where `method` cuts
    units out, what these are known by."""
    if isinstance(what, DenseAnswers):
        return _said(what, subject)
    from eval.mask_sample import rows

    return rows(subject.model) if isinstance(method, Structured) else None


def beside_dense(what: DenseAnswers | MaskSample, subject: Subject, dense: Any) -> dict[str, Any]:
    """The agreement with what the dense model said, or what is kept of it."""
    if isinstance(what, DenseAnswers):
        from eval.greedy import agreement

        return agreement(dense, _said(what, subject)).to_dict()
    from eval.mask_sample import mask_sample

    return mask_sample(subject.model, what.count, dense)


def _said(what: DenseAnswers, subject: Subject) -> list[list[int]]:
    from eval.greedy import greedy

    return greedy(subject.model, subject.tokenizer.inner, new_tokens=what.new_tokens)


def costs(stages: provenance.Stages, subject: Subject, recovery: Mapping[str, Any]) -> dict[str, Any]:
    """So far, with what retraining achieved if there was any; a stage that another process did in part counts whole."""
    found: dict[str, Any] = {"peak_bytes": provenance.peak_bytes(subject.model.device)}
    if "prune" in stages.seconds:
        found["pruning_s"] = stages.seconds["prune"]
    if recovery:
        pace = recovery["tokens"] / recovery["seconds"]
        found |= {"training_tokens_per_second": pace, "trained": recovery["trained"], "share": recovery["share"]}
    return found
