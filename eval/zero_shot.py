"""Zero-shot and few-shot tasks through lm-eval, on a model in memory.

The tasks, their prompts, the examples in them and their metrics are lm-eval's own.  What is added: where their
documents come from is the caller's choice, a task whose documents are missing does not stop the others, every
document's answer is kept, so that two models can be compared document by document, and a killed evaluation goes on
where it was.  A group whose accuracy lm-eval weights by documents, such as MMLU, counts as one task.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
from lm_eval.api.metrics import mean, pooled_sample_stderr
from lm_eval.api.task import Task
from lm_eval.evaluator import evaluate
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.answers import AnswerStore
from eval.chatglm import scorer as scorer_of
from eval.checks import Progress, check_model, check_tokenizer, measuring
from eval.intervals import standard_error
from eval.scorer import fingerprint
from eval.tasks import check_names, load, task_manager
from pruners.interface import checks
from pruners.interface.checks import Count, PathLike, Whole
from pruners.run import ranks


@dataclass(frozen=True)
class TaskScore:
    """One task: its metrics, and of those that are means the standard error and every document's own score.

    Where lm-eval reads an answer in several ways (its filters), each gives metrics of its own, such as
    `exact_match,strict-match`.
    `documents_sha256` names the prompts and answers scored; two models may only be compared where it is equal.
    `truncated` counts documents whose beginning did not fit the model's positions.  `revision` is the Hub's commit of
    the documents, None for other sources.  A group's scores are those of all its documents, one task after the other.
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
    """`tasks` by name, `missing`: why a task could not be run, `samples`: one JSON-able row a document.

    `apart`: why every request was computed by itself; None where those with a common beginning shared it.
    """

    tasks: dict[str, TaskScore]
    missing: dict[str, str]
    samples: list[dict[str, Any]] = field(repr=False)
    lm_eval: str = lm_eval.__version__
    apart: str | None = None


@checks.arguments
def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, Mapping[str, Any]],
    limit: Whole | None = None,
    batch_size: Count | None = None,
    resume: PathLike | None = None,
    progress: Progress | None = None,
    examples: Whole = 0,
    released_marks: bool = False,
) -> ZeroShotResult:
    """Evaluate `model` on lm-eval tasks with so many `examples` in the prompt, chosen as lm-eval chooses them.

    `tasks` maps lm-eval's task names to changes of their configuration: {} for the task as lm-eval has it, or where
    its documents come from; a group maps to such changes by task of the group, and is missing where one of its tasks
    is.  `limit` keeps the first so many documents of each task.  `batch_size` None packs rows by tokens, in which
    requests with a common beginning share it; a number computes so many at once, each by itself.  `resume` names a file
    that keeps finished rows or batches until the caller removes it.  The ranks of a launch share them and have the same
    result; rank 0 keeps the file.  `released_marks` asks ChatGLM as LLM-Pruner's
    released harness does, with `[gMASK] <sop>` behind every choice, too, and scored with it (its table 5).  Raises
    UsageError for unknown tasks, ValueError for a limit below 1, `examples` below 0, a tokenizer that does not fit the
    model, and `released_marks` for a model without such marks.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is the number of documents of each task, at least 1; got {limit}.")
    if examples < 0:
        raise ValueError(f"examples is the number of examples in the prompt, at least 0; got {examples}.")
    checks.mapping("tasks", tasks, "a mapping of lm-eval's task names to changes of their configuration, {} for none")
    for name, changes in tasks.items():
        checks.mapping(f"tasks[{name!r}]", changes, "a mapping of changes to the task's configuration, {} for none")
    check_model(model)
    check_tokenizer(model, tokenizer)
    check_names(tasks)
    with _quiet(), measuring(model):
        loaded, missing = load(tasks, examples, limit)
        each = {part: task for group in loaded.values() for part, task in group.items()}
        identity = fingerprint(model) if resume else ""
        store = AnswerStore(resume, identity) if resume and ranks.here(model.device).rank == 0 else None
        scorer = scorer_of(model, tokenizer, batch_size, store, progress, released=released_marks)
        outcome = evaluate(scorer, {"tasks": each}, limit=limit, bootstrap_iters=0) if each else {}
    scored = {part: _score(task, outcome, scorer.truncated[part]) for part, task in each.items()}
    scores = {name: scored[name] if name in group else _pooled(name, group, scored, outcome["samples"])
              for name, group in loaded.items()}  # fmt: skip
    samples = [_row(name, part, rows) for name, group in loaded.items() for part in group
               for rows in zip(*_by_filter(outcome["samples"][part]).values(), strict=True)]  # fmt: skip
    return ZeroShotResult(scores, missing, samples, apart=scorer.apart)


def _score(task: Task, outcome: Mapping[str, Any], truncated: int) -> TaskScore:
    name = task.task_name
    ways, means = _by_filter(outcome["samples"][name]), _means(task)
    metrics: dict[str, float] = {}
    per_document: dict[str, list[float]] = {}
    for way, samples in ways.items():
        for metric in samples[0]["metrics"]:
            called = _called(metric, way, len(ways))
            metrics[called] = float(outcome["results"][name][f"{metric},{way}"])
            scores = [sample[metric] for sample in samples]
            if metric in means and _are_numbers(scores):
                per_document[called] = [float(score) for score in scores]
    documents = next(iter(ways.values()))
    return TaskScore(
        version=outcome["versions"][name],
        revision=_revision(task),
        documents=len(documents),
        documents_sha256=_digest(documents),
        truncated=truncated,
        metrics=metrics,
        standard_errors={metric: standard_error(scores) for metric, scores in per_document.items()},
        per_document=per_document,
    )


def _by_filter(samples: Iterable[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """lm-eval has every document once for each way in which an answer is read."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        found.setdefault(sample["filter"], []).append(sample)
    return found


