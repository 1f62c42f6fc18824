"""A result is one JSON file: results/runs/<table>/<id>.json.

A record holds what was asked (`spec`), what came out (`achieved`, `measures`), what it cost and how it was made.  Its
id is the digest of its spec and `sha256` covers everything else in it, so a truncated or hand-edited file is noticed:
it is reported, ignored and never counted as done.  Failures are kept apart, as <id>.error.json.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from experiments.store import atomic, checksummed_json
from experiments.store.described import digest
from experiments.store.redaction import redacted

SCHEMA_VERSION = 1
logger = logging.getLogger(__name__)


class BadRecordError(ValueError):
    """A file under results/runs that cannot be trusted."""


class Cost(BaseModel):
    """`seconds` per stage with their `total`; `peak_bytes` of the accelerator, or of the process on a CPU."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seconds: dict[str, float]
    peak_bytes: int


class MadeBy(BaseModel):
    """What a reader needs to make the record again; `commit` is None where there is no git repository.

    `model_commit` is the Hub commit that the model's name stood for, `at` the time in UTC.  `weights` says where they
    were and why, and of those away from home how often they were read; empty in records of an earlier day.
    `processes` shared the cell, each on a card of its own where there are cards.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    commit: str | None
    dirty: bool | None
    model_commit: str | None = None
    device: str
    dtype: str
    packages: dict[str, str]
    python: str
    seed: int | None
    batch_size: int
    at: str
    weights: dict[str, Any] = Field(default_factory=dict)
    processes: int = 1


class Before(BaseModel):
    """Code by which the cell had a record from the same texts before; `same`: with the same numbers, to the bit."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    code: dict[str, Any]
    commit: str | None
    at: str
    same: bool


class _Stored(BaseModel):
    """What records and failures share; `sha256` is filled in on writing and covers every other field."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    suffix: ClassVar[str]
    schema_version: int = SCHEMA_VERSION
    id: str
    table: str
    spec: dict[str, Any]
    sha256: str = ""


class Record(_Stored):
    """One finished cell.

    `measures` is keyed by protocol key, `data` by corpus, `dense_gate` by the protocol keys that the dense model was
    held against; `resumed` counts broken-off starts; `code` holds the digests of `code.of`, empty in records of an
    earlier day; `before` says by which other code the cell was made before, and whether with the same numbers.
    """

    suffix: ClassVar[str] = ".json"
    achieved: dict[str, Any]
    measures: dict[str, dict[str, Any]]
    data: dict[str, dict[str, Any]] = Field(default_factory=dict)
    dense_gate: dict[str, dict[str, Any]] = Field(default_factory=dict)
    cost: Cost
    made_by: MadeBy
    resumed: int = 0
    code: dict[str, Any] = Field(default_factory=dict)
    before: list[Before] = Field(default_factory=list)

    @property
    def sparsity(self) -> float:
        """The share removed of the model that was measured; `achieved` has that of pruning, which recovery may undo."""
        pruned: float = self.achieved["sparsity"]
        if self.achieved.get("structure"):  # what is gone cannot be filled
            return pruned
        return (self.achieved.get("recovery") or {}).get("sparsity", pruned)

    @property
    def sparsity_told(self) -> str:
        """For a reader, who may not expect weights that pruning had removed."""
        adapters = ((self.spec.get("recovery") or {}).get("trainable") or {}).get("adapters") or {}
        filled = adapters.get("merge") and not self.achieved.get("structure") and self.sparsity < self.achieved["asked"]
        return f"{self.sparsity:.4f}" + (" (merging LoRA filled pruned weights)" if filled else "")

    @property
    def headline(self) -> str:
        """Its sparsity and main numbers, in a line."""
        values = [f"{key} {value['perplexity']:.2f}" for key, value in self.measures.items() if "perplexity" in value]
        means = [
            f"{key} {100 * value['score']:.1f} %"
            for key, value in self.measures.items()
            if key.startswith("mean.") and "score" in value
        ]
        return ", ".join([f"sparsity {self.sparsity_told}", *values, *means])


class Failure(_Stored):
    """Why a cell has no record: one sentence and the last lines of the traceback."""

    suffix: ClassVar[str] = ".error.json"
    message: str
    traceback: list[str]
    at: str


Stored = TypeVar("Stored", bound=_Stored)


def folder(root: Path, table: str) -> Path:
    return Path(root) / "runs" / table


def folders(root: Path) -> list[Path]:
    """One for each table that has records; FileNotFoundError where none has."""
    found = sorted(path for path in (Path(root) / "runs").glob("*") if path.is_dir())
    if not found:
        raise FileNotFoundError(f"{root} has no records; name a results folder, which has one folder a table in runs/.")
    return found


def path_of(stored: _Stored, root: Path) -> Path:
    return folder(root, stored.table) / f"{stored.id}{stored.suffix}"


def write(record: Record, root: Path) -> Path:
    """Store a finished cell, atomically, and remove its earlier failure.

    A file in its place that cannot be trusted is moved to <id>.json.ignored.  Raises ValueError for a number that is
    not finite and StorageError where the disk refuses.
    """
    path = path_of(record, root)
    content = record.model_dump(exclude=set() if record.before else {"before"})  # which older readers do not know
    text = checksummed_json.dumps(content)
    _move_untrusted(path)
    atomic.write(path, text)
    forget_failure(root, record.table, record.id)
    return path


def write_failure(failure: Failure, root: Path) -> Path:
    path = path_of(failure, root)
    atomic.write(path, checksummed_json.dumps(failure.model_dump()))
    return path


def forget_failure(root: Path, table: str, id: str) -> None:
    (folder(root, table) / f"{id}{Failure.suffix}").unlink(missing_ok=True)


def read(path: Path) -> Record:
    """The record at `path`; raises BadRecordError if it is not exactly what this version wrote."""
    return _read(Path(path), Record)


def exists(root: Path, table: str, id: str) -> bool:
    """Whether a record that can be trusted is there."""
    return find(root, table, id) is not None


def find(root: Path, table: str, id: str) -> Record | None:
    """The record of that id, if one that can be trusted is there."""
    try:
        return read(folder(root, table) / f"{id}{Record.suffix}")
    except BadRecordError:
        return None


def load(root: Path, table: str) -> dict[str, Record]:
    """The table's records by id; files that cannot be trusted are reported in one warning each and left out."""
    paths = (path for path in folder(root, table).glob("*.json") if not path.name.endswith(Failure.suffix))
    return _load(paths, Record)


