"""Executes a Run: load, calibrate, prune, measure; the result is its record."""

from __future__ import annotations

import platform
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pruners
from eval.perplexity import token_sha256
from experiments import distributed, measures, models, provenance, recover, resume
from experiments.data import corpora, tokens
from experiments.data.tokens import Tokenizer
from experiments.measures import dense_gate, zero_shot
from experiments.progress import Board
from experiments.recovery import Retraining, work_tokens
from experiments.spec import Perplexity, Run, describe, digest
from experiments.store import cache, code, pruned_weights, records
from experiments.store.blocks import PrunedBlocks
from experiments.store.records import Record
from pruners import checks, retrain
from pruners.checks import Count, Flag, Folder, Text
from pruners.retrain import Reconstruction
from pruners.unstructured import Unstructured


@dataclass(frozen=True)
class Settings:
    """Where and how cells run; nothing here moves a number.

    `root` is the results folder; `device` None is CUDA where there is some, of several processes launched together each
    its own.  ValueError for a device that is not there.  `again` makes records again that other code of their
    method or measures made, or that do not tell.  `group` is those processes.
    """

    root: Folder = Path("results")
    device: Text | None = None
    batch_size: Count = 8
    data_dir: Folder | None = None
    dense_gate: Flag = True
    again: Flag = False
    group: distributed.Group | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        checks.fields(self)
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "data_dir", None if self.data_dir is None else Path(self.data_dir))
        object.__setattr__(self, "device", _device(self.device))


def execute(run: Run, table: str, settings: Settings, board: Board | None = None, resumed: int = 0) -> Record:
    """One cell from its model to its record, which is not stored yet."""
    board, stages = board or Board(), provenance.Stages()
    identity = models.identity(run.model)
    board.stage("loading")
    with stages("load"):
        model, inner = models.load(run.model, run.dtype, settings.device)
    if models.identity(run.model) != identity:
        raise ValueError(f"{run.model} changed while it was loaded; run again, so that the record is of one model.")
    tokenizer = Tokenizer(digest(identity), inner)
    id = run.id(identity)
    place = zero_shot.Place(records.folder(settings.root, table) / id, resume.answers(run, id, table, settings))
    subject = measures.Subject(model, tokenizer, settings.batch_size, settings.data_dir, place, identity)
    passed = _dense_gate(run, subject, settings, board, stages)
    begun = resume.begun(run, id, table, settings)
    achieved = _prune(run, subject, settings, board, stages, begun / "pruned")
    if isinstance(run.recovery, Retraining):
        kept = resume.steps(run, id, table, settings)
        achieved["recovery"] = _retrain(run.recovery, id, subject, settings, board, stages, kept)
    return Record(
        id=id,
        table=table,
        spec=run.spec(identity),
        achieved=achieved,
        measures=_measure(run, subject, settings, board, stages),
        dense_gate=passed,
        data={name: corpora.provenance(name, settings.data_dir) for name in resume.read_by(run)},
        cost=records.Cost(seconds=stages.finished(), peak_bytes=provenance.peak_bytes(model.device)),
        made_by=_made_by(run, identity, model.device, settings),
        resumed=resumed,
        code=code.of(run),
    )


def _device(asked: str | None) -> str:
    """Raises ValueError, listing what there is, for a device that torch does not know or does not have."""
    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    name = (
        f"cuda:{distributed.local_rank()}" if asked == "cuda" or (asked is None and len(found) > 1) else asked or "cpu"
    )
    if name not in found:
        raise ValueError(
            f"There is no device {name!r} here; found {', '.join(found)}."
            + (" Launch one process for each GPU at most." if distributed.local_rank() else "")
        )
    if asked == name != "cpu" and distributed.count() > 1:
        raise ValueError(
            f"{distributed.count()} processes cannot train together on {name}; leave --device out, or say cpu."
        )
    return name


def _prune(
    run: Run, subject: measures.Subject, settings: Settings, board: Board, stages: provenance.Stages, begun: Path
) -> dict[str, Any]:
    """Prune in place, going on from what lies in `begun`; returns what was achieved."""
    if run.method is None:
        return {"asked": 0.0, "sparsity": 0.0}
    model, windows, size = subject.model, None, 0
    if run.windows and run.calibrates:
        board.stage("calibration text")
        with stages("calibrate"):
            windows = tokens.calibration(run.windows, subject.tokenizer, settings.data_dir)
        size = windows.numel()
    key = _calibration_key(run, subject, windows)
    statistics = _statistics(run, model, windows, key, settings, board, stages)
    prune = partial(
        pruners.prune,
        model,
        run.method,
        windows,
        batch_size=settings.batch_size,
        statistics=statistics,
        reconstruct=run.recovery if isinstance(run.recovery, Reconstruction) else None,
        folder=begun,
        keeper=PrunedBlocks(begun, settings.root),
        progress=board.stage("pruning", 2 * size + work_tokens(run.recovery, run.windows) * (not _retrains(run))),
    )
    with stages("prune"):
        if _retrains(run) and run.calibrates and isinstance(run.method, Unstructured):
            report = pruned_weights.shared(
                settings.root, {**key, "pruned": describe(run.method)}, model, run.method, prune
            )
        else:
            report = recover.own_state(begun, prune)
    told = report.to_dict()
    stages.seconds |= {f"prune/{stage}": round(seconds, 3) for stage, seconds in told.pop("seconds").items()}
    return {"sparsity": told.pop("achieved"), **told}


