"""What a cell of a table is: a `Run`, and a `Table` of them.

A Run's id hashes every field that can move the number and nothing else: where and how fast it runs stays outside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from typing import Any

import pruners


@dataclass(frozen=True)
class Windows:
    """Calibration tokens: `count` windows of `length` tokens of `corpus`.

    `sampling` is how the papers draw them: `documents` (Wanda, SparseGPT, GBLM, PERP: one window from a random
    document longer than the window), `stream` (FLAP: random windows of the joined text), `sentences` (LLM-Pruner:
    rows of at least `length` tokens, none twice) or `first` (the head of the joined text, cut into windows).
    """

    corpus: str
    count: int
    length: int
    seed: int = 0
    sampling: str = "documents"


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over non-overlapping windows of `window` tokens; `limit` keeps the first so many windows."""

    corpus: str
    window: int
    limit: int | None = None

    @property
    def key(self) -> str:
        """The protocol key, e.g. `wikitext2/test@128` or, limited, `wikitext2/test@128[:16]`."""
        return f"{self.corpus}@{self.window}" + (f"[:{self.limit}]" if self.limit else "")


@dataclass(frozen=True)
class Run:
    """One cell: a model, a method (None is the dense model), its calibration and what is measured.

    `model` is a name of the catalogue or a local folder; `model_identity` is filled in by `experiments.models`
    (hub id and revision, or a fingerprint of the folder), so that two models never share an id.
    """

    model: str
    method: Any
    windows: Windows | None
    measures: tuple[Any, ...]
    dtype: str = "float32"

    def spec(self, identity: dict[str, Any] | None = None) -> dict[str, Any]:
        """Every field that can move the number, as plain JSON values."""
        return {
            "model": {"name": self.model, **(identity or {})},
            "method": describe(self.method),
            "windows": asdict(self.windows) if self.windows and needs_windows(self.method) else None,
            "measures": [describe(measure) for measure in self.measures],
            "dtype": self.dtype,
        }

    def id(self, identity: dict[str, Any] | None = None) -> str:
        return digest(self.spec(identity))


@dataclass(frozen=True)
class Table:
    """A paper's table: `run(method, *column)` for every row and column gives the cells (None: no such cell).

    `published` names the CSV under `analysis/published` with the paper's values.
    """

    name: str
    title: str
    rows: tuple[Any, ...]
    columns: tuple[tuple[Any, ...], ...]
    run: Callable[..., Run | None]
    published: str | None = None

    def runs(self, model: str | None = None) -> list[Run]:
        """The table's runs in reading order, each once; `model` asks for the same experiment on another model."""
        cells = [self.run(method, *column) for method in self.rows for column in self.columns]
        runs = [replace(run, model=model) if model else run for run in cells if run is not None]
        return list(dict.fromkeys(runs))


def needs_windows(method: Any) -> bool:
    return method is not None and method.needs_windows


def describe(thing: Any) -> dict[str, Any] | None:
    """A method or measure as `{"name": ..., **hyperparameters}`.

    Fields whose metadata says `{"result": False}` cannot move the number and are left out.
    """
    if thing is None:
        return None
    if not is_dataclass(thing):
        raise TypeError(f"{thing!r} is no dataclass; methods and measures of a Run are frozen dataclasses.")
    kept = {f.name: getattr(thing, f.name) for f in fields(thing) if f.metadata.get("result", True)}
    return {"name": _name(thing), **{key: _plain(value) for key, value in kept.items()}}


def digest(spec: dict[str, Any]) -> str:
    """Ten hexadecimal digits of the SHA-256 of the canonical JSON."""
    text = json.dumps(spec, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:10]


def _name(thing: Any) -> str:
    names = {cls: name for name, cls in pruners.METHODS.items()}
    return names.get(type(thing), type(thing).__name__.lower())


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return describe(value)
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value
