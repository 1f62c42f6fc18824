"""Executes a Run: load, calibrate, prune, measure; the result is its record."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pruners
from eval import int8
from eval.perplexity import token_sha256
from experiments import cells, measures, models, placement, provenance, rates, recover, resume
from experiments.data import corpora, tokens
from experiments.data.tokens import Tokenizer
from experiments.measures import dense_gate, made, zero_shot
from experiments.measures.asked import Costs, DenseAnswers
from experiments.measures.zero_shot import Values
from experiments.models import kept
from experiments.own import saved
from experiments.progress import Board
from experiments.rates import RateGrid
from experiments.rates.settle import settled
from experiments.recovery import Retraining, work_tokens
from experiments.settings import Settings
from experiments.spec import Efficiency, Perplexity, Run, describe, digest
from experiments.store import blocks, cache, code, pruned_weights, records
from experiments.store.records import Record
from pruners import ranks, retrain, storage
from pruners.lazy import torch
from pruners.ranks import Ranks
from pruners.retrain import Reconstruction
from pruners.unstructured import Unstructured
from pruners.weights import homes


@dataclass(frozen=True)
class Session:
    """One cell on its way: what is asked, the model as it is by now, where it goes and who watches.

    `begun` is the folder of its unfinished work, `steps` that of its retraining, which other cells may share.
    `together` are the ranks of the launch, all of which run it; `before` is the model as the last cell made it, where
    this one needs the same.
    """

    run: Run
    id: str
    subject: measures.Subject
    settings: Settings
    board: Board
    stages: provenance.Stages
    placed: placement.Placement
    begun: Path
    steps: Path
    together: Ranks
    before: kept.Made | None = None

    @property
    def retrains(self) -> bool:
        return isinstance(self.run.recovery, Retraining)


def execute(run: Run, table: str, settings: Settings, board: Board | None = None, resumed: int = 0) -> Record:
    """One cell from its model to its record, which is stored before the model is kept, if it is to be.

    All ranks of a launch call this for the same cell; rank 0 stores.
    """
    if run.quantised:
        int8.library()
    board = board or Board()
    run, chosen = _settled(run, settings, board)
    session = _open(run, table, settings, board)
    together, folder = session.together, settings.save.get(session.id)
    if folder:
        together.first(lambda: saved.check(run, folder))
    before = session.before
    passed = {key: before.passed[key] for key in _gated(run)} if before else _dense_gate(session)
    said = {what: made.said(what, session.subject) for what in run.measures if isinstance(what, DenseAnswers)}
    grid = rates.grid(run)
    achieved = dict(before.achieved) if before else {} if grid and not session.retrains else _prune(session)
    if grid:
        measured, pruned = _choose(grid, session)
        achieved |= pruned
    elif not before:
        achieved |= _after_pruning(session)
    lasts = cells.hands_over(run) and session.placed.home != "disk"  # where the cell's own files end with it
    finished = (before or _made(session, achieved, passed)) if lasts else None
    identity = dict(session.subject.identity)
    record = Record(
        id=session.id,
        table=table,
        spec=run.spec(identity),
        achieved=achieved | chosen,
        measures=measured if grid else _measure(session, achieved.get("recovery", {}), said),
        dense_gate=passed,
        data={name: corpora.provenance(name, settings.data_dir) for name in resume.read_by(run)},
        cost=_cost(session),
        made_by=_made_by(session),
        resumed=resumed,
        code=code.of(run),
    )
    together.first(lambda: _keep(record, folder, session))
    if finished:
        kept.hand_over(finished)
    return record


def _keep(record: Record, folder: Path | None, session: Session) -> None:
    root, subject = session.settings.root, session.subject
    records.write(record, root)
    if folder:
        session.board.stage("saving")
        saved.write(subject.model, subject.tokenizer.inner, session.run, record, folder, root)


def _open(run: Run, table: str, settings: Settings, board: Board) -> Session:
    stages, identity, together = provenance.Stages(), models.identity(run.model), ranks.here(settings.device or "cpu")
    key = _making(run, identity, settings) if cells.hands_over(run) else None
    before = kept.take_over(key, _gated(run))
    id, placed = run.id(identity), before.placed if before else placement.agreed(run, settings, together)
    begun, steps = resume.begun(run, id, table, settings), resume.steps(run, id, table, settings)
    board.stage("loading")
    board.say_once((run.model, placed.home), str(placed))
    if placed.home == "disk" and run.method is not None:
        together.first(lambda: placement.check_disk(run, begun, together.count))
    loaded: list[Any] = [before.model, before.tokenizer] if before else []
    if before:
        stages.take_over(before.seconds)
    else:
        with stages("load"):
            together.each(lambda: loaded.extend(_load(run, id, identity, settings, placed, begun, together)))
    model, inner = loaded
    place = zero_shot.Place(records.folder(settings.root, table) / id, resume.answers(run, id, table, settings))
    tokenizer = Tokenizer(digest(identity), inner)
    subject = measures.Subject(model, tokenizer, settings.batch_size, settings.data_dir, place, identity)
    return Session(run, id, subject, settings, board, stages, placed, begun / "pruned", steps, together, before)


def _making(run: Run, identity: Any, settings: Settings) -> str:
    """Equal for cells whose model is made alike: from the same model and texts, at the same place."""
    texts = resume.read_by(replace(run, measures=()))
    told = {
        "made": replace(run, measures=()).spec(identity),
        "learning rate": getattr(run.recovery, "learning_rate", None),  # which a spec leaves out where it is chosen
        "data": {name: corpora.provenance(name, settings.data_dir) for name in texts},
        "place": [
            settings.weights,
            str(settings.device),
            settings.batch_size,
            str(settings.data_dir),
            str(settings.root),
        ],
    }
    return json.dumps(told, sort_keys=True)


def _made(session: Session, achieved: Mapping[str, Any], passed: Mapping[str, Any]) -> kept.Made:
    """The model as it is now, before anything is measured on it."""
    subject, seconds = session.subject, dict(session.stages.seconds)
    seconds.pop("dense gate", None)
    key = _making(session.run, subject.identity, session.settings)
    told = dict(achieved), dict(passed), session.placed, seconds, _peak_bytes(session)
    return kept.Made(key, subject.model, subject.tokenizer.inner, *told)


def _load(
    run: Run, id: str, identity: Any, settings: Settings, placed: placement.Placement, begun: Path, together: Ranks
) -> tuple[Any, Any]:
    """The model and its tokenizer; of several ranks each changes weights in a folder of its own, begun anew.

    Where a cell tells how much memory it took, nothing is kept of the cells before it.
    """
    work = begun / "weights"
    if together.count > 1 and placed.home == "disk":
        work = begun / f"weights_{together.rank}"
        storage.remove(work)
    load = partial(models.load, run.model, run.dtype, settings.device, placed.home, work, mark=id)
    if placed.home == "device" and not any(isinstance(what, Costs | Efficiency) for what in run.measures):
        what = {"model": run.model, "identity": identity, "dtype": run.dtype, "device": str(settings.device)}
        loaded = kept.load(what, load)
    else:
        kept.forget()
        loaded = load()
    if models.identity(run.model) != identity:
        raise ValueError(f"{run.model} changed while it was loaded; run again, so that the record is of one model.")
    return loaded


def _prune(session: Session) -> dict[str, Any]:
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
        keeper=blocks.keeper(model, session.begun, settings.root),
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

    model, inner, batch = subject.model, subject.tokenizer.inner, subject.batch_size
    drawn = partial(written, model, inner, asked.count, asked.length, asked.seed, batch)
    return torch.tensor(session.together.first(lambda: drawn().tolist()))


def _after_pruning(session: Session) -> dict[str, Any]:
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
        report = recover.retrained(model, recovery, text, session.steps, progress, watch)
    session.stages.add("retrain", report.resumed_seconds)  # what another process took is this cell's cost, too
    held_out = {"held_out": {"before": before, "after": _held_out(kept_back, session)}}
    return report.to_dict() | (held_out if kept_back else {})


def _settled(run: Run, settings: Settings, board: Board) -> tuple[Run, dict[str, Any]]:
    """The run at its learning rate, which is chosen now where it was not yet, and what to record of the choice."""
    if not run.tuning:
        return run, {}
    alone = replace(settings, save={})
    return settled(run, settings, lambda wanted, table: execute(wanted, table, alone, board))


def _choose(grid: RateGrid, session: Session) -> tuple[Values, dict[str, Any]]:
    """The choice of a learning rate, and of a reconstruction what pruning achieved with the last rate tried."""
    run, subject, achieved = session.run, session.subject, {}
    kept_back = recover.examples(grid.text, subject.tokenizer, subject.data_dir)
    text = recover.examples(run.recovery.text, subject.tokenizer, subject.data_dir) if session.retrains else None

    def attempt(rate: float) -> None:
        place = f"rate {rate:g}"
        recovery = replace(run.recovery, learning_rate=rate)
        if session.retrains:
            progress = session.board.stage(f"retraining at {rate:g}", work_tokens(recovery, None))
            recover.retrained(subject.model, recovery, text, session.steps / place, progress)
        else:
            achieved.update(_prune(replace(session, run=replace(run, recovery=recovery), begun=session.begun / place)))

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
        "windows": asdict(run.windows) if run.windows else None,
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


def _gated(run: Run) -> list[str]:
    """The protocol keys of what the dense model has to meet."""
    return [what.key for what in dense_gate.asked(run.measures, models.find(run.model))]


def _dense_gate(session: Session) -> dict[str, Any]:
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


def _measure(session: Session, recovery: Mapping[str, Any], said: Mapping[DenseAnswers, Any]) -> Values:
    """`recovery` is what retraining achieved, if there was any; `said` are the dense model's answers."""
    run = session.run
    values: Values = {}
    made.agree(session.subject, session.together)
    with session.stages("measure"):
        for what in run.measures:
            if isinstance(what, Costs):
                values |= {what.key: made.costs(session.stages, session.subject, recovery)}
                continue
            if isinstance(what, DenseAnswers):
                values |= {what.key: made.as_dense(what, session.subject, said[what])}
                continue
            if run.method is None and run.recovery is None and not run.quantised and isinstance(what, Perplexity):
                values |= _dense(what, session)
                continue
            progress = session.board.stage(f"measuring {what.key}", measures.work_tokens(what))
            values |= measures.measure(what, session.subject, progress)
    return values


def _cost(session: Session) -> records.Cost:
    making = session.before.peak_bytes if session.before else 0
    return records.Cost(seconds=session.stages.finished(), peak_bytes=max(making, _peak_bytes(session)))


def _peak_bytes(session: Session) -> int:
    return provenance.peak_bytes(session.subject.model.device) - kept.nbytes()  # which the cell did not need


def _made_by(session: Session) -> records.MadeBy:
    run, subject = session.run, session.subject
    commit, dirty = provenance.commit()
    return records.MadeBy(
        commit=commit,
        dirty=dirty,
        model_commit=subject.identity.get("revision"),
        device=provenance.device_name(subject.model.device),
        dtype=run.dtype,
        packages=provenance.packages(),
        python=platform.python_version(),
        seed=run.windows.seed if run.windows else None,
        batch_size=session.settings.batch_size,
        at=records.now(),
        weights=placement.told(session.placed, subject.model),
        processes=session.together.count,
    )
