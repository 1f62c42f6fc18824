"""Whether a stored record still counts for a run: from the same texts, at the same learning rate, by the same code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import measures, rates
from experiments.cells import Cell
from experiments.data import corpora
from experiments.measures import zero_shot
from experiments.spec import Run
from experiments.store import code, records
from experiments.store.records import Record

ABSENT = (FileNotFoundError, ModuleNotFoundError)
OTHER_RATE = "The learning rate of {} is not the one that is chosen now; rerunning."
OTHER_CHOICE = "The learning rate of {} was chosen on another text or by other code and is chosen again; rerunning."


def stands(record: Record, run: Run, root: Path, data_dir: Path | None, again: bool = False) -> bool:
    """Whether the record is to be kept: it lacks nothing that can be measured now and was made from the texts that the
    run would read, at the learning rate that it would take; with `again` also by the code that the run would use."""
    if measures.lacking(record.measures, data_dir) or other_data(record, data_dir):
        return False
    if chosen_anew(record, run, root, data_dir, again):
        return False
    return not again or code.made_by(record.code, run) == "same"


def chosen_anew(record: Record, run: Run, root: Path, data_dir: Path | None, again: bool = False) -> bool:
    """Whether the learning rate of a tuned run is by now another than the record's, or is to be chosen again."""
    return bool(_why_anew(record, run, root, data_dir, again))


def _why_anew(record: Record, run: Run, root: Path, data_dir: Path | None, again: bool) -> str:
    """What is no longer so of the learning rate of a tuned run, whose choice is another cell; empty where it stands."""
    about = record.achieved.get("rate_choice")
    if not about or not run.tuning:
        return ""
    choice = records.find(root, run.tuning.table, about["record"])
    if choice is None:  # nothing to compare with; the record has the text that its rate was chosen on
        return ""
    if choice.measures[run.tuning.grid.key]["learning_rate"] != about["learning_rate"]:
        return OTHER_RATE
    return "" if stands(choice, rates.choice(run), root, data_dir, again) else OTHER_CHOICE


def finished(
    chosen: Sequence[Cell], known: Mapping[str, Record], root: Path, data_dir: Path | None, again: bool = False
) -> dict[str, Record]:
    """Of these cells, by id, the records that are to be kept."""
    return {
        cell.id: known[cell.id]
        for cell in chosen
        if cell.id in known and stands(known[cell.id], cell.run, root, data_dir, again)
    }


def lines(recorded: Sequence[tuple[Cell, Record]], root: Path, data_dir: Path | None, again: bool = False) -> list[str]:
    """What a user is told of the records of these cells: which were made from other texts or at a learning rate that
    is not or no longer chosen, how many by other code."""
    other: dict[str, list[str]] = {}
    anew: dict[str, list[str]] = {}
    makers: Counter[str] = Counter()
    for cell, record in recorded:
        texts = other_data(record, data_dir)
        for text in texts:
            other.setdefault(text, []).append(cell.label)
        if not texts and (why := _why_anew(record, cell.run, root, data_dir, again)):
            anew.setdefault(why, []).append(cell.label)
        elif not texts:
            makers[code.made_by(record.code, cell.run)] += 1
    told = [why.format(_some(labels)) for why, labels in anew.items()]
    return [*(_from_other(text, labels) for text, labels in other.items()), *told, *_by_other(makers, again)]


def _from_other(text: str, labels: Sequence[str]) -> str:
    return f"{text} differs from the text that the record of {_some(labels)} was made from; rerunning."


def _by_other(makers: Mapping[str, int], again: bool) -> list[str]:
    told = {
        "other": "by a different version of their method's or measures' code",
        "unknown": "before records stored the version of this code",
    }
    made = [f"{makers[kind]} made {words}" for kind, words in told.items() if makers[kind]]
    way = "rerunning" if again else "--again reruns them"
    return [f"Of the records found, {' and '.join(made)}: {way}."] if made else []


def incomplete(made: Sequence[tuple[str, Record]]) -> list[str]:
    """Which tasks these records lack and why, a line a reason; `made` are labels with their records."""
    cells: dict[str, dict[str, None]] = {}
    tasks: dict[str, dict[str, None]] = {}
    for label, record in made:
        for task, reason in measures.missing(record.measures).items():
            cells.setdefault(reason, {})[label] = None
            tasks.setdefault(reason, {})[task] = None
    return [
        f"Incomplete: {_some(list(labels))}, without {', '.join(tasks[reason])}: {reason.rstrip('.')}."
        for reason, labels in cells.items()
    ]


def _some(labels: Sequence[str]) -> str:
    return labels[0] if len(labels) == 1 else f"{labels[0]} and {len(labels) - 1} more"


def other_data(record: Record, data_dir: Path | None) -> list[str]:
    """The texts that a run would read now and that the record was not made from, each with its file.

    What cannot be had here is not told: nothing else could be read in its place.
    """
    return [*_other_corpora(record, data_dir), *_other_tasks(record, data_dir)]


def _other_corpora(record: Record, data_dir: Path | None) -> Iterator[str]:
    for name, made_from in record.data.items():
        try:
            now = corpora.origin(name, data_dir)
        except ABSENT:
            continue
        if not same_text(now, made_from):
            yield f"{name} ({_named(now)})"


def _other_tasks(record: Record, data_dir: Path | None) -> Iterator[str]:
    place = zero_shot.folder(data_dir)
    for measured in record.measures.values():
        for task, made_from in measured.get("data", {}).items():
            if place is None and (made_from["source"] == "hub" or not zero_shot.downloadable()):
                continue
            try:
                now = zero_shot.provenance(task, place)
            except (FileNotFoundError, ValueError):
                continue
            if not same_text(now, made_from):
                yield f"{task} ({_named(now)})"


def same_text(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether both are of one text, by the digests of files, wherever one file lies, or by the files of a commit."""
    files, others = _files(one), _files(other)
    if isinstance(files, dict) and isinstance(others, dict):
        return files == others or (len(files) == len(others) == 1 and [*files.values()] == [*others.values()])
    return all(one.get(part) == other.get(part) for part in ("source", "dataset", "revision", "files", "sha256"))


def _files(origin: Mapping[str, Any]) -> Any:
    return origin.get("sha256") or origin.get("files")


def _named(origin: dict[str, Any]) -> str:
    files = _files(origin) or ()
    place = f"{origin['dataset']} at {origin['revision'][:10]}" if "dataset" in origin else ", ".join(files)
    return place or "the Hub"
