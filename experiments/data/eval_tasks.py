"""Where the documents of lm-eval's tasks come from: the Hub, or files of a local folder.

By default each task reads its own Hub data set; those of the papers' tasks are all free of scripts in lm-eval 0.4.13
(piqa reads baber/piqa).  With a folder, the same tasks read `tasks/<task>_<split>.jsonl`, gzipped or not.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants

from eval import json_lines
from experiments.models import digests

HUB_TIMEOUT_S = 5
SUFFIXES = (".jsonl", ".jsonl.gz")
OTHERS: dict[str, tuple[type, ...]] = {  # columns that hold no text
    "label": (int, str), "answer": (int, str), "choices": (dict, list), "endings": (list,)
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Files by split, each the first that exists of the names given, the columns that the task reads, and how many
    documents it asks in all.

    `examples` names the split that few-shot examples come from; empty where it is not among the files.  A `group`
    has such files for each of its tasks, whose name stands for `{part}`.
    """

    splits: dict[str, tuple[str, ...]]
    columns: tuple[str, ...]
    documents: int
    examples: str = ""
    group: bool = False


def _tested(task: str, documents: int, *columns: str) -> Source:
    return Source({split: (f"tasks/{task}_{split}",) for split in ("validation", "test")}, columns, documents)


def _validated(task: str, documents: int, *columns: str, also: tuple[str, ...] = ()) -> Source:
    return Source({"validation": (f"tasks/{task}_validation", *also)}, columns, documents)


SOURCES = {
    "arc_challenge": _tested("arc_challenge", 1_172, "question", "choices", "answerKey"),
    "arc_easy": _tested("arc_easy", 2_376, "question", "choices", "answerKey"),
    "boolq": _validated("boolq", 3_270, "passage", "question", "label"),
    "hellaswag": _validated(
        "hellaswag", 10_042, "activity_label", "ctx_a", "ctx_b", "endings", "label",
        also=("tasks/hellaswag_validation_full_reconstructed", "tasks/hellaswag_validation_1000"),
    ),
    "mmlu": Source(
        {split: (f"tasks/{{part}}_{split}",) for split in ("dev", "test")}, ("question", "choices", "answer"),
        14_042, examples="dev", group=True,
    ),
    "openbookqa": _tested("openbookqa", 500, "question_stem", "choices", "answerKey"),
    "piqa": _validated("piqa", 1_838, "goal", "sol1", "sol2", "label"),
    "rte": _validated("rte", 277, "sentence1", "sentence2", "label"),
    "wikitext": Source({split: (f"wikitext2/pages_{split}",) for split in ("validation", "test")}, ("page",), 62),
    "winogrande": _validated("winogrande_xl", 1_267, "sentence", "option1", "option2", "answer"),
}  # fmt: skip
TEXTS = frozenset({"wikitext"})  # those that have a perplexity and no accuracy


def is_group(task: str) -> bool:
    """Whether a data folder has the files of each of its tasks."""
    return task in SOURCES and SOURCES[task].group


def documents(task: str) -> int | None:
    """How many a task asks in all; None of one that is not known here."""
    return SOURCES[task].documents if task in SOURCES else None


def changes(task: str, data_dir: Path | None, part: str = "", examples: int = 0) -> dict[str, Any]:
    """The task's configuration as far as its documents are concerned: {} reads the Hub.  `part` is a task of a group.

    Raises FileNotFoundError naming the file that is missing, also where there is none for `examples` in the prompt, and
    ValueError for one without the task's columns.
    """
    if data_dir is None:
        return {}
    files = {split: str(path) for split, path in _files(task, data_dir, part).items()}
    if examples and not SOURCES[task].examples:
        raise FileNotFoundError(
            "its few-shot examples have no known file in a data folder; leave out --data-dir to read them from the Hub"
        )
    # lm-eval loads the training split for few-shot prompts even where there are none
    return {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        "training_split": None,
    }


def provenance(task: str, data_dir: Path | None, parts: Iterable[str] = ("",)) -> dict[str, Any]:
    """Where the documents came from, for the record: files with their SHA-256, or the Hub."""
    if data_dir is None:
        return {"source": "hub"}
    paths = [path for part in parts for path in _files(task, data_dir, part).values()]
    return {"source": "files", "sha256": {path.name: digests.sha256(path) for path in paths}}


@functools.cache
def hub_reachable() -> bool:
    """Whether data sets can be had from the Hub: it answers, or downloads of an earlier day are asked for."""
    if constants.HF_HUB_OFFLINE:
        return True
    try:
        with urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_TIMEOUT_S):
            return True
    except HTTPError:
        return True  # it answered
    except OSError:
        return False


def _files(task: str, data_dir: Path, part: str) -> dict[str, Path]:
    if task not in SOURCES:
        raise FileNotFoundError(
            f"it has no known files in a data folder (only these tasks have: {', '.join(SOURCES)}); leave out "
            "--data-dir to read "
            "it from the Hub"
        )
    splits = SOURCES[task].splits.items()
    files = {split: _first([name.format(part=part) for name in names], Path(data_dir)) for split, names in splits}
    for path in files.values():
        _check_columns(path, SOURCES[task].columns)
    return files


def _first(names: Sequence[str], data_dir: Path) -> Path:
    for name in names:
        for suffix in SUFFIXES:
            if (path := data_dir / f"{name}{suffix}").exists():
                return path
    raise FileNotFoundError(f"there is no {names[0]}.jsonl or {names[0]}.jsonl.gz in {data_dir}")


def _check_columns(path: Path, columns: tuple[str, ...]) -> None:
    state = path.stat()
    _checked(path, columns, (state.st_size, state.st_mtime_ns, state.st_ino))


@functools.lru_cache(maxsize=512)
def _checked(path: Path, columns: tuple[str, ...], state: tuple[int, ...]) -> None:
    """Once for a file as it is: every record has every column, and texts in those that hold texts."""
    records = json_lines.read(path)
    if not records:
        raise ValueError(f"{path} holds no record; fetch it again.")
    if absent := [column for column in columns if column not in records[0]]:
        found = ", ".join(sorted(records[0])) or "none"
        raise ValueError(f"{path.name} has the columns {found}; the task needs {', '.join(absent)}, too")
    texts = [column for column in columns if column not in OTHERS]
    others = [column for column in columns if column in OTHERS]
    for number, record in enumerate(records, start=1):
        json_lines.check(record, texts, where := f"{path}: record {number:,}")
        for column in others:
            _check_other(column, record.get(column), records[0][column], where)


def _check_other(column: str, value: Any, first: Any, where: str) -> None:
    """Of the kind that the task takes, and of the kind of the first record's."""
    if not isinstance(value, OTHERS[column]):
        kinds = " or ".join(json_lines.KINDS[kind] for kind in OTHERS[column])
        raise ValueError(f"{where} has {json.dumps(value)[:80]} as {column!r}, where {kinds} must be.")
    if type(value) is not type(first):
        known = json_lines.KINDS[type(first)]
        raise ValueError(f"{where} has {json.dumps(value)[:80]} as {column!r}, and record 1 has {known}.")
