"""The cells of a table with their ids and labels, and the order in which they are best run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments import measures, models, rates, recovery
from experiments.labels import full, labels
from experiments.spec import Run, digest, needs_windows
from pruners.suggest import UsageError, unknown

OVERHEAD_TOKENS = 500  # loading and writing, as tokens that could have gone through the model meanwhile


@dataclass(frozen=True)
class Cell:
    run: Run
    id: str
    label: str

    @property
    def work(self) -> float:
        """Rough work in tokens through the model, for estimates of the time left."""
        grid = rates.grid(self.run)
        attempts = len(grid.rates) if grid else 1
        recovery_work = attempts * recovery.work_tokens(self.run.recovery, self.run.windows)
        return OVERHEAD_TOKENS + self.pruning_work + recovery_work + sum(map(measures.work_tokens, self.run.measures))

    @property
    def pruning_work(self) -> float:
        run = self.run
        if not run.windows or not needs_windows(run.method):
            return 0
        passes = 5 if run.method.statistics_key else 2  # a backward pass counts as two
        return passes * run.windows.count * run.windows.length


def cells(runs: Sequence[Run], label: Callable[[Run], tuple[str, str]] | None = None) -> list[Cell]:
    """One cell per run, called as `label` says; raises UsageError for a model nobody knows."""
    identities = {name: _identity(name) for name in dict.fromkeys(run.model for run in runs)}
    named = zip(runs, labels(runs, label), strict=True)
    return [Cell(run, run.id(identities[run.model]), full(label)) for run, label in named]


def choose(found: Sequence[Cell], methods: Iterable[str] = (), only: Iterable[str] = ()) -> list[Cell]:
    """Cells of these methods (names, or `dense`) and with these ids or labels; UsageError names what is nearest."""
    methods, only = [name.lower() for name in methods], [name.lower() for name in only]
    _refuse_unknown("method", methods, {method_name(cell.run) for cell in found})
    _refuse_unknown("cell", only, {cell.label.lower() for cell in found} | {cell.id for cell in found})
    chosen = [cell for cell in found if not methods or method_name(cell.run) in methods]
    named = [cell for cell in chosen if not only or cell.id in only or cell.label.lower() in only]
    if found and not named:
        raise UsageError(
            f"No cell of {', '.join(methods)} is called {', '.join(only)}; ask by method or by cell alone."
        )
    return named


def method_name(run: Run) -> str:
    return run.spec()["method"]["name"] if run.method is not None else "dense"


def ordered(found: Sequence[Cell]) -> list[Cell]:
    """Cells of one model next to each other, and among them those that share statistics."""
    first: dict[Any, int] = {}
    for index, cell in enumerate(found):
        first.setdefault(cell.run.model, index)
        first.setdefault(sharing(cell), index)
    return sorted(found, key=lambda cell: (first[cell.run.model], first[sharing(cell)]))


def sharing(cell: Cell) -> str:
    """Equal for cells that share the dense model's statistics."""
    spec, key = cell.run.spec(), cell.run.method.statistics_key if cell.run.method is not None else None
    return digest({"statistics": key, **{k: spec[k] for k in ("model", "dtype", "windows")}}) if key else cell.id


def _identity(model: str) -> dict[str, str]:
    models.check(model)
    return models.identity(model)


def _refuse_unknown(kind: str, asked: Iterable[str], known: set[str]) -> None:
    for name in asked:
        if name not in known:
            raise UsageError(unknown(f"{kind} of this table", name, known))
