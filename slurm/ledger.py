"""Which jobs were submitted: one small JSON file per submission, results/.cache/slurm/<tables>/<name>/entry.json.

An entry is written before the cluster hears of the jobs and completed after: one that was never completed belongs to
a launcher that was killed in between.  Beside it lie the jobs' logs and events.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from filelock import Timeout

from experiments.store import atomic, checksummed_json, records
from experiments.store.described import digest
from experiments.store.locks import held
from slurm.jobs import Array

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """One job: its `id` with the executor (empty until it is known) and the labels of its cells by their ids.

    `seconds` is what it was expected to take, 0 where nobody knows; `choices` are the learning rates to be chosen, by
    the ids of their cells, that it needs.
    """

    id: str
    cells: dict[str, str]
    seconds: float = 0.0
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """One submission of the jobs of one array; `name` is the jobs' name in the queue, `complete` as said above.

    `table` is the table, or the first of several and how many more; `tables` names by cell those that ask for it,
    where they are several.  `model` is what a reader calls the model of its cells; submissions of an earlier day do not
    know it.  Each job takes `memory_gb` of memory (0: all that its node has) and `cards` of its node; `asks` says all
    that in words.  A submission without cells writes down what the others have made: of the tables `collected`,
    with what each was asked for by, for the cells that the options `same` choose, `after` jobs of these ids.
    """

    name: str
    table: str
    executor: str
    root: str
    jobs: tuple[Sent, ...]
    memory_gb: float
    at: str
    complete: bool = False
    model: str = ""
    cards: int = 1
    tables: dict[str, list[str]] = field(default_factory=dict)
    asks: str = ""
    collected: dict[str, str] = field(default_factory=dict)
    same: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return place(Path(self.root), self.table) / self.name

    @property
    def cells(self) -> dict[str, str]:
        """Labels of all its cells by id."""
        return {id: label for job in self.jobs for id, label in job.cells.items()}

    @property
    def collects(self) -> bool:
        return not self.cells

    def asking(self, id: str) -> list[str]:
        """The tables that this cell was sent for."""
        return self.tables.get(id, [self.table])

    def asked_by(self, table: str, ids: Collection[str]) -> Entry:
        """With a table that asks for these cells, too."""
        more = {id: list(dict.fromkeys([*self.asking(id), table])) for id in ids}
        return replace(self, tables={**self.tables, **more})

    def of(self, table: str) -> dict[str, str]:
        """Labels of the cells that were sent for this table, by id."""
        return {id: label for id, label in self.cells.items() if table in self.asking(id)}

    def events(self, index: int) -> Path:
        return self.folder / f"{index}.events.jsonl"

    def with_ids(self, ids: Sequence[str]) -> Entry:
        jobs = tuple(replace(job, id=id) for job, id in zip(self.jobs, ids, strict=True))
        return replace(self, jobs=jobs, complete=True)


def place(root: Path, table: str = "") -> Path:
    return root / ".cache" / "slurm" / table


def new(root: Path, tables: Mapping[str, Sequence[str]], executor: str, array: Array) -> Entry:
    """An entry that is not stored yet, under a name that no other has; `tables` are those that ask, by cell."""
    jobs = tuple(Sent("", {cell.id: cell.label for cell in job.cells}, job.seconds, job.choices) for job in array.jobs)
    asking = {cell.id: list(tables[cell.id]) for job in array.jobs for cell in job.cells}
    named = list(dict.fromkeys(table for several in asking.values() for table in several))
    table = named[0] if len(named) == 1 else f"{named[0]}+{len(named) - 1}"
    several = asking if len(named) > 1 else {}
    return Entry(
        f"{table}-{unique(jobs)}", table, executor, str(root), jobs, array.request.memory_gb, records.now(),
        model=array.model, cards=array.request.cards, tables=several,
    )  # fmt: skip


def unique(jobs: Sequence[Sent]) -> str:
    return digest({"jobs": [list(job.cells) for job in jobs], "now": time.time_ns(), "process": os.getpid()})[:8]


def write(entry: Entry) -> None:
    atomic.write(entry.folder / "entry.json", checksummed_json.dumps(asdict(entry)))


def remove(entry: Entry) -> None:
    shutil.rmtree(entry.folder)


def load(root: Path, table: str | None = None) -> list[Entry]:
    """The submissions, of this table or of any, oldest first; a damaged file is reported and left out."""
    found = [read(path, root) for path in place(root).glob("*/*/entry.json")]
    chosen = [entry for entry in found if entry and (table is None or entry.of(table))]
    return sorted(chosen, key=lambda entry: (entry.at, entry.name))


def read(path: Path, root: Path) -> Entry | None:
    """`root` is the results folder as it is called here; None where the file is damaged, which is reported."""
    try:
        return _read(path, root)
    except OSError as error:
        logger.warning("Ignoring %s: it cannot be read (%s).", path, error.strerror or "it is not a regular file")
    except ValueError as error:
        logger.warning("Ignoring %s: %s.", path, error)
    except (LookupError, TypeError, AttributeError):
        logger.warning("Ignoring %s: it is not what a submission writes.", path)
    return None


def _read(path: Path, root: Path) -> Entry:
    content = checksummed_json.loads(atomic.read(path))
    jobs = tuple(Sent(**{**job, "choices": tuple(job.get("choices", ()))}) for job in content["jobs"])
    kept = {key: value for key, value in content.items() if key not in ("jobs", "sha256")}
    return Entry(**{**kept, "root": str(root), "jobs": jobs})


@contextmanager
def launching(root: Path) -> Iterator[None]:
    """One launcher at a time; raises TimeoutError while another is at it."""
    try:
        with held(place(root) / "launching.lock", timeout=10):
            yield
    except Timeout:
        raise TimeoutError("Another process is submitting cells; wait for it, then try again.") from None
