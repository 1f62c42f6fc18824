"""Answers that survive an interrupted evaluation: one JSON line for every finished batch.

A batch is the unit of storing and of resuming.  It is found again by the tokens that went into it, so the batches of
a resumed evaluation are made of the same requests and its answers have the same bits.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Answer = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would say the same
logger = logging.getLogger(__name__)


class AnswerStore:
    """A file of answers that belong to one model, named by `identity`; another model's file is started anew.

    A line that a kill cut short, or that its checksum disowns, ends what is believed: the file is cut there.  Where the
    disk refuses, answers are kept in memory from there on, with one warning: the evaluation goes on.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = Path(path)
        self._known: dict[str, list[Answer]] = {}
        self._refused = False
        with self._kept():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and not self.path.is_file():  # reading a pipe would wait for ever
                logger.warning("%s is not a file of answers; starting over.", self.path)
                self.path.unlink()
            whole = self._read(identity) if self.path.exists() else 0
            with self.path.open("ab") as file:
                file.truncate(whole)
            if not whole:
                self._append({"identity": identity})

    def __len__(self) -> int:
        """How many answers are known."""
        return sum(map(len, self._known.values()))

    def get(self, batch: str) -> list[Answer] | None:
        return self._known.get(batch)

    def put(self, batch: str, answers: Sequence[Answer]) -> None:
        """Keep a batch's answers, on disk before this returns."""
        self._known[batch] = list(answers)
        with self._kept():
            self._append({"batch": batch, "answers": answers})

    def _append(self, content: dict[str, Any]) -> None:
        if self._refused:
            return
        text = json.dumps(content).encode()
        with self.path.open("ab") as file:
            file.write(b"%08x " % zlib.crc32(text) + text + b"\n")
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._refused = True
            logger.warning(
                "%s cannot be written (%s); if this run is interrupted, the evaluation starts over.", self.path, error
            )

    def _read(self, identity: str) -> int:
        """Bytes at the head of the file that can be believed."""
        kept = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True)):
            content = _parse(line)
            if content is None:
                logger.warning("%s: line %d is damaged; answers from there on are computed again.", self.path, number)
                break
            if number == 0 and content != {"identity": identity}:
                logger.warning("%s holds another model's answers; starting over.", self.path)
                break
            if "batch" in content:
                self._known[content["batch"]] = [(float(nats), bool(greedy)) for nats, greedy in content["answers"]]
            kept += len(line)
        return kept


def write_samples(samples: Sequence[Mapping[str, Any]], path: Path) -> None:
    """One document a line, gzipped; the same samples give the same bytes."""
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def read_samples(path: Path) -> list[dict[str, Any]]:
    lines = gzip.decompress(path.read_bytes()).decode().split("\n")  # a text may hold what splitlines() parts at, too
    return [json.loads(line) for line in lines if line]


def _parse(line: bytes) -> dict[str, Any] | None:
    checksum, _, text = line[:-1].partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(text):
        return None
    content: dict[str, Any] = json.loads(text)
    return content
