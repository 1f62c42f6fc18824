"""Zero-shot tasks through lm-eval, on a model in memory.

The tasks, their prompts and their metrics are lm-eval's own.  What is added: where their documents come from is the
caller's choice, a task whose documents are missing does not stop the others, every document's answer is kept, so that
two models can be compared document by document, and a killed evaluation goes on where it was.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
from huggingface_hub.errors import HfHubHTTPError
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.answers import AnswerStore
from eval.intervals import standard_error
from eval.scorer import Progress, Scorer, fingerprint

# the Hub's package changes its HTTP client between versions; the client's own errors are a base of its error
UNAVAILABLE = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, *HfHubHTTPError.__bases__)
ACCURACIES = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]


@dataclass(frozen=True)
class TaskScore:
    """One task: its metrics with standard errors, and every document's own score for each metric.

    `documents_sha256` names the prompts and answers scored; two models may only be compared where it is equal.
    `truncated` counts documents whose beginning did not fit the model's positions.  `revision` is the Hub's commit of
    the documents, None for other sources.
    """

    version: Any
    revision: str | None
    documents: int
    documents_sha256: str
    truncated: int
    metrics: dict[str, float]
    standard_errors: dict[str, float | None]
    per_document: dict[str, list[float]] = field(repr=False)


@dataclass(frozen=True)
class ZeroShotResult:
    """`tasks` by name, `missing`: why a task could not be run, `samples`: one JSON-able row a document."""

    tasks: dict[str, TaskScore]
    missing: dict[str, str]
    samples: list[dict[str, Any]] = field(repr=False)
    lm_eval: str = lm_eval.__version__


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Mapping[str, Any]],
    limit: int | None = None,
    batch_size: int | None = None,
    resume: Path | None = None,
    progress: Progress | None = None,
) -> ZeroShotResult:
    """Evaluate `model` on lm-eval tasks with no example in the prompt.

    `tasks` maps lm-eval's task names to changes of their configuration: {} for the task as lm-eval has it, or where
    its documents come from.  `limit` keeps the first so many documents of each task.  `batch_size` None packs batches
    by tokens.  `resume` names a file that keeps finished batches until the caller removes it.  Raises LookupError
    for unknown tasks, ValueError for a limit below 1 and a tokenizer that does not fit the model.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is the number of documents of each task, at least 1; got {limit}.")
    check_names(tasks)
    with _quiet():
        loaded, missing = load(tasks)
        store = AnswerStore(resume, fingerprint(model)) if resume else None
        scorer = Scorer(model, tokenizer, batch_size, store, progress)
        outcome = evaluate(scorer, {"tasks": loaded}, limit=limit, bootstrap_iters=0) if loaded else {}
    scores = {name: _score(task, outcome, scorer.truncated[name]) for name, task in loaded.items()}
    samples = [_row(name, sample) for name in loaded for sample in outcome["samples"][name]]
    return ZeroShotResult(scores, missing, samples)


@functools.cache
def task_manager() -> TaskManager:
    """lm-eval's index of its tasks; reading it takes several seconds."""
    return TaskManager()


def check_names(tasks: Sequence[str] | Mapping[str, Any]) -> None:
    """LookupError with the nearest names for a task that lm-eval does not have."""
    known = task_manager().all_tasks
    for name in tasks:
        if name not in task_manager().task_index:
            near = ", ".join(difflib.get_close_matches(name, known, n=3)) or "none"
            raise LookupError(f"lm-eval {lm_eval.__version__} has no task {name!r}; nearest: {near}.")


def load(tasks: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Task], dict[str, str]]:
    """lm-eval's task objects with their documents, asked without examples; and why others have no documents."""
    loaded: dict[str, Task] = {}
    missing: dict[str, str] = {}
    for name, changes in tasks.items():
        try:
            loaded.update(_load(name, changes))
        except UNAVAILABLE as error:
            missing[name] = f"its documents cannot be read: {' '.join(str(error).split())[:300]}"
    for task in loaded.values():
        task.set_config(key="num_fewshot", value=0)
    return loaded, missing


def _load(name: str, changes: Mapping[str, Any]) -> dict[str, Task]:
    """The task, or the tasks of a group; a group around a task is lm-eval's way to change its configuration."""
    config = task_manager().task_index[name].cfg or {}
    if config.get("output_type") != "multiple_choice":
        return task_manager().load([_changed(name, changes)] if changes else [name])["tasks"]
    return task_manager().load([_changed(name, {**changes, "metric_list": ACCURACIES})])["tasks"]


def _changed(name: str, changes: Mapping[str, Any]) -> dict[str, Any]:
    return {"group": f"{name}, changed", "task": [{"task": name, **changes}]}


def _score(task: Task, outcome: Mapping[str, Any], truncated: int) -> TaskScore:
    name = task.task_name
    samples = outcome["samples"][name]
    values = {metric: [sample[metric] for sample in samples] for metric in samples[0]["metrics"]}
    per_document = {m: [float(v) for v in scores] for m, scores in values.items() if _are_numbers(scores)}
    results = {key.split(",")[0]: value for key, value in outcome["results"][name].items()}
    return TaskScore(
        version=outcome["versions"][name],
        revision=_revision(task),
        documents=len(samples),
        documents_sha256=_digest(samples),
        truncated=truncated,
        metrics={metric: float(results[metric]) for metric in values},
        standard_errors={metric: standard_error(scores) for metric, scores in per_document.items()},
        per_document=per_document,
    )


def _revision(task: Any) -> str | None:
    """The commit in the addresses that the documents were downloaded from."""
    info = getattr(task.eval_docs, "info", None)
    addresses = " ".join(getattr(info, "download_checksums", None) or ())
    found = re.search(r"hf://datasets/[^@\s]+@([0-9a-f]{40})", addresses)
    return found.group(1) if found else None


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) for value in values)


def _digest(samples: Sequence[Mapping[str, Any]]) -> str:
    asked = [(sample["arguments"], str(sample["target"])) for sample in samples]
    return hashlib.sha256(json.dumps(asked, default=str).encode()).hexdigest()


def _row(name: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of a document: its number, its hash, the answers' log-likelihoods and its scores."""
    answers = [answer[0] if isinstance(answer, tuple | list) else answer for answer in sample["filtered_resps"]]
    scores = {metric: sample[metric] for metric in sample["metrics"]}
    return {"task": name, "document": sample["doc_id"], "sha256": sample["doc_hash"], "answers": answers, **scores}


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's and datasets' own bars and notes; the caller's progress is the one that counts."""
    logger, bar = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level, bars = logger.level, datasets.are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        lm_eval.api.task.tqdm = bar
        logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
