"""Reuses the record of a cell that another table has, too.

The id says that the cell is the same; the texts and the code must be those that the run at hand would read and use.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.store import again, atomic, found, records
from experiments.store.records import BadRecordError, Record

if TYPE_CHECKING:
    from experiments.cells import Cell


def known(root: Path, table: str, cell: Cell, data_dir: Path | None) -> Record | None:
    """The newest record of this very cell in another table, with its answers beside it; None where there is none."""
    there = (record for record in _others(root, table, cell.id) if found.stands(record, cell.run, root, data_dir, True))
    whole = (record for record in there if None not in _answers(root, record))
    return max(whole, key=lambda record: record.made_by.at, default=None)


def adopt(root: Path, table: str, cell: Cell, data_dir: Path | None) -> Record | None:
    """Put what is `known` elsewhere under `table`, too."""
    record = known(root, table, cell, data_dir)
    if record is None:
        return None
    for path in filter(None, _answers(root, record)):
        with atomic.replacing(records.folder(root, table) / path.name) as temporary:
            shutil.copyfile(path, temporary)
    taken = record.model_copy(update={"table": table, "sha256": ""})
    again.write(taken, root)
    return taken


def adopt_all(root: Path, table: str, cells: Sequence[Cell], data_dir: Path | None) -> dict[str, Record]:
    """By id, of those cells of which another table has the record."""
    taken = {cell.id: adopt(root, table, cell, data_dir) for cell in cells}
    return {id: record for id, record in taken.items() if record is not None}


def _others(root: Path, table: str, id: str) -> Iterator[Record]:
    for path in sorted((Path(root) / "runs").glob(f"*/{id}{Record.suffix}")):
        if path.parent.name != table:
            try:
                yield records.read(path)
            except BadRecordError:
                continue


def _answers(root: Path, record: Record) -> Iterator[Path | None]:
    """The files of answers beside the record; None for one that is not what the record says."""
    for measured in record.measures.values():
        if kept := measured.get("samples"):
            path = records.folder(root, record.table) / kept["file"]
            there = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == kept["sha256"]
            yield path if there else None
