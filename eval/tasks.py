"""lm-eval's tasks by name, loaded with their documents and few-shot examples.

A group whose accuracy lm-eval takes over the documents of all its tasks, such as MMLU, counts as one task.
"""

from __future__ import annotations

import difflib
import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Any

import datasets
import lm_eval
from huggingface_hub.errors import HfHubHTTPError
from jinja2 import TemplateError
from lm_eval.api.metrics import mean
from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY, METRIC_AGGREGATION_REGISTRY
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from eval import json_lines
from pruners.interface.suggest import UsageError

# the Hub's package changes its HTTP client between versions; the client's own errors are a base of its error
UNAVAILABLE = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, *HfHubHTTPError.__bases__)
# what lm-eval and a task's own functions raise for documents of another form than theirs
MISSHAPEN = (LookupError, TypeError, AttributeError, ArithmeticError, TemplateError)
ACCURACIES: list[dict[str, Any]] = [
    {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
]
EXAMPLES_SEED = 1234  # lm-eval's own, for tasks that draw their examples at random
PERPLEXITY = "measure a perplexity by its protocol key, such as wikitext2/test@2048"
Loaded = dict[str, dict[str, Task]]  # by name what was asked for, of that every task by name: one, or those of a group


@functools.cache
def task_manager(name: str) -> TaskManager:
    """lm-eval's index of the folder that declares the task or group of this name; of all folders where none does, and
    an empty one for a name that none of its files holds.

    To read all of them takes more than ten seconds, a folder takes none.
    """
    for folder in _declaring(name):
        found = TaskManager(include_defaults=False, include_path=folder)
        if name in (*found.all_subtasks, *found.all_groups) and _is_whole(name, found, folder):
            return found
    return _everything() if _says(name) else TaskManager(include_defaults=False)


@functools.cache
def _everything() -> TaskManager:
    return TaskManager()


def _declaring(name: str) -> Iterator[Path]:
    """The folder of the first file, in lm-eval's order, that says so."""
    line = re.compile(rb"^(?:task|group):[ \t]*(['\"]?)%s\1[ \t\r]*$" % re.escape(name.encode()), re.MULTILINE)
    for path, text in _declarations():
        if line.search(text):
            yield path.parent
            return


@functools.cache
def _declarations() -> list[tuple[Path, bytes]]:
    """Every file of lm-eval that may declare tasks, with what it says."""
    root = Path(lm_eval.tasks.__file__).parent
    return [(path, path.read_bytes()) for path in sorted(root.rglob("*.yaml"), key=Path.as_posix)]


def _says(name: str) -> bool:
    """Whether any file of lm-eval's tasks holds the name; some are included by others and are called anything."""
    root = Path(lm_eval.tasks.__file__).parent
    return any(name.encode() in path.read_bytes() for path in root.rglob("*") if path.is_file())


def _word(name: str) -> re.Pattern[bytes]:
    return re.compile(rb"(?<!\w)%s(?!\w)" % re.escape(name.encode()))


def _declared() -> list[str]:
    """Tasks, groups and tags that a file declares by name."""
    line = re.compile(rb"^(?:task|group|tag):[ \t]*(['\"]?)([\w.-]+)\1[ \t\r]*$", re.MULTILINE)
    return sorted({match[2].decode() for _, text in _declarations() for match in line.finditer(text)})


def _is_whole(name: Any, known: TaskManager, folder: Path) -> bool:
    """Whether the folder has all of a task, group or tag."""
    if not isinstance(name, str) or name not in known.task_index:
        return False
    if name in known.all_tags:
        word = _word(name)
        return not any(word.search(text) for path, text in _declarations() if folder not in path.parents)
    if name in known.all_groups:
        return all(_is_whole(child, known, folder) for child in (known.task_index[name].cfg or {})["task"])
    return True


def check_names(tasks: Sequence[str] | Mapping[str, Any]) -> None:
    """UsageError with the nearest names for a task that lm-eval does not have, or for a group without one accuracy."""
    for name in tasks:
        known = task_manager(name)
        if name not in known.task_index:
            near = ", ".join(difflib.get_close_matches(name, _declared(), n=3)) or "none"
            raise UsageError(f"lm-eval {lm_eval.__version__} has no task {name!r}; nearest: {near}.")
        if name in (*known.all_groups, *known.all_tags) and not _is_one_task(name):
            raise UsageError(
                f"{name!r} is a group for which lm-eval {lm_eval.__version__} gives no accuracy over all documents; "
                "ask for its tasks by their names."
            )


def check_metric(name: str, metric: str) -> None:
    """UsageError for a metric that the task, as lm-eval declares it, does not have or takes no mean of.

    A task that is a class of its own, or whose metrics are not named one by one, is believed.
    """
    for part in parts(name):
        known = _metrics(task_manager(name).task_index[part].cfg or {})
        if known is None or known.get(metric):
            continue
        means = [called for called, is_mean in known.items() if is_mean]
        instead = f"ask for {' or '.join(means)} in a table of your own" if means else PERPLEXITY
        raise UsageError(
            f"{name} has no {metric} that is a mean over its documents: lm-eval {lm_eval.__version__} scores {part} by "
            f"{', '.join(known)}; leave the task out, or {instead}."
        )


def _metrics(config: Mapping[str, Any]) -> dict[str, bool] | None:
    """By name, as `zero_shot` calls them, whether each is a mean; None where the declaration does not tell."""
    kind = config.get("output_type", "generate_until")  # lm-eval's own default
    declared = ACCURACIES if kind == "multiple_choice" else config.get("metric_list")
    if declared is None:
        declared = [{"metric": metric} for metric in DEFAULT_METRIC_REGISTRY.get(kind, ())]
    if not declared or "class" in config or any(told.get("hf_evaluate") for told in declared):
        return None
    ways = [way["name"] for way in config.get("filter_list") or ()]
    found: dict[str, bool] = {}
    for told in declared:
        metric = told["metric"].rpartition(".")[2] if "/" in told["metric"] else told["metric"]  # a function's path
        aggregate = told.get("aggregation") or METRIC_AGGREGATION_REGISTRY.get(metric, None)
        for called in [f"{metric},{way}" for way in ways] if len(ways) > 1 else [metric]:
            found[called] = aggregate in ("mean", mean)
    return found


def parts(name: str) -> tuple[str, ...]:
    """The tasks of a group in lm-eval's order, or the one task of that name."""
    return tuple(_parts(name, task_manager(name)))


def _parts(name: str, known: TaskManager) -> Iterator[str]:
    entry = known.task_index[name]
    if name in known.all_tags:
        yield from sorted(entry.tags)
    elif name not in known.all_groups:
        yield name
    else:
        for child in (entry.cfg or {})["task"]:
            yield from _parts(child, known)


def load(
    tasks: Mapping[str, Mapping[str, Any]], examples: int = 0, limit: int | None = None
) -> tuple[Loaded, dict[str, str]]:
    """lm-eval's task objects, asked with so many `examples`; and why others cannot be asked.

    A task with an answer that is none of its choices cannot, among its first `limit` documents or all of them.  What is
    asked for maps to changes of its configuration; a group to such changes by task of the group.
    """
    loaded: Loaded = {}
    missing: dict[str, str] = {}
    for name, changes in tasks.items():
        try:
            loaded[name] = dict(_load(name, changes, examples, limit))
        except _MissingError as error:
            missing[name] = str(error)
    return loaded, missing


class _MissingError(Exception):
    """A task cannot be asked here."""


def _load(name: str, changes: Mapping[str, Any], examples: int, limit: int | None) -> Iterator[tuple[str, Task]]:
    for part in parts(name):
        task = _known(name, part, changes if part == name else changes.get(part, {}), examples, limit)
        task.set_fewshot_seed(EXAMPLES_SEED)
        yield part, task


def _known(name: str, part: str, changes: Mapping[str, Any], examples: int, limit: int | None) -> Any:
    """The task as it was made for an earlier model of this process, while nothing that it is made of has changed.

    Its documents take seconds to read, to form and to check, once a cell.
    """
    try:
        told, states = json.dumps(changes, sort_keys=True), _states(changes)
    except (TypeError, OSError):  # a function among them, or a file that is about to be reported missing
        told = None
    if told is None or changes.get("dataset_path", "json") != "json":
        return _made(name, part, changes, examples, limit)
    return _remembered(name, part, told, states, examples, limit)


@functools.lru_cache(maxsize=64)  # MMLU has 57
def _remembered(name: str, part: str, told: str, states: Any, examples: int, limit: int | None) -> Any:
    return _made(name, part, json.loads(told), examples, limit)


def _states(changes: Mapping[str, Any]) -> tuple[tuple[int, int, int], ...]:
    """What changes with the files that the documents come from."""
    files = (changes.get("dataset_kwargs") or {}).get("data_files") or {}
    found = (Path(path).stat() for path in files.values())
    return tuple((state.st_size, state.st_mtime_ns, state.st_ino) for state in found)


def _made(name: str, part: str, changes: Mapping[str, Any], examples: int, limit: int | None) -> Any:
    try:
        task = _task(part, task_manager(name), changes)
    except UNAVAILABLE as error:
        what = f"its documents cannot be read: {shorten(str(error), 300)}"
        raise _MissingError(_told(name, part, what)) from error
    except MISSHAPEN as error:
        what = f"its documents are not of the form that lm-eval expects ({type(error).__name__}: {error})"
        raise _MissingError(_told(name, part, shorten(what, 300))) from error
    task.set_config(key="num_fewshot", value=examples)
    if examples and (held := len(task.sampler.df) if hasattr(task, "sampler") else 0) < examples:
        what = f"it has {held} documents to take the {examples} examples of its prompts from"
        raise _MissingError(_told(name, part, what))
    if what := _unanswerable(task, limit):
        raise _MissingError(_told(name, part, what))
    return task


def _unanswerable(task: Any, limit: int | None) -> str:
    """Why a document of multiple choice has no right answer, which lm-eval would count as wrong; empty if none."""
    if getattr(task, "OUTPUT_TYPE", "") != "multiple_choice":
        return ""
    for number, document in enumerate(islice(task.eval_docs, limit), start=1):
        try:
            choices = task.doc_to_choice(document)
            right = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        except (ValueError, *MISSHAPEN) as error:
            return f"its document {number} cannot be evaluated ({type(error).__name__}: {error})"
        if odd := [choice for choice in choices if not isinstance(choice, str)]:
            return f"its document {number} has the choice {odd[0]!r}, which is no text"
        wrong = [answer for answer in (right if isinstance(right, list) else [right]) if not _among(answer, choices)]
        if wrong:
            return f"its document {number} has the answer {wrong[0]!r}, which is not one of its {len(choices)} choices"
    return ""


def _among(answer: Any, choices: Sequence[str]) -> bool:
    return 0 <= answer < len(choices) if isinstance(answer, int) else answer in choices


def _told(name: str, part: str, what: str) -> str:
    if part == name:
        return what
    return f"it has no accuracy without all of its {len(parts(name))} tasks, and {part} is missing: {what}"


def _task(name: str, known: TaskManager, changes: Mapping[str, Any]) -> Any:
    """A group around a task is lm-eval's way to change its configuration."""
    config = known.task_index[name].cfg or {}
    if config.get("output_type") == "multiple_choice":
        changes = {**changes, "metric_list": ACCURACIES}
    if changes.get("dataset_path") == "json":
        changes = {**changes, "custom_dataset": _from_files}
    asked = {"group": f"{name}, changed", "task": [{"task": name, **changes}]} if changes else name
    (task,) = known.load([asked])["tasks"].values()
    for docs in ("training_docs", "validation_docs", "test_docs", "fewshot_docs"):  # which lm-eval makes each time
        setattr(task, docs, functools.cache(getattr(task, docs)))
    return task


def _from_files(data_files: Mapping[str, str], **_: Any) -> datasets.DatasetDict:
    """Read here: the loader of `datasets` keeps a copy in the user's home and stumbles over byte order marks."""
    splits = {split: json_lines.read(Path(path)) for split, path in data_files.items()}
    return datasets.DatasetDict({split: datasets.Dataset.from_list(records) for split, records in splits.items()})


def _is_one_task(group: str) -> bool:
    """Whether lm-eval weights the accuracies of the group's tasks, which it names, by their documents."""
    config = task_manager(group).task_index[group].cfg or {}
    weighted = (
        metric["metric"] == "acc" and metric.get("weight_by_size", True)
        for metric in config.get("aggregate_metric_list") or ()
    )
    return any(weighted) and all(isinstance(child, str) for child in config["task"])
