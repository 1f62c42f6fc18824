"""The dense gate: before a pruned number is believed, the dense model must meet its published perplexity.

Most results that could not be reproduced differ in split, tokenizer, window or checkpoint, and the dense model shows
it.  Its perplexity is evaluated once per model, protocol and device and kept under results/.cache/dense.  A cell that
measures no perplexity with a known dense value (accuracies, speed) is checked by the first one that the catalogue has.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from experiments import errors
from experiments.measures.zero_shot import Values
from experiments.models.catalogue import Model
from experiments.spec import Perplexity
from experiments.store import atomic, checksummed_json, locks
from experiments.store.described import digest
from pruners.run import ranks

logger = logging.getLogger(__name__)


class DenseGateError(ValueError):
    """The dense model misses its published perplexity."""


def published(what: Any, model: Model) -> bool:
    """Whether a dense perplexity is known for this very protocol key."""
    return isinstance(what, Perplexity) and what.key in model.dense


def asked(measured: Sequence[Any], model: Model) -> list[Perplexity]:
    """What the dense model must meet before these measures of the pruned one are believed; empty: nothing is known."""
    own = [what for what in measured if published(what, model)]
    return own or [Perplexity.of(key) for key in list(model.dense)[:1]]


def check_readable(what: Perplexity, model: Model, provenance: Callable[[], Any]) -> None:
    """DenseGateError where the text of a perplexity that the cell itself does not measure cannot be read."""
    try:
        provenance()
    except (OSError, ValueError, LookupError) as error:
        raise DenseGateError(
            f"The dense gate of {model.name} measures {what.key}, and {what.corpus} cannot be read: "
            f"{errors.sentence(error).rstrip('.')}. Provide it, or run with --no-dense-gate, which the record notes."
        ) from error


def check(what: Perplexity, model: Model, values: Values) -> dict[str, float]:
    """What was expected and found, for the record; raises DenseGateError with the likely causes where they differ."""
    expected, found = model.dense[what.key], values[what.key]["perplexity"]
    if not abs(found - expected) <= model.tolerance * expected:
        raise DenseGateError(
            f"The dense {model.name} has perplexity {found:.2f} at {what.key}; {expected:.2f} is published, "
            f"and they differ by more than {100 * model.tolerance:g} %. Likely causes: a different split of, "
            f"or way of joining, {what.corpus}, a tokenizer or "
            "checkpoint other than the published one, another window length. Correct this, or run with "
            "--no-dense-gate, which the record notes."
        )
    return {"expected": expected, "found": found, "tolerance": model.tolerance}


def dense(root: Path, key: dict[str, Any], evaluate: Callable[[], Values]) -> Values:
    """The dense model's values stored under `key`, which names everything that can move them, or `evaluate()`.

    Nobody waits for another process that evaluates the same, which would hold a card for as long; both store the same.
    A damaged file is evaluated again.
    """
    path = root / ".cache" / "dense" / f"{digest(key)}.json"
    together = ranks.here()
    values = together.first(lambda: _read(path, key))
    if values is None:
        values = evaluate()
        content = checksummed_json.dumps({"key": key, "values": values})
        together.first(lambda: _write(path, content))
    return values


def _write(path: Path, content: str) -> None:
    try:
        with locks.at_once(path.with_suffix(".lock")) as alone:  # by which others tell a writer from a killed one
            if alone:
                atomic.write(path, content)
    except atomic.StorageError as error:
        logger.warning("%s The dense value is not kept for other cells.", error)


def _read(path: Path, key: dict[str, Any]) -> Values | None:
    """None where there is nothing, or nothing that can be trusted and was written under `key`."""
    try:
        content = checksummed_json.loads(atomic.read(path))
        if content["key"] != json.loads(json.dumps(key)):
            raise ValueError("it was written for another file")
        values: Values = content["values"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        logger.warning("Evaluating again, as %s cannot be used: %s.", path, error)
        return None
    return values
