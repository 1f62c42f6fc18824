"""Downloads what cells read from the Hub, for machines without a network; and lists what is still missing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from experiments import estimate, models
from experiments.data import sources
from experiments.data.corpora import find as find_corpus
from experiments.measures import zero_shot
from experiments.models import hub
from experiments.spec import Run, ZeroShot


def prefetch(runs: Sequence[Run], data_dir: Path | None, say: Callable[[str], None]) -> list[str]:
    """Download the models, corpora and tasks' documents that are not on this machine; returns what is lacking still.

    What was downloaded before stays as it is.  With a data folder its files are looked for, and no others fetched.
    """
    folder, reasons = zero_shot.folder(data_dir), {}
    for name in dict.fromkeys(run.model for run in runs):
        reasons[name] = _fetched(name, _model, say)
    if folder is None:
        for name in dict.fromkeys(name for run in runs for name in estimate.corpora_of(run)):
            reasons[name] = _fetched(name, _corpus, say)
    absent = dict.fromkeys(text for run in runs for text in estimate.lacking(run, data_dir))
    told = [f"{text}{_why(reasons.get(text.partition(' ')[0]))}" for text in absent]
    return [*told, *([] if folder else _tasks(runs, say))]


def _fetched(name: str, fetch: Callable[[str], bool], say: Callable[[str], None]) -> str | None:
    """Say that it was fetched, if it was not here; why it could not be."""
    refused: tuple[type[Exception], ...] = (OSError, ValueError, *hub.refusals())
    try:
        if fetch(name):
            say(f"Fetched {name}.")
    except refused as error:
        return shorten(str(error) or type(error).__name__, 200)
    return None


def _model(name: str) -> bool:
    """Whether there was something to download."""
    lacking = [half for half in models.halves(models.find(name)) if models.absent(half)]
    if lacking and not hub.reachable():
        raise OSError("the Hub does not answer, or HF_HUB_OFFLINE is set")
    for half in lacking:
        hub.fetch(str(half.hub), half.revision or models.MAIN, pickled=bool(half.base))
    return bool(lacking)


def _corpus(name: str) -> bool:
    source = find_corpus(name)
    if source.hub is None or source.written or sources.is_here(source):
        return False
    if not hub.reachable():
        raise OSError("the Hub does not answer, or HF_HUB_OFFLINE is set")
    sources.fetch(source)
    return True


def _tasks(runs: Iterable[Run], say: Callable[[str], None]) -> list[str]:
    """Read the documents of every task as a measure does, which fetches them; those that cannot be read, and why."""
    asked: dict[int, dict[str, Any]] = {}
    for what in (what for run in runs for what in run.measures if isinstance(what, ZeroShot)):
        asked.setdefault(what.examples, {}).update({task: {} for task, _ in what.metrics})
    if not asked or zero_shot.documents(["wikitext"], None)[1]:  # none from the Hub, which is told already
        return []
    from eval import tasks  # lm-eval takes seconds to import

    lacking: dict[str, str] = {}
    for examples, wanted in asked.items():
        _, missing = tasks.load(wanted, examples)
        lacking |= missing
    read = [task for wanted in asked.values() for task in wanted if task not in lacking]
    if read:
        say(f"Task documents found: {', '.join(dict.fromkeys(read))}.")
    return [f"documents of {task}{_why(shorten(why, 200))}" for task, why in lacking.items()]


def _why(reason: str | None) -> str:
    return f": {reason.rstrip('.')}" if reason else ""
