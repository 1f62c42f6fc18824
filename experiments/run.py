"""Runs cells: load, calibrate, prune, measure, record.  What has a record is never done again."""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import pruners
from experiments import cache, corpora, cost, failures, files, measures, models, records, tokens
from experiments.cells import Cell, ordered
from experiments.progress import Board, duration
from experiments.records import Record
from experiments.spec import Run, digest, needs_windows
from experiments.tokens import Tokenizer


@dataclass(frozen=True)
class Settings:
    """Where and how cells run; nothing here moves a number.  `root` is the results folder."""

    root: Path = Path("results")
    device: str | None = None
    batch_size: int = 8
    data_dir: Path | None = None


@dataclass
class Outcome:
    """Labels of the cells that were found finished, that finished now, and that failed."""

    found: list[str]
    done: list[str]
    failed: list[str]


def run_table(table: str, chosen: Sequence[Cell], settings: Settings) -> Outcome:
    """Run the chosen cells that have no record; one that fails does not stop the others.

    Two processes may run the same table: each cell is done by one of them.  Raises StorageError before any work where
    the results folder cannot be written.
    """
    files.check_writable(records.folder(settings.root, table))
    finished = records.load(settings.root, table)
    outcome = Outcome([cell.label for cell in chosen if cell.id in finished], [], [])
    todo = ordered([cell for cell in chosen if cell.id not in finished])
    with Board([cell.work for cell in todo], _pace(chosen, finished)) as board:
        busy = [cell for cell in todo if not _attempt(cell, table, settings, board, outcome, wait=False)]
        for cell in busy:
            board.say(f"Waiting for another process that is at {cell.label}.")
            _attempt(cell, table, settings, board, outcome, wait=True)
    return outcome


def execute(run: Run, table: str, settings: Settings, board: Board | None = None, resumed: int = 0) -> Record:
    """One cell from its model to its record, which is not stored yet."""
    board, stages = board or Board(), cost.Stages()
    identity = models.identity(run.model)
    board.stage("loading")
    with stages("load"):
        model, inner = models.load(run.model, run.dtype, settings.device)
    tokenizer = Tokenizer(digest(identity), inner)
    achieved = _prune(run, model, tokenizer, settings, board, stages)
    subject = measures.Subject(model, tokenizer, settings.batch_size, settings.data_dir)
    return Record(
        id=run.id(identity),
        table=table,
        spec=run.spec(identity),
        achieved=achieved,
        measures=_measure(run, subject, board, stages),
        data={name: corpora.provenance(name, settings.data_dir) for name in _corpora(run)},
        cost=records.Cost(seconds=stages.finished(), peak_bytes=cost.peak_bytes(model.device)),
        made_by=_made_by(run, model.device, settings),
        resumed=resumed,
    )


def _attempt(cell: Cell, table: str, settings: Settings, board: Board, outcome: Outcome, *, wait: bool) -> bool:
    """False if another process is at this cell."""
    try:
        with _started(cell, table, settings.root, wait=wait) as resumed:
            if records.exists(settings.root, table, cell.id):
                outcome.found.append(cell.label)
                board.finish(cell.work, f"{cell.label}: done by another process")
            else:
                _run_cell(cell, table, settings, board, outcome, resumed)
    except Timeout:
        return False
    return True


def _run_cell(cell: Cell, table: str, settings: Settings, board: Board, outcome: Outcome, resumed: int) -> None:
    started = time.monotonic()
    board.begin(cell.label)
    try:
        record = execute(cell.run, table, settings, board, resumed)
        records.write(record, settings.root)
    except Exception as error:  # noqa: BLE001  (whatever it was, the other cells go on and the table shows it)
        outcome.failed.append(cell.label)
        _keep_failure(cell, table, settings.root, error, board)
        board.finish(cell.work, f"{cell.label}: failed: {failures.sentence(error)}")
    else:
        outcome.done.append(cell.label)
        board.finish(cell.work, f"{cell.label}: {_headline(record)} in {duration(time.monotonic() - started)}")


