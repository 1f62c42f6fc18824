"""Callbacks on the progress of a cell: a log of events, an experiment tracker. None of them can fail a cell."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a job must be able to say that it goes back into the queue before torch is there
    from experiments.cells import Cell
    from experiments.store.records import Failure, Record

logger = logging.getLogger(__name__)
SECONDS_BETWEEN = 20.0  # lines of the log that say how far a stage is
SAYS: dict[str, dict[str, Any]] = {  # what is read of an event, beside its time and its cell
    "stage": {"name": str},
    "progress": {"share": (int, float), "left": (int, float, type(None))},
    "rank failed": {"rank": int, "lost": bool, "message": str},
}


class Watcher:
    """Told of every step of one cell after the other; what it does not care for it leaves out."""

    def started(self, cell: Cell, resumed: int) -> None: ...

    def stage(self, name: str) -> None: ...

    def progress(self, done: int, total: int) -> None: ...

    def pace(self, share: float, left: float | None) -> None:
        """The share of the current stage that is done, and the seconds that all cells at hand will still take, where
        that is known; told as often as `progress`."""

    def finished(self, record: Record, path: Path) -> None: ...

    def failed(self, failure: Failure) -> None: ...


class Watchers(Watcher):
    """Passes everything on; a watcher that raises is reported once and told nothing more."""

    def __init__(self, watchers: Sequence[Watcher] = ()) -> None:
        self.watchers = list(watchers)

    def started(self, cell: Cell, resumed: int) -> None:
        self._tell("started", cell, resumed)

    def stage(self, name: str) -> None:
        self._tell("stage", name)

    def progress(self, done: int, total: int) -> None:
        self._tell("progress", done, total)

    def pace(self, share: float, left: float | None) -> None:
        self._tell("pace", share, left)

    def finished(self, record: Record, path: Path) -> None:
        self._tell("finished", record, path)

    def failed(self, failure: Failure) -> None:
        self._tell("failed", failure)

    def _tell(self, what: str, *arguments: Any) -> None:
        for watcher in list(self.watchers):
            try:
                getattr(watcher, what)(*arguments)
            except Exception as error:  # noqa: BLE001  (the record is the truth; a watcher's trouble is only reported)
                from experiments import errors

                self.watchers.remove(watcher)
                name = type(watcher).__name__
                logger.warning("%s failed and is switched off; cells continue: %s", name, errors.sentence(error))


class Events(Watcher):
    """One JSON line an event, appended to `path`: time (UTC), process, machine, cell, and what happened.

    A line that a kill cut short is no JSON; `read` leaves it out.  `context` stands on every line.
    """

    def __init__(self, path: Path, **context: Any) -> None:
        self.path, self.cell, self.paced = path, "", -math.inf
        self.context = {"host": socket.gethostname(), "process": os.getpid(), **context}

    def started(self, cell: Cell, resumed: int) -> None:
        self.cell = cell.id
        self.write("started", label=cell.label, resumed=resumed)

    def stage(self, name: str) -> None:
        self.write("stage", name=name)

    def pace(self, share: float, left: float | None) -> None:
        """Now and then."""
        if time.monotonic() - self.paced > SECONDS_BETWEEN:
            self.paced = time.monotonic()
            self.write("progress", share=round(share, 4), left=None if left is None else round(left))

    def finished(self, record: Record, path: Path) -> None:
        self.write("finished", seconds=record.cost.seconds["total"], peak_bytes=record.cost.peak_bytes)

    def failed(self, failure: Failure) -> None:
        self.write("failed", message=failure.message)

    def write(self, event: str, **details: Any) -> None:
        line = {
            "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            **self.context,
            "cell": self.cell,
            "event": event,
            **details,
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            torn = file.tell() > 0 and not _ends_a_line(self.path)
            file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The events at `path`, oldest first; none where there is no such file."""
    events = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # cut short by a kill, or no line of ours
            continue
        if _is_event(event):
            events.append(event)
    return events


def _is_event(line: Any) -> bool:
    """Whether it says what is read of such an event."""
    if not isinstance(line, dict) or not all(isinstance(line.get(name), str) for name in ("at", "cell", "event")):
        return False
    told = SAYS.get(line["event"], {})
    if not all(name in line and isinstance(line[name], kinds) for name, kinds in told.items()):
        return False
    try:
        datetime.fromisoformat(line["at"]) + timedelta(seconds=line.get("left") or 0)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
