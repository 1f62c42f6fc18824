"""Takes a ZeroShot measure: finds documents, runs tasks, stores every document's answer beside the record."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.answers import write_samples
from experiments.data import eval_tasks
from experiments.data.sources import DATA_DIR
from experiments.models import hub
from experiments.spec import ZeroShot
from experiments.store import atomic
from experiments.store.described import describe, digest
from pruners.run import ranks

Progress = Callable[[int, int], None]
Values = dict[str, dict[str, Any]]
PERCENT = re.compile(r"(?!.*_acc$)(sacre)?(bleu|chrf|ter|rouge).*")  # which lm-eval has from 0 to 100
ROUNDING = 1e-6  # by which a share that is a sum of probabilities may miss 0 or 1
ACCURACIES = ("acc", "acc_norm")  # that every task of multiple choice has
UNREACHABLE = (
    "the Hub cannot be reached; run again with their documents in a --data-dir, or with HF_HUB_OFFLINE=1 where they "
    "were downloaded before"
)


@dataclass(frozen=True)
class Place:
    """`beside`: the record's path without its ending, where every document's answers go; `unfinished`: a folder for
    what a killed evaluation resumes from, to be removed once the record is written."""

    beside: Path
    unfinished: Path


def measure(
    what: ZeroShot, model: Any, tokenizer: Any, data_dir: Path | None, place: Place, progress: Progress | None = None
) -> Values:
    """Scores by protocol key; under `what.key` the mean over all its tasks, and which tasks are missing and why."""
    found, missing = documents(dict(what.metrics), data_dir, what.examples)
    values: Values = {what.key: {"missing": missing, **({"examples": what.examples} if what.examples else {})}}
    if not found:
        return values
    from eval import zero_shot  # lm-eval takes seconds to import, and its index of tasks more

    place_of_texts = folder(data_dir)
    origins = {task: provenance(task, place_of_texts) for task in found}
    store = place.unfinished / f"{_name(what)}.answers"
    result = zero_shot.zero_shot(
        model,
        tokenizer,
        found,
        what.limit,
        resume=store,
        progress=progress,
        examples=what.examples,
        released_marks=what.released_marks,
    )
    if changed := [task for task, origin in origins.items() if provenance(task, place_of_texts) != origin]:
        raise ValueError(
            f"The documents of {', '.join(changed)} changed while they were evaluated; run again, so that the record "
            "is of one text."
        )
    missing |= {task: {"reason": reason, "tried": origins[task]} for task, reason in result.missing.items()}
    for task, metric in what.metrics:
        if task in result.tasks and (reason := _no_score(result.tasks[task], metric)):
            missing[task] = {"reason": reason, "tried": origins[task], "measured": True}
    for task, score in result.tasks.items():
        values |= _task(what, task, score)
    values[what.key] |= {
        **({} if missing else _mean(what, {task: score.per_document for task, score in result.tasks.items()})),
        "lm_eval": result.lm_eval,
        **({"every_request_by_itself": result.apart} if result.apart else {}),
        "samples": ranks.here().first(lambda: _keep(result.samples, what, place)),
        "data": {task: origin for task, origin in origins.items() if task not in missing},
    }
    return values


def check(what: ZeroShot) -> None:
    """UsageError for tasks that lm-eval does not have, and for a metric that is none of its task's means.

    lm-eval's index is read only for what it may not have.
    """
    familiar = eval_tasks.SOURCES.keys() - eval_tasks.TEXTS
    asked = [(task, metric) for task, metric in what.metrics if task not in familiar or metric not in ACCURACIES]
    if not asked:
        return
    from eval import tasks  # lm-eval takes seconds to import

    tasks.check_names([task for task, _ in asked])
    for task, metric in asked:
        tasks.check_metric(task, metric)


def documents(
    tasks: Iterable[str], data_dir: Path | None, examples: int = 0
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Where each task's documents come from, as changes of its configuration (of a group by its tasks); and why the
    others have none."""
    place = folder(data_dir)
    if place is None and not eval_tasks.hub_reachable():
        return {}, {task: {"reason": UNREACHABLE, "tried": None} for task in tasks}
    found, missing = {}, {}
    for task in tasks:
        try:
            found[task] = _changes(task, place, examples)
        except (FileNotFoundError, ValueError) as error:
            missing[task] = {"reason": str(error), "tried": None}
    return found, missing


