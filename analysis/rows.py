"""A table's rows: every declared cell beside its record, its failure, or nothing."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments import cli, models, papers
from experiments.data import eval_tasks
from experiments.labels import apart, distinct, experiment, full, labels, seed
from experiments.models.catalogue import CATALOGUE, halves, split
from experiments.models.fingerprint import fingerprint
from experiments.spec import Run, Table, ZeroShot
from experiments.store import code, found, records
from experiments.store.keys import run_key, stable_key
from experiments.store.records import Failure, Record
from pruners.interface.suggest import UsageError

logger = logging.getLogger(__name__)

COST = "cost"
Folders = Path | Sequence[Path]  # one results folder or several, the first of which goes first


class NoRecordsError(UsageError):
    """No cell of a table was ever run as asked; `rows` are those that would stand there."""

    def __init__(self, message: str, rows: Sequence[Row] = ()) -> None:
        super().__init__(message)
        self.rows = list(rows)


@dataclass(frozen=True)
class Row:
    """`method` and `setting` are what a reader calls the cell, `words` the paper's words for them, by which numbers are
    joined; `called` tells the cell from every other one of its table, by model and seed where words do not; `folder` is
    the results folder that its record is in;
    `withheld` says why its record is not shown, a clause a reason, e.g. a text, with its file, that the record was not
    made from."""

    method: str
    setting: str
    run: Run
    record: Record | None
    failure: Failure | None
    withheld: tuple[str, ...] = ()
    folder: Path | None = None
    words: tuple[str, str] = ("", "")
    called: str = ""

    @property
    def code(self) -> str | None:
        """By which code of its method and measures the record was made: same as here, other, or unknown."""
        return code.made_by(self.record.code, self.run) if self.record else None

    @property
    def is_dated(self) -> bool:
        """Whether the record is, or may be, of an earlier version of the code."""
        return self.code in ("other", "unknown")

    @property
    def state(self) -> str:
        return "done" if self.record else "failed" if self.failure else "missing"

    @property
    def label(self) -> str:
        return full((self.method, self.setting))

    @property
    def name(self) -> str:
        return self.called or self.label

    @property
    def is_dense(self) -> bool:
        return self.run.method is None and self.run.recovery is None and not self.run.quantised

    @property
    def partial(self) -> list[str]:
        """The corpora of which only a part was at hand."""
        data = self.record.data if self.record else {}
        return [name for name, source in data.items() if source.get("complete") is False]

    def partial_of(self, key: str) -> list[str]:
        """The same for one number, with the tasks behind it that had fewer documents than they have in all."""
        return self.partial + [told for keys, told in self._partial_tasks() if key in keys]

    def _partial_tasks(self) -> Iterator[tuple[tuple[str, str], str]]:
        """With the keys of its score and of the mean; of tasks that were not limited to their first documents."""
        zero_shot = [what for what in self.run.measures if isinstance(what, ZeroShot) and not what.limit]
        for asked, task, metric in ((what, *pair) for what in zero_shot for pair in what.metrics):
            key = asked.task_key(task, metric)
            found, whole = (self.measure(key) or {}).get("documents"), eval_tasks.documents(task)
            if found and whole and found < whole:
                yield (key, asked.key), f"{task} ({found:,} of {whole:,} documents)"

    @property
    def seed(self) -> int | None:
        """What tells rows with the same words apart."""
        return seed(self.run)

    @property
    def draw(self) -> tuple[int | None, int | None]:
        """The seed with the order of the windows, where that is not as they were drawn; both None of what draws
        nothing."""
        return self.seed, self.run.windows.order if self.run.windows else None

    def measure(self, key: str) -> dict[str, Any] | None:
        """What was measured under this very protocol key, if anything.

        `COST` is what the cell itself took: hours of retraining, of all processes together, and the share of the
        parameters that it trained.
        """
        if self.record and key == COST:
            recovery = self.record.achieved.get("recovery") or {}
            seconds, processes = recovery.get("seconds"), recovery.get("processes", 1)
            if seconds is None:
                return None
            return {"retraining_hours": processes * seconds / 3600, "trained_share": recovery.get("share")}
        return self.record.measures.get(key) if self.record else None


def rows(
    table: Table,
    root: Folders,
    model: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    data_dir: Path | None = None,
) -> list[Row]:
    """One row per declared cell, in the table's order; raises NoRecordsError if none was ever run.

    A cell that several results folders have is shown from the first of them, with a warning where their numbers differ.
    With `data_dir` a record is withheld that was made from other texts than lie there, or at a learning rate that is
    by now chosen anew.
    """
    made = declared(table, root, papers.runs(table, model, dtype, limit, tasks), data_dir)
    if all(row.state == "missing" and not row.withheld for row in made):
        again = cli.selection(table.name, folders(root)[0], model, dtype, limit, tasks, data_dir)
        raise NoRecordsError(_nothing(table, root, [row.run for row in made], again), made)
    return made


def declared(table: Table, root: Folders, runs: Sequence[Run], data_dir: Path | None = None) -> list[Row]:
    """One row for each of the table's `runs`, in their order, whether or not any has a record (`data_dir`: see `rows`).

    ValueError where records are of several models whose folders have the same name and which is meant cannot be told.
    """
    places = folders(root)
    stored = {place: records.load(place, table.name) for place in places}
    failures = {place: records.load_failures(place, table.name) for place in places}
    tell_apart(stored)
    done, broken = _by_key(merged(stored)), _by_key(merged(failures))
    words = labels(runs, table.label)
    titles = distinct(runs, [table.title_of(told) for told in words])
    made = [
        Row(*title, run, _newest(done[run_key(run)], run), _newest(broken[run_key(run)], run), words=told, called=name)
        for run, title, told, name in zip(runs, titles, words, apart(runs, titles), strict=True)
    ]
    made = [replace(row, folder=holder(row.record, stored)) for row in made]
    return [_as_now(row, data_dir) for row in made] if data_dir else made


def folders(root: Folders) -> list[Path]:
    """Each once, in their order; ValueError for none."""
    found = list(dict.fromkeys([Path(root)] if isinstance(root, str | Path) else map(Path, root)))
    if not found:
        raise ValueError("No results folder was given; name one or several.")
    return found


def merged(stored: Mapping[Path, Mapping[str, Any]]) -> dict[str, Any]:
    """By id; what several folders have is the first one's."""
    return {id: item for items in reversed([*stored.values()]) for id, item in items.items()}


