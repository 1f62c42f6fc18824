"""Measures that need more than the finished model: the dense model's answers, and the cost of making the cell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from experiments import provenance
from experiments.measures import Subject
from experiments.measures.asked import DenseAnswers
from pruners.run.ranks import Ranks


def agree(subject: Subject, together: Ranks) -> None:
    """ValueError unless every rank is about to measure the same model."""
    if together.count > 1:
        from eval.scorer import fingerprint

        together.agree(fingerprint(subject.model))


def said(what: DenseAnswers, subject: Subject) -> list[list[int]]:
    """The greedy answers of the model as it is now."""
    from eval.greedy import greedy

    return greedy(subject.model, subject.tokenizer.inner, new_tokens=what.new_tokens)


def as_dense(what: DenseAnswers, subject: Subject, dense: list[list[int]]) -> dict[str, Any]:
    """The agreement with what the dense model said."""
    from eval.greedy import agreement

    return agreement(dense, said(what, subject)).to_dict()


def costs(stages: provenance.Stages, subject: Subject, recovery: Mapping[str, Any]) -> dict[str, Any]:
    """So far, with what retraining achieved if there was any; a stage that another process did in part counts whole."""
    found: dict[str, Any] = {"peak_bytes": provenance.peak_bytes(subject.model.device)}
    if "prune" in stages.seconds:
        found["pruning_s"] = stages.seconds["prune"]
    if recovery:
        pace = recovery["tokens"] / recovery["seconds"]
        found |= {"training_tokens_per_second": pace, "trained": recovery["trained"], "share": recovery["share"]}
    return found
