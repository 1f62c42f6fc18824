"""Measures a cell's model, and before pruning the dense one, which must reach its published perplexity."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from eval.perplexity import token_sha256
from experiments import measures, models, provenance
from experiments.data import corpora, tokens
from experiments.measures import dense_gate, made
from experiments.measures.asked import Costs
from experiments.measures.zero_shot import Values
from experiments.run.session import Session
from experiments.spec import Perplexity
from experiments.store import code
from experiments.store.described import describe


def pass_dense_gate(session: Session) -> dict[str, Any]:
    """By protocol key what the dense model met; empty where nothing is published for it."""
    run, settings = session.run, session.settings
    model = models.find(run.model)
    asked = dense_gate.asked(run.measures, model)
    if not settings.dense_gate:
        return {what.key: {"skipped": "--no-dense-gate"} for what in asked}
    for what in asked:
        if what not in run.measures:
            dense_gate.check_readable(what, model, partial(corpora.provenance, what.corpus, settings.data_dir))
    with session.stages("dense gate"):
        return {what.key: dense_gate.check(what, model, _dense(what, session)) for what in asked}


def _dense(what: Perplexity, session: Session) -> Values:
    """The dense model's values, from the cache or measured on the model, which is not pruned yet."""
    subject, settings = session.subject, session.settings
    key = {
        "model": subject.identity,
        "dtype": session.run.dtype,
        "device": provenance.device_name(subject.model.device),
        "measure": describe(what),
        "tokens": token_sha256(tokens.stream(what.corpus, subject.tokenizer, settings.data_dir)),
        "code": code.measure(what),
        "packages": code.packages(),
    }
    progress = session.board.stage(f"dense {what.key}", measures.work_tokens(what))
    return dense_gate.dense(settings.root, key, lambda: measures.measure(what, subject, progress))


def measure(session: Session, recovery: Mapping[str, Any], dense: Mapping[Any, Any]) -> Values:
    """`recovery` is what retraining achieved, if there was any; `dense` by measure what it needs of the dense model."""
    run = session.run
    values: Values = {}
    made.agree(session.subject, session.together)
    with session.stages("measure"):
        for what in run.measures:
            if isinstance(what, Costs):
                values |= {what.key: made.costs(session.stages, session.subject, recovery)}
                continue
            if isinstance(what, made.BESIDE_DENSE):
                values |= {what.key: made.beside_dense(what, session.subject, dense[what])}
                continue
            if run.method is None and run.recovery is None and not run.quantised and isinstance(what, Perplexity):
                values |= _dense(what, session)
                continue
            progress = session.board.stage(f"measuring {what.key}", measures.work_tokens(what))
            values |= measures.measure(what, session.subject, progress)
    return values
