"""JSON with a checksum of its own content, so that an edited or damaged file is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from experiments.store.redaction import cleaned

FOUND_BY = ("id", "spec", "key")
RECORDED = ("table", "data", "code", "samples", "tried", "rate_choice", "commit", "model_commit", "revision", "at")
DIGESTS = ("sha256", "token_sha256", "documents_sha256", "state", "digest", "files")
SENT = ("name", "tables", "jobs", "root", "executor", "collected", "same", "after")  # to a cluster
COMPARED = frozenset((*RECORDED, *DIGESTS, *SENT))


class _NotFiniteError(ValueError):
    """A number that is none in JSON."""


def dumps(content: dict[str, Any]) -> str:
    """`content` as JSON with its seal under `sha256`, without secrets; ValueError for a number that is not finite."""
    where = next(_not_finite(content), None)
    if where is not None:
        raise ValueError(f"{where} is NaN or infinite and cannot be recorded; the model's outputs overflow.")
    found_by = {key: value for key, value in content.items() if key in FOUND_BY}  # whose every letter counts
    plain = json.loads(json.dumps({**cleaned(content, COMPARED), **found_by}))
    return _text({**plain, "sha256": seal(plain)})


def loads(text: str) -> dict[str, Any]:
    """The content of sealed JSON, its seal included; raises ValueError saying what is wrong with it.

    It must be what `dumps` wrote to the byte: other digits of the same number, another blank or a key that stands
    there twice would leave the seal as it is.
    """
    try:
        content = json.loads(text, parse_constant=_refuse)
        sealed = isinstance(content, dict) and content.get("sha256") == seal(content) and _text(content) == text
    except _NotFiniteError:
        raise
    except (ValueError, RecursionError) as error:  # also a number of thousands of digits, and nesting without end
        raise ValueError("it is not complete JSON, so it was truncated or damaged") from error
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    if not sealed:
        raise ValueError("its checksum does not match, so it was edited or damaged")
    return content


def seal(content: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON of everything but `sha256`."""
    covered = {key: value for key, value in content.items() if key != "sha256"}
    text = json.dumps(covered, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse(constant: str) -> None:
    raise _NotFiniteError(f"it holds {constant}, which is not a valid value")


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def _not_finite(value: Any, where: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            yield from _not_finite(item, f"{where}[{index}]")
    elif isinstance(value, float) and value - value != 0:
        yield where
