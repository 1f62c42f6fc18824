"""Learning rates that cells of several jobs need: one job chooses, and the others start after it.

Else they would wait for its choice with a card in hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments import models, rates
from experiments.cells import Cell
from experiments.store import found, records
from slurm.jobs import Array, Job


@dataclass
class Choices:
    """`root`, `data_dir` and `again` say which records stand; `makers` are by choice the jobs that wait or run and
    have it among theirs, by their ids."""

    root: Path
    data_dir: Path | None
    again: bool
    makers: dict[str, str]
    known: dict[str, bool] = field(default_factory=dict)

    def needed(self, cells: Iterable[Cell]) -> list[str]:
        """The ids of the choices without a record that these cells need, or are."""
        ids = (self._of(cell) for cell in cells)
        return list(dict.fromkeys(filter(None, ids)))

    def parted(self, planned: Sequence[tuple[str, Array]]) -> list[tuple[str, Array]]:
        """The same jobs, those of an array that must wait in one of their own, behind the arrays that it waits for."""
        depth: dict[str, int] = {}
        makers = dict(self.makers)
        parts: dict[tuple[int, int], list[Job]] = {}
        awaited: dict[tuple[int, int], set[str]] = {}
        for number, (_, array) in enumerate(planned):
            for job in array.jobs:
                needed = self.needed(job.cells)
                after = {makers[id] for id in needed if id in makers}
                depth[job.key] = max((depth.get(other, 0) + 1 for other in after), default=0)
                makers |= {id: job.key for id in needed if id not in makers}
                part = (depth[job.key], number)
                parts.setdefault(part, []).append(replace(job, choices=tuple(needed)))
                awaited.setdefault(part, set()).update(after)
        return [
            (planned[part[1]][0], replace(planned[part[1]][1], jobs=tuple(parts[part]), after=tuple(awaited[part])))
            for part in sorted(parts)
        ]

    def _of(self, cell: Cell) -> str | None:
        if rates.grid(cell.run):
            return cell.id
        if not cell.run.tuning:
            return None
        wanted = rates.choice(cell.run)
        id = wanted.id(models.identity(wanted.model))
        if id not in self.known:
            record = records.find(self.root, cell.run.tuning.table, id)
            self.known[id] = record is not None and found.stands(record, wanted, self.root, self.data_dir, self.again)
        return None if self.known[id] else id


def awaited(array: Array, sent: Mapping[str, str]) -> list[str]:
    """The ids of the jobs that an array waits for; `sent` are those of this submission by their keys."""
    return [sent.get(key, key) for key in array.after]
