"""Estimates of a cell's cost, and the inputs that are missing here, before it runs.

    GPU memory    see `needs`
    GPU hours     2 * parameters * tokens / (half of an A100's 312 TFLOP/s), a backward pass counting twice, and
                  the weights read once

Rough and rather high: methods run near half of the peak at best, evaluation below it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from experiments import measures, models, rates
from experiments.cells import Cell, ordered, same_model
from experiments.data import corpora as corpora_here
from experiments.data import eval_tasks, sources, wheels
from experiments.data.corpora import find as find_corpus
from experiments.measures import dense_gate, zero_shot
from experiments.models import hub
from experiments.placement.stages import BYTES
from experiments.recovery import Documents, Instructions, Retraining, schedule, training_tokens
from experiments.spec import Run, ZeroShot
from pruners.unstructured import Unstructured

SUSTAINED_FLOPS = 156e12
READ_BYTES_PER_SECOND = 1e9
CARD_GB = 80  # an A100 or H100


def gpu_hours(cell: Cell, away: bool = False) -> float:
    """`away`: the weights are read in every sweep, which hides behind the arithmetic or hides it."""
    return _hours(cell.run, cell.work, sweeps(cell.run) if away else 1, away)


def _hours(run: Run, tokens: float, reads: int, away: bool) -> float:
    parameters = parameters_of(run.model)
    reading = reads * BYTES.get(run.dtype, 2) * parameters / READ_BYTES_PER_SECOND
    computing = 2 * parameters * tokens / SUSTAINED_FLOPS
    return (max(reading, computing) if away else reading + computing) / 3600


def sweeps(run: Run) -> int:
    """How often a cell reads its weights where they are away from home, roughly."""
    count = _measuring_sweeps(run)
    if isinstance(run.recovery, Retraining):
        grid = rates.grid(run)  # each of which is tried
        # forward and back; what is trained is looked at, and merged
        count += (2 * run.recovery.taken + 8) * (len(grid.rates) if grid else 1)
    if run.method is not None:
        kind = str((run.method.statistics_key or {}).get("kind"))
        count += {"gradient_norms": 2, "group_scores": 4, "moments": 1}.get(kind, 0)
        count += 1 if isinstance(run.method, Unstructured) else 3  # weights to check, to score and to cut
    return count


def _measuring_sweeps(run: Run) -> int:
    return 2 * len(run.measures)  # a few tokens that show the model is sound, and the text


def total_gpu_hours(cells: Sequence[Cell], away: Collection[Cell] = ()) -> float:
    """Of these cells one after the other, as a table and a job run them: what they share is made once, models, dense
    statistics and steps of retraining.  `away` are those whose weights are."""
    inorder = ordered(cells)
    made = makers(inorder)
    hours = sum(gpu_hours(cell, cell in away) for cell in made)
    for cell in inorder:
        if cell not in made:
            reads = _measuring_sweeps(cell.run) if cell in away else 0
            hours += _hours(cell.run, cell.work - cell.making_work, reads, cell in away)
    in_place = [cell for cell in made if cell not in away]  # away, what is not computed again is mostly read again
    saved = taken_over(in_place) + shared_statistics(in_place)
    return hours - sum(2 * parameters_of(model) * tokens for model, tokens in saved.items()) / SUSTAINED_FLOPS / 3600


def makers(cells: Sequence[Cell], lasts: Callable[[Cell], bool] = lambda cell: True) -> list[Cell]:
    """Of cells that run one after the other those that make their model; the others measure that of the cell before.
    `lasts` says whether the model that a cell has made outlives it."""
    others = (cell for before, cell in pairwise(cells) if not (same_model(before, cell) and lasts(cell)))
    return [*cells[:1], *others]


def shared_statistics(cells: Iterable[Cell]) -> Counter[str]:
    """By model the tokens of dense statistics that `Cell.work` counts for every cell and that these cells do once."""
    seen: set[Any] = set()
    saved: Counter[str] = Counter()
    for cell in cells:
        run = cell.run
        if run.method is not None and run.method.statistics_key and run.windows:
            key = (run.model, run.dtype, run.windows, repr(run.method.statistics_key))
            saved[run.model] += 3 * run.windows.count * run.windows.length * (key in seen)
            seen.add(key)
    return saved


def taken_over(cells: Iterable[Cell]) -> Counter[str]:
    """By model the tokens of training that `Cell.work` counts for every cell and that these cells do once."""
    counted: dict[Run, list[int]] = {}
    for cell in cells:
        if whole := schedule(cell.run):
            counted.setdefault(whole, []).append(training_tokens(cell.run.recovery))
    saved: Counter[str] = Counter()
    for whole, tokens in counted.items():
        saved[whole.model] += sum(tokens) - max(tokens)
    return saved


def parameters_of(model: str) -> int:
    """Of the catalogue, or of the folder's own configuration; 0 where nobody knows."""
    return models.find(model).parameters or 0