def load_failures(root: Path, table: str) -> dict[str, Failure]:
    """The table's failed cells by id, whether or not they have a record by now."""
    found = _load(folder(root, table).glob(f"*{Failure.suffix}"), Failure)
    return {id: _without_secrets(failure) for id, failure in found.items()}


def _without_secrets(failure: Failure) -> Failure:
    """Of an earlier version, which kept what an error said as it was."""
    told = {"message": redacted(failure.message), "traceback": [redacted(line) for line in failure.traceback]}
    return failure.model_copy(update=told)


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _load(paths: Iterable[Path], kind: type[Stored]) -> dict[str, Stored]:
    found = {}
    for path in sorted(paths):
        try:
            stored = _read(path, kind)
        except BadRecordError as error:
            logger.warning("%s", error)
        else:
            found[stored.id] = stored
    return found


def _read(path: Path, kind: type[Stored]) -> Stored:
    try:
        content = checksummed_json.loads(atomic.read(path))
        _check_version(content)
        stored = kind.model_validate(content)
        _check_id(stored, path)
    except OSError as error:
        raise BadRecordError(f"Ignoring {path}: it cannot be read ({error.strerror or error}).") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadRecordError(f"Ignoring {path}: {where}: {first['msg'].lower()}.") from error
    except ValueError as error:
        raise BadRecordError(f"Ignoring {path}: {error}.") from error
    return stored


def _check_version(content: dict[str, Any]) -> None:
    if (version := content.get("schema_version")) != SCHEMA_VERSION:
        raise ValueError(f"it has schema version {version!r} and this program reads {SCHEMA_VERSION}")


def _check_id(stored: _Stored, path: Path) -> None:
    if stored.id != digest(stored.spec):
        raise ValueError(f"its id {stored.id} is not the digest of its spec, {digest(stored.spec)}")
    if path.name != f"{stored.id}{stored.suffix}":
        raise ValueError(f"its name does not fit its id {stored.id}")
    if path.absolute().parent.name != stored.table:
        raise ValueError(f"it is a record of the table {stored.table}")


def _move_untrusted(path: Path) -> None:
    try:
        read(path)
    except BadRecordError:
        if path.exists():
            with atomic.explained(path):
                path.replace(path.with_name(path.name + ".ignored"))