def _called(metric: str, way: str, ways: int) -> str:
    return f"{metric},{way}" if ways > 1 else metric


def _means(task: Task) -> set[str]:
    """The metrics that are means of the documents' scores; of others the scores' spread is no error."""
    return {metric for metric, aggregate in task.aggregation().items() if aggregate is mean}


def _pooled(
    name: str, group: Iterable[str], scored: Mapping[str, TaskScore], samples: Mapping[str, Sequence[Any]]
) -> TaskScore:
    """The group's score over all its documents; its standard error as lm-eval pools those of the tasks."""
    found = [scored[part] for part in group]
    per_document = {m: [v for score in found for v in score.per_document[m]] for m in found[0].per_document}
    return TaskScore(
        version=(task_manager(name).task_index[name].cfg or {}).get("metadata", {}).get("version"),
        revision=", ".join(sorted({score.revision for score in found if score.revision})) or None,
        documents=sum(score.documents for score in found),
        documents_sha256=_digest([s for part in group for s in next(iter(_by_filter(samples[part]).values()))]),
        truncated=sum(score.truncated for score in found),
        metrics={metric: fmean(values) for metric, values in per_document.items()},
        standard_errors={metric: _pooled_error(metric, found) for metric in per_document},
        per_document=per_document,
    )


def _pooled_error(metric: str, found: Sequence[TaskScore]) -> float | None:
    errors = [score.standard_errors[metric] for score in found]
    known = [error for error in errors if error is not None]
    if len(known) < len(errors):  # a task of one document has no spread
        return None
    return float(pooled_sample_stderr(known, [score.documents for score in found]))


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


def _row(name: str, part: str, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is kept of a document: its number in its task, its hash, the answers' log-likelihoods and its scores.

    Answers that are read in several ways stand there by the way.
    """
    answers = {sample["filter"]: [_answer(one) for one in sample["filtered_resps"]] for sample in samples}
    scores = {_called(m, sample["filter"], len(samples)): sample[m] for sample in samples for m in sample["metrics"]}
    whose = {"task": name} if part == name else {"task": name, "part": part}
    read = answers if len(samples) > 1 else next(iter(answers.values()))
    return {**whose, "document": samples[0]["doc_id"], "sha256": samples[0]["doc_hash"], "answers": read, **scores}


def _answer(response: Any) -> Any:
    return response[0] if isinstance(response, tuple | list) else response


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
