"""Executes a Run: load, calibrate, prune, measure; the result is its record."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pruners
from eval import int8
from experiments import cells, placement, provenance, rates, resume
from experiments.data import corpora
from experiments.measures import made, zero_shot
from experiments.models import kept, lengths
from experiments.own import saved
from experiments.progress import Board
from experiments.rates.settle import settled
from experiments.run.making import after_pruning, choose, prune
from experiments.run.measuring import measure, pass_dense_gate
from experiments.run.session import Session, gated, made_model, open_session, peak_bytes
from experiments.settings import Settings
from experiments.spec import Run, ZeroShot
from experiments.store import again, atomic, code, records
from experiments.store.records import Record
from pruners.run import inputs


@inputs.whole_products()
def execute(run: Run, table: str, settings: Settings, board: Board | None = None, resumed: int = 0) -> Record:
    """One cell from its model to its record, which is stored before the model is kept, if it is to be.

    All ranks of a launch call this for the same cell; rank 0 stores.  Raises ValueError where a text was replaced
    meanwhile.
    """
    made.check(run)
    for what in (what for what in run.measures if isinstance(what, ZeroShot)):
        zero_shot.check(what)
    lengths.check(run)
    if run.quantised:
        int8.library()
    board = board or Board()
    run, chosen, texts = _settled(run, settings, board)
    read = {name: corpora.version(name, settings.data_dir) for name in resume.read_by(run)}
    session = open_session(run, table, settings, board)
    together, folder = session.together, settings.save.get(session.id)
    if folder:
        together.first(lambda: saved.check(run, folder))
    before = session.before
    if run.method is not None:
        pruners.check(session.subject.model, run.method)  # before anything is measured
    passed = {key: before.passed[key] for key in gated(run)} if before else pass_dense_gate(session)
    dense = {
        what: made.before(what, session.subject, run.method)
        for what in run.measures
        if isinstance(what, made.BESIDE_DENSE)
    }
    grid = rates.grid(run)
    achieved = dict(before.achieved) if before else {} if grid and not session.retrains else prune(session)
    if grid:
        measured, pruned = choose(grid, session)
        achieved |= pruned
    elif not before:
        achieved |= after_pruning(session)
    lasts = cells.hands_over(run) and session.placed.home != "disk"  # where the cell's own files end with it
    finished = (before or made_model(session, achieved, passed)) if lasts else None
    identity = dict(session.subject.identity)
    record = Record(
        id=session.id,
        table=table,
        spec=run.spec(identity),
        achieved=achieved | chosen,
        measures=measured if grid else measure(session, achieved.get("recovery", {}), dense),
        dense_gate=passed,
        data=texts | {name: corpora.provenance(name, settings.data_dir) for name in read},
        cost=_cost(session),
        made_by=_made_by(session),
        resumed=resumed,
        code=code.of(run),
    )
    together.each(lambda: _refuse_changed(read, settings.data_dir))
    together.first(lambda: _keep(record, folder, session))
    if finished:
        kept.hand_over(finished)
    return record


def _settled(run: Run, settings: Settings, board: Board) -> tuple[Run, dict[str, Any], dict[str, dict[str, Any]]]:
    """The run at its learning rate, which is chosen now where it was not yet, what to record of the choice, and from
    which text it was made."""
    if not run.tuning:
        return run, {}, {}
    alone = replace(settings, save={})
    return settled(run, settings, lambda wanted, table: execute(wanted, table, alone, board))


def _refuse_changed(read: Mapping[str, str | None], data_dir: Path | None) -> None:
    """ValueError for a corpus that is another than the one of that version, which the cell began with."""
    for name, version in read.items():
        if corpora.version(name, data_dir) != version:
            raise ValueError(f"{name} changed while the cell ran; run again, so that the record is of one text.")


def _keep(record: Record, folder: Path | None, session: Session) -> None:
    root, subject = session.settings.root, session.subject
    try:
        again.write(record, root)
    except atomic.StorageError:
        session.board.say(f"Measured, and not kept: {record.headline}.")
        raise
    if folder:
        session.board.stage("saving")
        saved.write(subject.model, subject.tokenizer.inner, session.run, record, folder, root)


def _cost(session: Session) -> records.Cost:
    making = session.before.peak_bytes if session.before else 0
    return records.Cost(seconds=session.stages.finished(), peak_bytes=max(making, peak_bytes(session)))


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
