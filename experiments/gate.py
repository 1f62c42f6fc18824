"""The dense gate: before a pruned number is believed, the dense model must meet its published perplexity.

Most results that could not be reproduced differ in split, tokenizer, window or checkpoint, and the dense model shows
it.  Its perplexity is evaluated once per model, protocol and device and kept under results/.cache/dense.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

from experiments import files, sealed
from experiments.catalogue import Model
from experiments.spec import Perplexity, digest

Value = dict[str, Any]
logger = logging.getLogger(__name__)


class DenseGateError(ValueError):
    """The dense model misses its published perplexity."""


def known(what: Any, model: Model) -> float | None:
    """The dense perplexity that is published for this very protocol key, if any."""
    return model.dense.get(what.key) if isinstance(what, Perplexity) else None


def check(what: Perplexity, model: Model, dense: Value) -> dict[str, float]:
    """What was expected and found, for the record; raises DenseGateError with the likely causes where they differ."""
    expected, found = model.dense[what.key], dense["perplexity"]
    if not abs(found - expected) <= model.tolerance * expected:
        raise DenseGateError(
            f"The dense {model.name} has perplexity {found:.2f} at {what.key}; {expected:.2f} is published, more than "
            f"{100 * model.tolerance:g} % away. Likely causes: another split or join of {what.corpus}, a tokenizer or "
            "checkpoint other than the published one, another window. Put that right, or run with --no-dense-gate, "
            "which the record keeps."
        )
    return {"expected": expected, "found": found, "tolerance": model.tolerance}


def dense(root: Path, key: dict[str, Any], evaluate: Callable[[], Value]) -> Value:
    """The dense model's value stored under `key`, which names everything that can move it, or that of `evaluate()`.

    A second process that asks for the same value waits for the first; a damaged file is evaluated again.
    """
    path = root / ".cache" / "dense" / f"{digest(key)}.json"
    with files.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        if (value := _read(path)) is None:
            value = evaluate()
            files.write(path, sealed.dumps({"key": key, "value": value}))
    return value


def _read(path: Path) -> Value | None:
    if not path.exists():
        return None
    try:
        value: Value = sealed.loads(path.read_text(encoding="utf-8"))["value"]
    except ValueError as error:
        logger.warning("Evaluating again what %s held: %s.", path, error)
        return None
    return value
