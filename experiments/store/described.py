"""A method or measure as a record has it, in plain values, and the digest of such values."""

from __future__ import annotations

import hashlib
import json
from dataclasses import Field, fields, is_dataclass
from typing import Any

import pruners
from pruners.interface import checks


def describe(thing: Any) -> dict[str, Any] | None:
    """A method or measure as `{"name": ..., **hyperparameters}`.

    Fields whose metadata says `{"result": False}` cannot move the number and are left out, or move it only where the
    flag is set that `{"result": "flag"}` names; so is a field that came after records were made, `{"since": "later"}`,
    where it has its default.  TypeError and ValueError for what no record can hold.
    """
    if thing is None:
        return None
    if not is_dataclass(thing):
        raise TypeError(f"{thing!r} is not a dataclass; methods and measures of a Run are frozen dataclasses.")
    of = type(thing).__name__
    kept = {f.name: getattr(thing, f.name) for f in fields(thing) if _is_told(f, thing)}
    return {"name": _name(thing), **{key: _plain(value, f"{of}: {key}") for key, value in kept.items()}}


def _is_told(field: Field[Any], thing: Any) -> bool:
    moves = field.metadata.get("result", True)
    told = getattr(thing, moves) if isinstance(moves, str) else moves
    return told and not (field.metadata.get("since") and getattr(thing, field.name) == field.default)


def digest(spec: dict[str, Any]) -> str:
    """Ten hexadecimal digits of the SHA-256 of the canonical JSON."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _name(thing: Any) -> str:
    names = {cls: name for name, cls in pruners.METHODS.items()}
    return names.get(type(thing), type(thing).__name__.lower())


def _plain(value: Any, name: str) -> Any:
    if is_dataclass(value):
        return describe(value)
    if isinstance(value, tuple | list):
        return [_plain(item, name) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item, name) for key, item in value.items()}
    return checks.PLAIN.checked(name, value)
