"""Reads JSON lines: UTF-8, gzipped or not; a byte order mark and blank lines are accepted."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

BLANK = " \t\r\n\ufeff"
KINDS = {bool: "true or false", int: "a number", float: "a number", str: "a text", list: "a list", dict: "an object"}


def read(path: Path, texts: Iterable[str] = (), optional: Iterable[str] = ()) -> list[dict[str, Any]]:
    """The records of a file, each an object with a text under every name of `texts`.

    Under a name of `optional` stands a text, null or nothing.

    Raises ValueError that names the file and the record, counted from 1, for any other content, and FileNotFoundError.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is not a regular file, so no records are read from it.")
    records: list[dict[str, Any]] = []
    try:
        for line in _lines(path):
            where = f"{path}: record {len(records) + 1:,}"
            record = _parsed(line, where)
            check(record, texts, where)
            check(record, [name for name in optional if record.get(name) is not None], where)
            records.append(record)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text after record {len(records):,}; save it as UTF-8.") from error
    except RecursionError:
        raise ValueError(f"{path}: record {len(records) + 1:,} is nested too deeply.") from None
    except (json.JSONDecodeError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        told = f"{path} is damaged after record {len(records):,} ({_reason(error)}); fetch it again."
        raise ValueError(told) from error
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({(error.strerror or str(error)).lower()}).") from error
    return records


def check(record: Any, texts: Iterable[str], where: str) -> None:
    """ValueError, which begins with `where`, for what is no object or lacks one of these texts."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where} is not an object but {_kind(record)}.")
    for name in texts:
        if record.get(name) is None:
            found = ", ".join(map(repr, record)) or "nothing"
            raise ValueError(f"{where} has no {name!r}; it has {found}."[:400])
        if not isinstance(record[name], str):
            raise ValueError(f"{where} has no text: its {name!r} is {_kind(record[name])}.")
    refuse_halves(record, where)


def refuse_halves(value: Any, where: str) -> None:
    """ValueError for half of a surrogate pair in any text, which no tokenizer and no file takes."""
    for text in _texts(value):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                half = f"\\u{ord(text[error.start]):04x}"
                raise ValueError(
                    f"{where} has half of a surrogate pair ({half}) in a text; correct or remove it."
                ) from None


def _parsed(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # Python reads no number of thousands of digits
        raise ValueError(f"{where} has a number that is too long to be read; correct or remove it.") from error


def _lines(path: Path) -> Iterator[str]:
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            if bare := line.strip(BLANK):
                yield bare


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _kind(value: Any) -> str:
    return "null" if value is None else KINDS.get(type(value), type(value).__name__)


def _reason(error: Exception) -> str:
    return f"{error.msg} at its column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
