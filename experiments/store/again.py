"""What a cell that is made again says of the code by which it was made before: whether it has the same numbers.

A digest says that code is another, not that it computes something else.  A record therefore names the earlier code
whose record it took the place of, and whether every number that is no time or peak of memory was the same to the bit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.store import records
from experiments.store.records import Before, Record

OF_THE_MACHINE = re.compile(r"timing|semi_structured|peak_bytes|.*(_s|_per_second|decode_to_\w+)")
IN_WORDS = ("text", "bits")  # written text, and masks


def write(record: Record, root: Path) -> Path:
    """Store a finished cell with what it says of the record in its place; raises what `records.write` does."""
    earlier = records.find(root, record.table, record.id)
    return records.write(record.model_copy(update={"before": before(record, earlier)}), root)


def before(record: Record, earlier: Record | None) -> list[Before]:
    """Of a record that is to take the place of an earlier one of the same cell: what is known of other code, newest
    first; empty where they were made from different texts."""
    if earlier is None or earlier.data != record.data or not (now := dict(_numbers(record.measures))):
        return record.before
    same = now == dict(_numbers(earlier.measures))
    made = earlier.made_by
    found = [*record.before, Before(code=earlier.code, commit=made.commit, at=made.at, same=same)]
    # equal to one of two that differ, it differs from the other; different from both, nothing follows
    found += [one.model_copy(update={"same": one.same and same}) for one in earlier.before if one.same or same]
    return [one for at, one in enumerate(found) if _is_news(one, found[:at], record)]


def _is_news(one: Before, told: list[Before], record: Record) -> bool:
    return bool(one.code) and one.code != record.code and one.code not in [other.code for other in told]


def _numbers(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every number by its place, without those that the machine decides; of words, those that the model decides."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            if not OF_THE_MACHINE.fullmatch(str(name)) and (name in IN_WORDS or not isinstance(part, str)):
                yield from _numbers(part, f"{where}/{name}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _numbers(part, f"{where}/{index}")
    elif value is not None:
        yield where, value
