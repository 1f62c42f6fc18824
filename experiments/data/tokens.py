"""Token streams and calibration windows, made once per process: a table's cells ask for the same few."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.data import corpora
from experiments.spec import Windows
from pruners.lazy import Tensor


@dataclass(frozen=True)
class Tokenizer:
    """A model's tokenizer, equal to any other that was loaded for the same `model` (the digest of its identity)."""

    model: str
    inner: Any = field(compare=False)


def stream(corpus: str, tokenizer: Tokenizer, data_dir: Path | None) -> Tensor:
    """The evaluation stream [tokens] of `corpora.token_ids`; not to be changed."""
    return _stream(corpus, tokenizer, corpora.folder(data_dir), corpora.version(corpus, data_dir))


def calibration(windows: Windows, tokenizer: Tokenizer, data_dir: Path | None) -> Tensor:
    """The windows [count, length] of `corpora.calibration`; not to be changed."""
    return _calibration(windows, tokenizer, corpora.folder(data_dir), corpora.version(windows.corpus, data_dir))


@lru_cache(maxsize=8)
def _stream(corpus: str, tokenizer: Tokenizer, folder: str | None, version: str | None) -> Tensor:
    return corpora.token_ids(corpus, tokenizer.inner, folder)


@lru_cache(maxsize=4)
def _calibration(windows: Windows, tokenizer: Tokenizer, folder: str | None, version: str | None) -> Tensor:
    return corpora.calibration(windows, tokenizer.inner, folder)
