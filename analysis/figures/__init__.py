"""Figures of results, each kind registered once: its name, its caption, and the function that draws it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from analysis.rows import Row, keys
from pruners.interface.suggest import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from experiments.spec import Table


@dataclass(frozen=True)
class Kind:
    """`function` of the module `module` here draws it from (table, rows), and where it shows one protocol key from
    (table, rows, key): `measured` is what a record holds under such keys, of which `means` go before single tasks.
    matplotlib is loaded once one is drawn.
    """

    caption: str
    module: str
    function: str
    measured: str | None = None
    means: bool = False

    def keys(self, rows: Sequence[Row]) -> list[str | None]:
        """A figure is drawn for each of these: protocol keys, or None alone where it shows no single one."""
        if self.measured is None:
            return [None]
        found = [key for key in keys(rows) if any(self.measured in (row.measure(key) or {}) for row in rows)]
        declared = {key for row in rows for what in row.run.measures for key in what.keys}
        wanted = [key for key in found if key.startswith("mean.")] or [key for key in found if key in declared]
        return [*(wanted if self.means else found)]


KINDS = {
    "perplexity": Kind("Perplexity by method", "perplexity", "perplexity", measured="perplexity"),
    "accuracy": Kind("Accuracy by method", "perplexity", "accuracy", measured="score", means=True),
    "sparsity": Kind("Perplexity by sparsity", "sweeps", "by_sparsity"),
    "paper": Kind("Ours against the paper's", "sweeps", "against_paper"),
    "kept": Kind("Heads and channels kept in each block", "structure", "kept"),
    "losses": Kind("Loss while retraining", "training", "losses"),
    "steps": Kind("Perplexity by step of retraining", "training", "steps"),
    "parameters": Kind("Mean accuracy by parameters", "structure", "by_parameters"),
    "cost": Kind("Time, and on accelerators memory", "cost", "cost"),
    "numbers": Kind("Sizes, speed and other numbers", "numbers", "numbers"),
    "masks": Kind("Masks of one block", "masks", "masks", measured="maps"),
}


def main(rows: Sequence[Row]) -> list[tuple[str, str | None]]:
    """What a table is looked at for, a kind and a key each: perplexities, else accuracies; masks; else numbers."""
    for kind in ("perplexity", "accuracy"):
        if found := KINDS[kind].keys(rows):
            break
    wanted: list[tuple[str, str | None]] = [(kind, key) for key in found]
    wanted += [("masks", key) for key in KINDS["masks"].keys(rows)]
    return wanted or [("numbers", None)]


def draw(kind: str, table: Table, rows: Sequence[Row], key: str | None = None) -> Figure:
    """The figure; UndrawableError (of `style`) where there is too little for it, UsageError for an idle `key`."""
    known = KINDS[kind]
    check_key(kind, key)
    function = getattr(import_module(f"analysis.figures.{known.module}"), known.function)
    if known.measured is not None:
        return function(table, rows, key)
    return function(table, rows)


def check_key(kind: str, key: str | None) -> None:
    """UsageError for a protocol key where the kind shows no single one."""
    if key is not None and KINDS[kind].measured is None:
        *keyed, last = (name for name, one in KINDS.items() if one.measured)
        raise UsageError(f"--measure chooses among {', '.join(keyed)} and {last}; --kind {kind} draws what it finds.")
