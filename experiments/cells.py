"""The cells of a table with their ids and labels, and the order in which they are best run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any, TypeVar

from experiments import measures, models, rates, recovery
from experiments.labels import apart, distinct, labels
from experiments.measures.asked import Costs, DenseAnswers, MaskSample
from experiments.spec import Efficiency, Run, Table, needs_windows
from experiments.store import code
from experiments.store.described import digest
from pruners.interface import plugin
from pruners.interface.suggest import UsageError

T = TypeVar("T")
ALONE = (Costs, DenseAnswers, Efficiency, MaskSample)  # measures of the making, of the dense model too, or of memory
OVERHEAD_TOKENS = 500  # loading and writing, as tokens that could have gone through the model meanwhile


@dataclass(frozen=True)
class Cell:
    """`words` are the paper's for its method and setting, `title` what readers see of them; `label` tells it from every
    other cell of its table."""

    run: Run
    id: str
    label: str
    words: tuple[str, str] = ("", "")
    title: tuple[str, str] = ("", "")

    @property
    def work(self) -> float:
        """Rough work in tokens through the model, for estimates of the time left."""
        return self.making_work + sum(map(measures.work_tokens, self.run.measures))

    @property
    def making_work(self) -> float:
        """The part of the work that makes the model which is measured."""
        grid = rates.grid(self.run)
        attempts = len(grid.rates) if grid else 1
        recovery_work = attempts * recovery.work_tokens(self.run.recovery, self.run.windows)
        return OVERHEAD_TOKENS + self.pruning_work + recovery_work

    @property
    def pruning_work(self) -> float:
        run = self.run
        if not run.windows or not needs_windows(run.method):
            return 0
        passes = 5 if run.method.statistics_key else 2  # a backward pass counts as two
        return passes * run.windows.count * run.windows.length


def cells(runs: Sequence[Run], table: Table | None = None) -> list[Cell]:
    """One cell per run, called as its table says; UsageError for a model nobody knows, for what no record can hold, a
    label that is none, and methods of different classes that would have one record."""
    for run in runs:
        for method in filter(None, (run.method, run.tuning and run.tuning.at)):
            plugin.check(method)
    identities = {name: _identity(name) for name in dict.fromkeys(run.model for run in runs)}
    try:
        ids = [_id(run, identities[run.model]) for run in runs]
        words = labels(runs, table.label if table else None)
    except UsageError as error:
        raise UsageError(f"{table.called}: {error}" if table else str(error)) from error
    titles = distinct(runs, [table.title_of(told) for told in words] if table else words)
    made = [Cell(*told) for told in zip(runs, ids, apart(runs, titles), words, titles, strict=True)]
    _refuse_namesakes(made)
    return made


def _id(run: Run, identity: dict[str, str]) -> str:
    try:
        return run.id(identity)
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from error


def _refuse_namesakes(made: Sequence[Cell]) -> None:
    """UsageError where two cells are made of different classes of one name, which no id tells apart."""
    first: dict[str, dict[str, list[type[Any]]]] = {}
    for cell in made:
        named: dict[str, list[type[Any]]] = {}
        for kind in code.kinds(cell.run):
            named.setdefault(kind.__name__.lower(), []).append(kind)
        before = first.setdefault(cell.id, named)
        pairs = (pair for name in named.keys() & before.keys() for pair in zip(before[name], named[name], strict=False))
        for other, kind in pairs:
            if other is not kind:
                one, two = (f"{part.__module__}.{part.__qualname__}" for part in (other, kind))
                raise UsageError(
                    f"{one} and {two} are called alike, so that {cell.label} would have one record for both; give one "
                    "class another name."
                )


def method_name(run: Run) -> str:
    return run.spec()["method"]["name"] if run.method is not None else "dense"


def ordered(found: Sequence[Cell]) -> list[Cell]:
    """Cells of one model next to each other, among them those that share statistics, and the same pruned model."""
    first: dict[Any, int] = {}
    keys = {cell: (cell.run.model, sharing(cell), made(cell.run)) for cell in found}
    for index, cell in enumerate(found):
        for part in keys[cell]:
            first.setdefault(part, index)
    return sorted(found, key=lambda cell: tuple(first[part] for part in keys[cell]))


def in_turns(tables: Sequence[tuple[T, Sequence[Cell]]]) -> Iterator[tuple[T, list[Cell]]]:
    """Tables one after the other, each with its cells in order (or none); but what measures the model that a cell of
    an earlier table makes comes right after that cell, unless it is the very same cell, whose record is taken over."""
    places: dict[Any, list[tuple[int, Cell]]] = {}
    for number, (_, found) in enumerate(tables):
        for cell in ordered(found):
            model = made(cell.run) if hands_over(cell.run) else None
            apart = model is None or cell.id in {other.id for _, other in places.get(model, ())}
            places.setdefault((number, cell.id) if apart else model, []).append((number, cell))
    for number, some in groupby(chain.from_iterable(places.values()), key=lambda placed: placed[0]):
        yield tables[number][0], [cell for _, cell in some]
    yield from ((table, []) for table, found in tables if not found)


def sharing(cell: Cell) -> str:
    """Equal for cells that share the dense model's statistics, or the model that they measure."""
    spec, key = cell.run.spec(), cell.run.method.statistics_key if cell.run.method is not None else None
    return digest({"statistics": key, **{k: spec[k] for k in ("model", "dtype", "windows")}}) if key else made(cell.run)


def made(run: Run) -> str:
    """Equal for runs that measure the same model, which is then made once."""
    return digest({name: told for name, told in run.spec().items() if name != "measures"})


def hands_over(run: Run) -> bool:
    """Whether its model goes on to the next cell that measures the same one: not where the dense model is asked again,
    or where making the model is measured or is what the cell is for."""
    return not rates.grid(run) and not any(isinstance(what, ALONE) for what in run.measures)


def same_model(before: Cell, cell: Cell) -> bool:
    """Whether a cell measures the very model that the one before it has made."""
    return hands_over(before.run) and hands_over(cell.run) and made(before.run) == made(cell.run)


def _identity(model: str) -> dict[str, str]:
    models.check(model)
    return models.identity(model)