@contextmanager
def _started(cell: Cell, table: str, root: Path, *, wait: bool) -> Iterator[int]:
    """Hold the cell; yields how often it was started before and broken off."""
    place = root / ".cache" / "started" / table
    with files.explained(place):
        place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / f"{cell.id}.lock", timeout=-1 if wait else 0):
        marker = place / cell.id
        before = len(marker.read_text()) if marker.exists() else 0
        files.write(marker, "." * (before + 1))
        yield before
        marker.unlink()


def _prune(
    run: Run, model: Any, tokenizer: Tokenizer, settings: Settings, board: Board, stages: cost.Stages
) -> dict[str, Any]:
    """Prune in place; returns what was achieved."""
    if run.method is None:
        return {"asked": 0.0, "sparsity": 0.0}
    windows, size = None, 0
    if run.windows and needs_windows(run.method):
        board.stage("calibration text")
        with stages("calibrate"):
            windows = tokens.calibration(run.windows, tokenizer, settings.data_dir)
        size = windows.numel()
    statistics = _statistics(run, model, windows, settings, board, stages)
    progress = board.stage("pruning", 2 * size)
    with stages("prune"):
        report = pruners.prune(
            model, run.method, windows, batch_size=settings.batch_size, statistics=statistics, progress=progress
        )
    told = report.to_dict()
    stages.seconds |= {f"prune/{stage}": round(seconds, 3) for stage, seconds in told.pop("seconds").items()}
    return {"sparsity": told.pop("achieved"), **told}


def _statistics(
    run: Run, model: Any, windows: Any, settings: Settings, board: Board, stages: cost.Stages
) -> dict[str, torch.Tensor] | None:
    """The dense statistics that other cells share, from the cache or computed for it; None where there are none."""
    if run.method.statistics_key is None or run.windows is None:
        return None
    key = {
        "model": models.identity(run.model),
        "dtype": run.dtype,
        "windows": asdict(run.windows),
        "data": corpora.provenance(run.windows.corpus, settings.data_dir),
        "statistics": run.method.statistics_key,
    }
    progress = board.stage("statistics", 3 * windows.numel())
    with stages("statistics"):
        return cache.statistics(
            settings.root, key, lambda: pruners.gather(model, run.method, windows, progress=progress)
        )


def _measure(run: Run, subject: measures.Subject, board: Board, stages: cost.Stages) -> dict[str, dict[str, Any]]:
    values: dict[str, dict[str, Any]] = {}
    with stages("measure"):
        for what in run.measures:
            progress = board.stage(f"measuring {getattr(what, 'key', '')}".rstrip(), measures.work_tokens(what))
            values |= measures.measure(what, subject, progress)
    return values


def _corpora(run: Run) -> list[str]:
    read = [name for what in run.measures for name in measures.corpora_of(what)]
    if run.windows and needs_windows(run.method):
        read.append(run.windows.corpus)
    return list(dict.fromkeys(read))


def _made_by(run: Run, device: torch.device, settings: Settings) -> records.MadeBy:
    commit, dirty = cost.commit()
    return records.MadeBy(
        commit=commit,
        dirty=dirty,
        model_commit=models.commit(run.model),
        device=cost.device_name(device),
        dtype=run.dtype,
        packages=cost.packages(),
        python=platform.python_version(),
        seed=run.windows.seed if run.windows else None,
        batch_size=settings.batch_size,
        at=records.now(),
    )


def _keep_failure(cell: Cell, table: str, root: Path, error: Exception, board: Board) -> None:
    failure = records.Failure(
        id=cell.id,
        table=table,
        spec=cell.run.spec(models.identity(cell.run.model)),
        message=failures.sentence(error),
        traceback=failures.last_lines(error),
        at=records.now(),
    )
    try:
        records.write_failure(failure, root)
    except files.StorageError as second:
        board.say(str(second))


def _pace(chosen: Sequence[Cell], finished: dict[str, Record]) -> float | None:
    """Seconds per unit of work in the records at hand; None without one."""
    known = [(finished[cell.id].cost.seconds["total"], cell.work) for cell in chosen if cell.id in finished]
    return sum(seconds for seconds, _ in known) / sum(work for _, work in known) if known else None


def _headline(record: Record) -> str:
    values = [f"{key} {value['perplexity']:.2f}" for key, value in record.measures.items() if "perplexity" in value]
    return ", ".join([f"sparsity {record.achieved['sparsity']:.4f}", *values])
