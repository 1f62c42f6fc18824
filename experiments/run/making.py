"""Makes the model that is measured: prunes, retrains and quantises a cell's model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import pruners
from eval import int8
from eval.perplexity import token_sha256
from experiments import provenance, recover
from experiments.data import corpora, tokens
from experiments.measures.zero_shot import Values
from experiments.rates import RateGrid
from experiments.recovery import Retraining, work_tokens
from experiments.run.session import Session
from experiments.store import blocks, cache, code, pruned_weights
from experiments.store.described import describe
from pruners import retrain
from pruners.lazy import torch
from pruners.retrain import Reconstruction
from pruners.unstructured import Unstructured
from pruners.weights import homes


def prune(session: Session) -> dict[str, Any]:
    """Prune in place, going on from what is unfinished; returns what was achieved."""
    run, settings, model = session.run, session.settings, session.subject.model
    if run.method is None:
        return {"asked": 0.0, "sparsity": 0.0}
    windows, size = None, 0
    if run.windows and run.calibrates:
        session.board.stage("calibration text")
        with session.stages("calibrate"):
            windows = _windows(session)
        size = windows.numel()
    key = _calibration_key(session, windows)
    statistics = _statistics(session, windows, key)
    work = 2 * size + work_tokens(run.recovery, run.windows) * (not session.retrains)
    rebuilds = isinstance(run.recovery, Reconstruction)
    prune = partial(
        pruners.prune,
        model,
        run.method,
        windows,
        batch_size=settings.batch_size,
        statistics=statistics,
        reconstruct=run.recovery if rebuilds else None,
        folder=session.begun if rebuilds else None,
        keeper=blocks.keeper(model, run.method, session.begun, settings.root),
        progress=session.board.stage("pruning", work),
    )
    with session.stages("prune"):
        if session.retrains and run.calibrates and isinstance(run.method, Unstructured):
            shared = {**key, "pruned": describe(run.method)}
            report = pruned_weights.shared(settings.root, shared, model, run.method, prune)
        else:
            report = recover.own_state(session.begun, prune)
    achieved = report.to_dict()
    stages = session.stages.seconds
    stages |= {f"prune/{stage}": round(seconds, 3) for stage, seconds in achieved.pop("seconds").items()}
    return {"sparsity": achieved.pop("achieved"), **achieved}


def _windows(session: Session) -> torch.Tensor:
    """The calibration text, which the model itself may have to write while it is dense."""
    asked, subject = session.run.windows, session.subject
    assert asked is not None
    if not corpora.find(asked.corpus).written:
        return tokens.calibration(asked, subject.tokenizer, session.settings.data_dir)
    from eval.generation import written

    drawn = partial(written, subject.model, subject.tokenizer.inner, asked.count, asked.length, asked.seed)
    return corpora.ordered(asked, torch.tensor(session.together.first(lambda: drawn().tolist())))


def after_pruning(session: Session) -> dict[str, Any]:
    """Retrain and quantise in place, where that is asked for; returns what was achieved."""
    achieved: dict[str, Any] = {"recovery": _retrain(session)} if session.retrains else {}
    if session.run.quantised:
        with session.stages("quantise"):
            int8.quantise(session.subject.model)
        achieved["quantised"] = f"bitsandbytes {provenance.version('bitsandbytes')}"
    return achieved


def _retrain(session: Session) -> dict[str, Any]:
    recovery, subject = session.run.recovery, session.subject
    assert isinstance(recovery, Retraining)
    kept_back = recover.held_out(recovery.text, subject.tokenizer, subject.data_dir)
    before = _held_out(kept_back, session)
    progress = session.board.stage("retraining", work_tokens(recovery, None))

    def watch(step: int, loss: float, pace: float) -> None:
        session.board.note(f"{step}/{recovery.taken}, loss {loss:.3f}, {pace:.0f} tokens/s")

    model = subject.model
    with session.stages("retrain"):
        text = recover.examples(recovery.text, subject.tokenizer, subject.data_dir)
        by = recover.checked_on(recovery, subject.tokenizer, subject.data_dir)
        report = recover.retrained(model, recovery, text, by, session.steps, progress, watch)
    session.stages.add("retrain", report.resumed_seconds)  # what another process took is this cell's cost, too
    held_out = {"held_out": {"before": before, "after": _held_out(kept_back, session)}}
    return report.to_dict() | (held_out if kept_back else {})


def choose(grid: RateGrid, session: Session) -> tuple[Values, dict[str, Any]]:
    """The choice of a learning rate, and of a reconstruction what pruning achieved with the last rate tried."""
    run, subject, achieved = session.run, session.subject, {}
    kept_back = recover.examples(grid.text, subject.tokenizer, subject.data_dir)
    text = recover.examples(run.recovery.text, subject.tokenizer, subject.data_dir) if session.retrains else None

    def attempt(rate: float) -> None:
        place = f"rate {rate:g}"
        recovery = replace(run.recovery, learning_rate=rate)
        if session.retrains:
            progress = session.board.stage(f"retraining at {rate:g}", work_tokens(recovery, None))
            by = recover.checked_on(recovery, subject.tokenizer, subject.data_dir)
            recover.retrained(subject.model, recovery, text, by, session.steps / place, progress)
        else:
            achieved.update(prune(replace(session, run=replace(run, recovery=recovery), begun=session.begun / place)))

    with session.stages("learning rates"):
        choice = retrain.choose_rate(subject.model, attempt, grid.rates, kept_back, batch_size=subject.batch_size)
    achieved.pop("reconstruction", None)
    about = choice.to_dict()
    return {grid.key: {"learning_rate": about.pop("chosen"), **about, "text": asdict(grid.text)}}, achieved


def _held_out(kept_back: list[Any], session: Session) -> dict[str, Any]:
    """The loss on these records, in nats a predicted token; empty without records."""
    if not kept_back:
        return {}
    progress, subject = session.board.stage("held-out loss"), session.subject
    with session.stages("held-out loss"):
        loss, tokens = retrain.held_out_loss(subject.model, kept_back, batch_size=subject.batch_size, progress=progress)
    return {"loss": loss, "tokens": tokens, "records": len(kept_back)}


def _calibration_key(session: Session, windows: Any) -> dict[str, Any]:
    """Everything that can move what a method makes of its calibration text: the text by its tokens, the code by its
    source."""
    run = session.run
    return {
        "model": session.subject.identity,
        "dtype": run.dtype,
        "windows": run.windows.told() if run.windows else None,
        "tokens": None if windows is None else token_sha256(windows),
        "code": code.method(run.method),
        "packages": code.packages(),
    }


def _statistics(session: Session, windows: Any, key: dict[str, Any]) -> Mapping[str, torch.Tensor] | None:
    """The dense statistics that other cells share, from the cache or computed for it; None where there are none."""
    method = session.run.method
    if method.statistics_key is None or session.run.windows is None:
        return None
    progress = session.board.stage("statistics", 3 * windows.numel())
    with session.stages("statistics"):
        return cache.statistics(
            session.settings.root,
            {**key, "statistics": method.statistics_key},
            lambda: pruners.gather(session.subject.model, method, windows, progress=progress),
            on_disk=homes.on_disk(session.subject.model) is not None,
        )