def holder(record: Record | None, stored: Mapping[Path, Mapping[str, Record]]) -> Path | None:
    """The folder that a merged record comes from."""
    return next((place for place, items in stored.items() if record and items.get(record.id) is record), None)


def tell_apart(stored: Mapping[Path, Mapping[str, Record]]) -> None:
    """Warn of cells that two folders have with different numbers."""
    first: dict[str, Path] = {}
    for place, items in stored.items():
        for id, record in items.items():
            shown = first.setdefault(id, place)
            if place != shown and record.measures != stored[shown][id].measures:
                logger.warning("%s differs between %s, which is shown, and %s.", id, shown, place)


def _as_now(row: Row, data_dir: Path) -> Row:
    """Without a record that a run would make again from other texts or at another learning rate."""
    if not row.record or not row.folder:
        return row
    texts = found.other_data(row.record, data_dir)
    why = [f"their records were made from a different {text} than the one in --data-dir" for text in texts]
    if not why and found.chosen_anew(row.record, row.run, row.folder, data_dir):
        why = ["their learning rate is not the one that is chosen now"]
    return replace(row, record=None, failure=None, withheld=tuple(why)) if why else row


def repeats(made: Iterable[Row]) -> list[tuple[Row, ...]]:
    """Rows of one name that differ in nothing but their seeds; in the order of their first ones."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in made:
        groups.setdefault((row.method, row.setting, experiment(row.run)), []).append(row)
    return [tuple(group) for group in groups.values()]


def called(some: Sequence[Row], made: Sequence[Row]) -> str:
    """Some of the rows `made` by name, in their order: by label where all rows of it are among them."""
    ids = {id(row) for row in some}
    others = {row.label for row in made if id(row) not in ids}
    names = dict.fromkeys(row.name if row.label in others else row.label for row in some)
    return ("; " if any(", " in name for name in names) else ", ").join(names)


def keys(made: Iterable[Row]) -> list[str]:
    """The protocol keys that were measured, in order of appearance."""
    return list(dict.fromkeys(key for row in made if row.record for key in row.record.measures))


def _by_key(stored: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Oldest first, by spec without the model's exact identity, which only the machine that has the model knows."""
    keyed = defaultdict(list)
    for item in sorted(stored.values(), key=lambda item: item.at if isinstance(item, Failure) else item.made_by.at):
        keyed[stable_key(item.spec)].append(item)
    return keyed


def _newest(stored: list[Any], run: Run) -> Any:
    """The newest that is of the run's own model; None where there is none."""
    known, folder = split(run.model)
    if folder and Path(folder).expanduser().is_dir():
        here = fingerprint(Path(folder).expanduser())
        stored = [item for item in stored if _print(item) == here]
    elif folder and halves(folder):
        with suppress(ValueError):  # folders that are gone tell no weights apart
            whose = models.identity(run.model).items()
            stored = [item for item in stored if whose <= item.spec["model"].items()]
    elif known and not folder:  # the catalogue's own go before folders that are said to be that model
        stored = [item for item in stored if _print(item) is None] or stored
    prints = {_print(item) for item in stored}
    if len(prints) > 1:
        raise ValueError(
            f"{', '.join(item.id for item in stored)} are of {len(prints)} different models named "
            f"{run.model_name}; choose one by its folder (--model {f'{known}=' if known else ''}FOLDER)."
        )
    if run.model in CATALOGUE and len({_revision(item) for item in stored}) > 1:
        commit = models.commit(run.model)
        stored = [item for item in stored if _revision(item) == commit] or stored
    if len(stored) > 1 and isinstance(stored[-1], Record):
        ids = ", ".join(item.id for item in stored)
        logger.warning("%s differ only in the commit of the model; the newest, %s, is shown.", ids, stored[-1].id)
    return stored[-1] if stored else None


def _revision(stored: Any) -> str | None:
    found: str | None = stored.spec["model"].get("revision")
    return found


def _print(stored: Any) -> str | None:
    found: str | None = stored.spec["model"].get("fingerprint")
    return found


def _nothing(table: Table, root: Folders, runs: list[Run], again: str) -> str:
    asked = ", ".join(sorted({_protocol(run.spec(), [m.key for m in run.measures]) for run in runs}))
    places = folders(root)
    there = [record for place in places for record in records.load(place, table.name).values()]
    other = sorted({_protocol(record.spec, list(record.measures)) for record in there})
    hint = f" Records there are of {'; '.join(other)}." if other else ""
    return (
        f"No record of {table.name} for {asked} under {_some(places, table)}.{hint} "
        f"Run `python -m experiments run {again}`, or name another --results, --model or --dtype."
    )


def _some(places: Sequence[Path], table: Table) -> str:
    return " or ".join(str(records.folder(place, table.name)) for place in places)


def _protocol(spec: dict[str, Any], measured: list[str]) -> str:
    return f"{spec['model']['name']} in {spec['dtype']} at {' '.join(measured)}"
