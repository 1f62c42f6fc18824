"""Provenance of a number: everything in a record that a reader needs to judge or repeat it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from analysis.rows import Row
from experiments.store.records import Failure, MadeBy, Record

LONG = (list, dict)


def origins(rows: Iterable[Row]) -> dict[str, dict[str, Any]]:
    """By id of the record or, where there is only one, of the failure; values are texts, numbers or such groups."""
    return {id: _failed(row) if row.record is None else _done(row, row.record) for row in rows for id in ids([row])}


def shared(told: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The same with every group of facts once: `groups`, and `cells`, which name theirs by their places among them.

    Hundreds of cells are made by the same packages from the same texts.
    """
    places: dict[str, int] = {}
    cells = {
        id: {
            name: places.setdefault(json.dumps(value), len(places)) if isinstance(value, dict) else value
            for name, value in about.items()
        }
        for id, about in told.items()
    }
    return {"groups": [json.loads(group) for group in places], "cells": cells}


def ids(rows: Iterable[Row]) -> list[str]:
    """Of the records and failures behind these rows."""
    return [stored.id for row in rows if (stored := row.record or row.failure)]


def _done(row: Row, record: Record) -> dict[str, Any]:
    return {
        "cell": _named(row),
        "Measured": {key: _short(measured) for key, measured in record.measures.items()},
        "Specification": _asked(record.spec),
        "Sparsity": {"requested": record.achieved.get("asked"), "achieved": record.sparsity},
        "Texts": {name: _flat(source) for name, source in record.data.items()},
        "Made by": _maker(record.made_by),
        **({"Made before by": _before(record)} if record.before else {}),
        "Cost": {**{f"{stage}, s": taken for stage, taken in record.cost.seconds.items()}, **_memory(record)},
        "Record": {"file": f"results/runs/{record.table}/{record.id}.json", "sha256": record.sha256},
    }


def _maker(made: MadeBy) -> dict[str, Any]:
    told = _flat(made.model_dump(exclude={"packages", "dirty"}, exclude_none=True))
    return {**told, "uncommitted changes": "yes" if made.dirty else "no", **made.packages}


def _before(record: Record) -> dict[str, str]:
    """By commit of other code, whether the cell had the same numbers."""
    return {
        f"commit {(one.commit or 'unknown')[:10]}, {one.at}": "the same numbers" if one.same else "other numbers"
        for one in record.before
    }


def _named(row: Row) -> str:
    return row.label + ("" if row.seed is None else f", seed {row.seed}")


def _failed(row: Row) -> dict[str, Any]:
    failure: Failure | None = row.failure
    assert failure is not None
    return {
        "cell": _named(row),
        "Failed": {"reason": failure.message, "at": failure.at},
        "Specification": _asked(failure.spec),
        "Record": {"file": f"results/runs/{failure.table}/{failure.id}.error.json"},
    }


def _asked(spec: dict[str, Any]) -> dict[str, Any]:
    """The stages of the run, each with its settings on one line."""
    named = {"model": spec["model"], "method": spec["method"] or "none: the dense model"}
    named |= {"calibration": spec["windows"] or "none: uses no text", "dtype": spec["dtype"]}
    if "recovery" in spec:
        named["recovery"] = spec["recovery"]
    return {name: _line(value) for name, value in named.items()}


def _line(value: Any) -> str:
    """`name setting value, ...` of nested settings; those that are not set are left out."""
    if not isinstance(value, dict):
        return str(value)
    rest = [f"{key} {_bracketed(inner)}" for key, inner in value.items() if key != "name" and inner is not None]
    return ": ".join(part for part in (str(value.get("name", "")), ", ".join(rest)) if part)


def _bracketed(value: Any) -> str:
    return f"({_line(value)})" if isinstance(value, dict) else str(value)


def _flat(source: dict[str, Any]) -> dict[str, Any]:
    return {key: _line(value) if isinstance(value, dict) else value for key, value in source.items() if value != {}}


def _short(measured: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in measured.items() if not isinstance(value, LONG)}


def _memory(record: Record) -> dict[str, float]:
    return {"peak memory, GiB": round(record.cost.peak_bytes / 2**30, 3)}