def obtainable(measured: Mapping[str, Any], data_dir: Path | None) -> bool:
    """Whether a task that a record lacks can be tried: on other documents than before, or again from the Hub."""
    place = folder(data_dir)
    missing = {task: why for task, why in measured.get("missing", {}).items() if not why.get("measured")}
    found = documents(missing, data_dir, measured.get("examples", 0))[0] if missing else {}
    return any(place is None or missing[task]["tried"] != provenance(task, place) for task in found)


def downloadable() -> bool:
    """Whether documents that are not here can be had from the Hub."""
    return hub.reachable()


def _changes(task: str, place: Path | None, examples: int) -> dict[str, Any]:
    if place is None or not eval_tasks.is_group(task):
        return eval_tasks.changes(task, place, examples=examples)
    return {part: eval_tasks.changes(task, place, part, examples) for part in _parts(task)}


def provenance(task: str, place: Path | None) -> dict[str, Any]:
    """Where a task's documents come from; FileNotFoundError or ValueError where the folder has none that fit."""
    return eval_tasks.provenance(task, place, _parts(task) if place and eval_tasks.is_group(task) else ("",))


def _parts(task: str) -> tuple[str, ...]:
    from eval import tasks  # lm-eval takes seconds to import

    return tasks.parts(task)


def folder(data_dir: Path | None) -> Path | None:
    """The folder of local documents: the one that was asked for, or the environment's; None is the Hub."""
    asked = data_dir or os.environ.get(DATA_DIR)
    return Path(asked).expanduser() if asked else None


def _name(what: ZeroShot) -> str:
    """Tells one run's evaluations apart."""
    return digest(describe(what) or {})


def _task(what: ZeroShot, task: str, score: Any) -> Values:
    about = {
        "documents": score.documents,
        "documents_sha256": score.documents_sha256,
        "truncated": score.truncated,
        "version": score.version,
        "revision": score.revision,
    }
    return {
        what.task_key(task, metric): {"score": value, "standard_error": score.standard_errors[metric], **about}
        if not _no_score(score, metric)
        else {"value": value, **about}
        for metric, value in score.metrics.items()
    }


def _no_score(score: Any, metric: str) -> str:
    """Why a metric of a task is no share that a table shows in per cent, such as a perplexity or BLEU; empty for one.

    Of a task that is a class of its own, the metrics are known only now.
    """
    if metric not in score.per_document:
        return f"lm-eval scores it by {', '.join(score.metrics)}, not by a mean {metric}"
    beyond = any(not -ROUNDING <= value <= 1 + ROUNDING for value in score.per_document[metric])
    return f"its {metric} is no share of documents" if beyond or PERCENT.fullmatch(metric) else ""


def _mean(what: ZeroShot, scores: Mapping[str, Mapping[str, list[float]]]) -> dict[str, Any]:
    """The task set's mean with its interval, of all its tasks: another mean is no such mean."""
    if not what.convention:
        return {}
    from eval.intervals import mean_over_tasks

    interval = mean_over_tasks({task: scores[task][metric] for task, metric in what.metrics}).to_dict()
    return {"score": interval.pop("value"), **interval}


def _keep(samples: Sequence[Mapping[str, Any]], what: ZeroShot, place: Place) -> dict[str, str]:
    """Every document's answers and scores, gzipped JSON lines."""
    path = place.beside.with_name(f"{place.beside.name}.{_name(what)}.jsonl.gz")
    with atomic.replacing(path) as temporary:
        write_samples(samples, temporary)
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
