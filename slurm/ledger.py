"""What was sent where: one small sealed JSON file a submission, results/.cache/slurm/<table>/<name>/entry.json.

An entry is written before the cluster hears of the jobs and completed after: one that was never completed belongs to
a launcher that was killed in between.  Beside it lie the jobs' logs and events.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import Timeout

from experiments.spec import digest
from experiments.store import atomic, checksummed_json, records
from experiments.store.locks import lock
from slurm.jobs import Array

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sent:
    """One job: its `id` with the executor (empty until it is known) and the labels of its cells by their ids."""

    id: str
    cells: dict[str, str]


@dataclass(frozen=True)
class Entry:
    """One submission of the jobs of one array; `name` is the jobs' name in the queue, `complete` as said above.

    `model` is what a reader calls the model of its cells; submissions of an earlier day do not know it.
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

    @property
    def folder(self) -> Path:
        return place(Path(self.root), self.table) / self.name

    @property
    def cells(self) -> dict[str, str]:
        """Labels of all its cells by id."""
        return {id: label for job in self.jobs for id, label in job.cells.items()}

    def events(self, index: int) -> Path:
        return self.folder / f"{index}.events.jsonl"

    def with_ids(self, ids: Sequence[str]) -> Entry:
        jobs = tuple(replace(job, id=id) for job, id in zip(self.jobs, ids, strict=True))
        return replace(self, jobs=jobs, complete=True)


def place(root: Path, table: str) -> Path:
    return root / ".cache" / "slurm" / table


def new(root: Path, table: str, executor: str, array: Array) -> Entry:
    """An entry that is not stored yet, under a name that no other has."""
    jobs = tuple(Sent("", {cell.id: cell.label for cell in job.cells}) for job in array.jobs)
    unique = digest({"jobs": [list(job.cells) for job in jobs], "now": time.time_ns(), "process": os.getpid()})
    name = f"{table}-{unique[:8]}"
    return Entry(name, table, executor, str(root), jobs, array.request.memory_gb, records.now(), model=array.model)


def write(entry: Entry) -> None:
    atomic.write(entry.folder / "entry.json", checksummed_json.dumps(asdict(entry)))


def remove(entry: Entry) -> None:
    shutil.rmtree(entry.folder)


def load(root: Path, table: str) -> list[Entry]:
    """The table's submissions, oldest first; a damaged file is reported and left out."""
    found = []
    for path in place(root, table).glob("*/entry.json"):
        try:
            content = checksummed_json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            logger.warning("Ignoring %s: %s.", path, error)
            continue
        jobs = tuple(Sent(**job) for job in content["jobs"])
        kept = {key: value for key, value in content.items() if key not in ("jobs", "sha256")}
        found.append(Entry(**{**kept, "root": str(root), "jobs": jobs}))
    return sorted(found, key=lambda entry: (entry.at, entry.name))


def tables(root: Path) -> list[str]:
    """Tables that anything was ever submitted of."""
    return sorted(path.name for path in (root / ".cache" / "slurm").glob("*") if path.is_dir())


@contextmanager
def launching(root: Path, table: str) -> Iterator[None]:
    """One launcher at a time; raises TimeoutError while another is at it."""
    folder = place(root, table)
    with atomic.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with lock(folder / "launching.lock", timeout=10):
            yield
    except Timeout:
        raise TimeoutError(f"Another process is submitting {table} right now; wait for it, then ask again.") from None