def _retrains(run: Run) -> bool:
    return isinstance(run.recovery, Retraining)


def _retrain(
    recovery: Retraining,
    id: str,
    subject: measures.Subject,
    settings: Settings,
    board: Board,
    stages: provenance.Stages,
    begun: Path,
) -> dict[str, Any]:
    kept_back = recover.held_out(recovery.text, subject.tokenizer, settings.data_dir)
    before = _held_out(kept_back, subject, board, stages)
    progress = board.stage("retraining", work_tokens(recovery, None))

    def watch(step: int, loss: float, pace: float) -> None:
        board.note(f"{step}/{recovery.taken}, loss {loss:.3f}, {pace:.0f} tokens/s")

    model, tokenizer, group = subject.model, subject.tokenizer, settings.group
    with stages("retrain"):
        text = recover.examples(recovery.text, tokenizer, settings.data_dir)
        with group.training(id, model, tokenizer.inner, begun) if group else nullcontext():
            report = recover.retrained(model, recovery, text, begun, progress, watch)
    stages.seconds["retrain"] += report.resumed_seconds  # steps that another process took are this cell's cost, too
    stages.started -= report.resumed_seconds
    held_out = {"held_out": {"before": before, "after": _held_out(kept_back, subject, board, stages)}}
    return report.to_dict() | (held_out if kept_back else {})


def _held_out(
    kept_back: list[Any], subject: measures.Subject, board: Board, stages: provenance.Stages
) -> dict[str, Any]:
    """The loss on these records, in nats a predicted token; empty without records."""
    if not kept_back:
        return {}
    progress = board.stage("held-out loss")
    with stages("held-out loss"):
        loss, tokens = retrain.held_out_loss(subject.model, kept_back, batch_size=subject.batch_size, progress=progress)
    return {"loss": loss, "tokens": tokens, "records": len(kept_back)}


def _calibration_key(run: Run, subject: measures.Subject, windows: Any) -> dict[str, Any]:
    """Everything that can move what a method makes of its calibration text: the text by its tokens, the code by its
    source."""
    return {
        "model": subject.identity,
        "dtype": run.dtype,
        "windows": asdict(run.windows) if run.windows else None,
        "tokens": None if windows is None else token_sha256(windows),
        "code": code.method(run.method),
        "packages": code.packages(),
    }


def _statistics(
    run: Run, model: Any, windows: Any, key: dict[str, Any], settings: Settings, board: Board, stages: provenance.Stages
) -> dict[str, torch.Tensor] | None:
    """The dense statistics that other cells share, from the cache or computed for it; None where there are none."""
    if run.method.statistics_key is None or run.windows is None:
        return None
    progress = board.stage("statistics", 3 * windows.numel())
    with stages("statistics"):
        return cache.statistics(
            settings.root,
            {**key, "statistics": run.method.statistics_key},
            lambda: pruners.gather(model, run.method, windows, progress=progress),
        )


def _dense_gate(
    run: Run, subject: measures.Subject, settings: Settings, board: Board, stages: provenance.Stages
) -> dict[str, Any]:
    """By protocol key what the dense model met; empty where nothing is published for it."""
    model = models.find(run.model)
    asked = dense_gate.asked(run.measures, model)
    if not settings.dense_gate:
        return {what.key: {"skipped": "--no-dense-gate"} for what in asked}
    for what in asked:
        if what not in run.measures:
            dense_gate.check_readable(what, model, partial(corpora.provenance, what.corpus, settings.data_dir))
    with stages("dense gate"):
        return {what.key: dense_gate.check(what, model, _dense(what, run, subject, settings, board)) for what in asked}


def _dense(
    what: Any, run: Run, subject: measures.Subject, settings: Settings, board: Board
) -> dict[str, dict[str, Any]]:
    """The dense model's values, from the cache or measured on the model, which is not pruned yet."""
    key = {
        "model": subject.identity,
        "dtype": run.dtype,
        "device": provenance.device_name(subject.model.device),
        "measure": describe(what),
        "tokens": token_sha256(tokens.stream(what.corpus, subject.tokenizer, settings.data_dir)),
        "code": code.measure(what),
        "packages": code.packages(),
    }
    progress = board.stage(f"dense {what.key}", measures.work_tokens(what))
    return dense_gate.dense(settings.root, key, lambda: measures.measure(what, subject, progress))


def _measure(
    run: Run, subject: measures.Subject, settings: Settings, board: Board, stages: provenance.Stages
) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    with stages("measure"):
        for what in run.measures:
            if run.method is None and run.recovery is None and isinstance(what, Perplexity):
                values |= _dense(what, run, subject, settings, board)
                continue
            progress = board.stage(f"measuring {what.key}", measures.work_tokens(what))
            values |= measures.measure(what, subject, progress)
    return values


def _made_by(run: Run, identity: dict[str, str], device: torch.device, settings: Settings) -> records.MadeBy:
    commit, dirty = provenance.commit()
    return records.MadeBy(
        commit=commit,
        dirty=dirty,
        model_commit=identity.get("revision"),
        device=provenance.device_name(device),
        dtype=run.dtype,
        packages=provenance.packages(),
        python=platform.python_version(),
        seed=run.windows.seed if run.windows else None,
        batch_size=settings.batch_size,
        at=records.now(),
    )
