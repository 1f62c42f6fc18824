"""The session of one cell: its model, loaded or handed over by the previous cell, and where its files go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from experiments import cells, measures, models, placement, provenance, resume
from experiments.data import corpora
from experiments.data.tokens import Tokenizer
from experiments.measures import dense_gate, zero_shot
from experiments.measures.asked import Costs
from experiments.models import kept
from experiments.progress import Board
from experiments.recovery import Retraining
from experiments.settings import Settings
from experiments.spec import Efficiency, Run
from experiments.store import records
from experiments.store.described import digest
from pruners.run import ranks
from pruners.run.ranks import Ranks
from pruners.weights import storage


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


def open_session(run: Run, table: str, settings: Settings, board: Board) -> Session:
    stages, identity, together = provenance.Stages(), models.identity(run.model), ranks.here(settings.device or "cpu")
    key = making_key(run, identity, settings) if cells.hands_over(run) else None
    before = kept.take_over(key, gated(run))
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
    load = partial(models.load, run.model, run.dtype, settings.place, placed.home, work, mark=id)
    if placed.home == "device" and not any(isinstance(what, Costs | Efficiency) for what in run.measures):
        what = {"model": run.model, "identity": identity, "dtype": run.dtype, "device": settings.place}
        loaded = kept.load(what, load)
    else:
        kept.forget()
        loaded = load()
    if models.identity(run.model) != identity:
        raise ValueError(f"{run.model} changed while it was loaded; run again, so that the record is of one model.")
    return loaded


def making_key(run: Run, identity: Any, settings: Settings) -> str:
    """Equal for cells whose model is made alike: from the same model and texts, at the same place."""
    texts = resume.read_by(replace(run, measures=()))
    told = {
        "made": replace(run, measures=()).spec(identity),
        "learning rate": getattr(run.recovery, "learning_rate", None),  # which a spec leaves out where it is chosen
        "data": {name: corpora.provenance(name, settings.data_dir) for name in texts},
        "place": [
            settings.weights,
            settings.place,
            settings.batch_size,
            str(settings.data_dir),
            str(settings.root),
        ],
    }
    return json.dumps(told, sort_keys=True)


def made_model(session: Session, achieved: Mapping[str, Any], passed: Mapping[str, Any]) -> kept.Made:
    """The model as it is now, before anything is measured on it."""
    subject, seconds = session.subject, dict(session.stages.seconds)
    seconds.pop("dense gate", None)
    key = making_key(session.run, subject.identity, session.settings)
    told = dict(achieved), dict(passed), session.placed, seconds, peak_bytes(session)
    return kept.Made(key, subject.model, subject.tokenizer.inner, *told)


def gated(run: Run) -> list[str]:
    """The protocol keys of what the dense model has to meet."""
    return [what.key for what in dense_gate.asked(run.measures, models.find(run.model))]


def peak_bytes(session: Session) -> int:
    return provenance.peak_bytes(session.subject.model.device) - kept.nbytes()  # which the cell did not need
