"""JSON with a checksum of its own content, so that an edited or damaged file is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any


def dumps(content: dict[str, Any]) -> str:
    """`content` as JSON with its seal under `sha256`; raises ValueError for a number that is not finite."""
    where = next(_not_finite(content), None)
    if where is not None:
        raise ValueError(f"{where} is not finite and cannot be recorded; the model no longer computes.")
    plain = json.loads(json.dumps(content))
    return json.dumps({**plain, "sha256": seal(plain)}, indent=1, ensure_ascii=False) + "\n"


def loads(text: str) -> dict[str, Any]:
    """The content of sealed JSON, its seal included; raises ValueError saying what is wrong with it."""
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:  # the latter of text that is nested without end
        raise ValueError("it is not whole JSON, so it was truncated or damaged") from error
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    if content.get("sha256") != seal(content):
        raise ValueError("its checksum does not match, so it was edited or damaged")
    return content


def seal(content: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything but `sha256`."""
    covered = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _not_finite(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{where}[{index}]")
    elif isinstance(value, float) and value - value != 0:
        yield where