def lacking(run: Run, data_dir: Path | None = None) -> list[str]:
    """The model, the corpora and the tasks' documents that are not on this machine, each with where it would come from.

    Documents that the Hub would give are not told: a task fetches them once it is asked.
    """
    folder = zero_shot.folder(data_dir)
    texts = (text for name in corpora_of(run) for text in _corpus(name, folder))
    tasks = (text for what in run.measures if isinstance(what, ZeroShot) for text in _documents(what, folder))
    return [*_model(run.model), *texts, *_short(run, data_dir), *tasks]


def partial(run: Run, data_dir: Path | None = None) -> list[str]:
    """The corpora and tasks of which the data folder has only a part, with which a cell runs all the same."""
    if (folder := zero_shot.folder(data_dir)) is None:
        return []
    there: dict[str, tuple[int, int]] = {}
    for name in corpora_of(run):
        source = find_corpus(name)
        if not (source.package or source.written):
            with suppress(FileNotFoundError, ValueError):  # told as lacking, or by the cell where it is damaged
                there[name] = sources.count(sources.local(name, source, folder)), source.rows
    for what in (what for what in run.measures if isinstance(what, ZeroShot) and not what.limit):
        found, _ = zero_shot.documents([task for task, _ in what.metrics], folder, what.examples)
        for task, changes in found.items():
            there[task] = sum(map(sources.count, _asked_files(changes))), eval_tasks.documents(task) or 0
    short = {text.partition(" (")[0] for text in _short(run, data_dir)}
    return [
        f"{name} ({count:,} of {whole:,} records)"
        for name, (count, whole) in there.items()
        if 0 < count < whole and name not in short
    ]


def _asked_files(changes: dict[str, Any]) -> list[Path]:
    """Of a task's configuration the file of the split that is asked, the last; of a group those of its tasks."""
    if files := changes.get("dataset_kwargs"):
        return [Path(list(files["data_files"].values())[-1])]
    return [path for part in changes.values() for path in _asked_files(part)]


def corpora_of(run: Run) -> list[str]:
    """The corpora that a cell reads, with those of its dense gate and of the choice of its learning rate."""
    gated = dense_gate.asked(run.measures, models.find(run.model))
    corpora = [name for what in (*run.measures, *gated) for name in measures.corpora_of(what)]
    if run.windows and run.calibrates:
        corpora.append(run.windows.corpus)
    if isinstance(run.recovery, Retraining):
        corpora += run.recovery.corpora
    if run.tuning:
        corpora.append(run.tuning.grid.corpus)
    return list(dict.fromkeys(corpora))


def _short(run: Run, data_dir: Path | None) -> Iterator[str]:
    """The text of a retraining whose file in the data folder has too few records for it."""
    text = run.recovery.text if isinstance(run.recovery, Retraining) else None
    folder = zero_shot.folder(data_dir)
    if not isinstance(text, Documents | Instructions) or not folder or find_corpus(text.corpus).package:
        return
    try:
        there = len(corpora_here.rows(text.corpus, data_dir))
    except (FileNotFoundError, ValueError):  # absent, which is told already, or damaged, which the cell will tell
        return
    wanted = text.count if isinstance(text, Documents) else text.held_out + 1
    if there < wanted:
        yield f"{text.corpus} ({there:,} of {wanted:,} records in {folder})"


def _model(name: str) -> Iterator[str]:
    for found in models.halves(models.find(name)):
        called = name if name.partition("=")[0] == found.name else found.name
        if found.hub and (absent := models.absent(found)):
            size = f", {2e-9 * found.parameters:.0f} GB" if found.parameters else ""
            part = f", without its {' and '.join(absent)}" if len(absent) < len(hub.PARTS) else ""
            yield f"{called} ({found.hub}{size}{part})"
        if found.package and not _installed(found.package):
            yield f"{called} (package {found.package})"


def _corpus(name: str, folder: Path | None) -> Iterator[str]:
    source = find_corpus(name)
    if source.written:
        return
    if source.package:
        if not _installed(source.package):
            yield f"{name} (package {source.package})"
    elif folder:
        if not any((folder / f"{file}{zipped}").is_file() for file in source.local for zipped in ("", ".gz")):
            yield f"{name} (not in {folder})"
    elif source.hub is None:
        yield f"{name} (a data folder)"
    elif not sources.is_here(source):
        yield f"{name} ({source.hub[0]})"


def _documents(what: ZeroShot, folder: Path | None) -> Iterator[str]:
    _, missing = zero_shot.documents([task for task, _ in what.metrics], folder, what.examples)
    if missing:
        yield f"documents of {', '.join(missing)} ({f'not in {folder}' if folder else 'the Hub cannot be reached'})"


def _installed(package: str) -> bool:
    try:
        wheels.version(package)
    except ModuleNotFoundError:
        return False
    return True
