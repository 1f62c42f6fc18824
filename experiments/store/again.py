"""What a cell that is made again says of the code by which it was made before: whether it has the same numbers.

A digest says that code is another, not that it computes something else.  A record therefore names the earlier code
whose record it took the place of, and whether every number that is no time or peak of memory was the same to the bit.
What differs where the machine, the packages or the learning rate do, too, says nothing of the code.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from experiments.store import found, records
from experiments.store.checksummed_json import COMPARED
from experiments.store.records import Before, Record
from experiments.store.redaction import cleaned

OF_THE_MACHINE = re.compile(r"timing|semi_structured|peak_bytes|.*(_s|_per_second|decode_to_\w+)")
IN_WORDS = ("text", "bits", "sha256")  # written text, masks and what a file of answers holds
OF_TEXTS = ("token_sha256", "documents_sha256")


def write(record: Record, root: Path) -> Path:
    """Store a finished cell with what it says of the record in its place; raises what `records.write` does."""
    earlier = records.find(root, record.table, record.id)
    return records.write(record.model_copy(update={"before": before(record, earlier)}), root)


def before(record: Record, earlier: Record | None) -> list[Before]:
    """Of a record that is to take the place of an earlier one of the same cell: what is known of other code, newest
    first; empty where they were made from different texts."""
    if earlier is None or not _of_same_texts(record, earlier):
        return record.before
    now, then = (dict(_numbers(cleaned(one.measures, COMPARED))) for one in (record, earlier))
    common = now.keys() & then.keys()  # what one of them lacks, such as a task, is not compared
    same = all(now[place] == then[place] for place in common)
    if not common or not (same or _alike(record, earlier)):
        return record.before
    made = earlier.made_by
    known = [*record.before, Before(code=earlier.code, commit=made.commit, at=made.at, same=same)]
    # equal to one of two that differ, it differs from the other; different from both, nothing follows
    known += [one.model_copy(update={"same": one.same and same}) for one in earlier.before if one.same or same]
    return [one for at, one in enumerate(known) if _is_news(one, known[:at], record)]


def _of_same_texts(one: Record, other: Record) -> bool:
    return _all_equal(one.data, other.data) and all(
        _all_equal(measured.get("data", {}), other.measures.get(key, measured).get("data", {}))
        and all(measured.get(name) == other.measures.get(key, measured).get(name) for name in OF_TEXTS)
        for key, measured in one.measures.items()
    )


def _all_equal(texts: Mapping[str, Any], others: Mapping[str, Any]) -> bool:
    return all(found.same_text(texts[name], others[name]) for name in texts.keys() & others.keys())


def _alike(one: Record, other: Record) -> bool:
    """Whether nothing but the code could have moved a number."""
    circumstances = [
        [
            record.made_by.device,
            record.made_by.packages,
            record.made_by.processes,
            record.made_by.batch_size,
            record.made_by.weights.get("home"),
            (record.achieved.get("rate_choice") or {}).get("learning_rate"),
        ]
        for record in (one, other)
    ]
    return circumstances[0] == circumstances[1]


def _is_news(one: Before, told: list[Before], record: Record) -> bool:
    return bool(one.code) and one.code != record.code and one.code not in [other.code for other in told]


def _numbers(value: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Every number by its place, without those that the machine decides; of words, those that the model decides."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            told = name in IN_WORDS or not isinstance(part, str)
            if told and name != "data" and not OF_THE_MACHINE.fullmatch(str(name)):
                yield from _numbers(part, f"{where}/{name}")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _numbers(part, f"{where}/{index}")
    elif value is not None:
        yield where, value
