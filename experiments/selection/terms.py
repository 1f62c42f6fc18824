"""The terms that select cells: ids, labels, settings, and `model=`, `seed=` and `setting=`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from experiments import labels
from experiments.cells import Cell, method_name
from pruners.interface.suggest import UsageError, unknown

KINDS = ("model", "seed", "setting")
CELL = "cell"


def choose(
    found: Mapping[str, Sequence[Cell]], methods: Sequence[str] = (), only: Sequence[str] = ()
) -> dict[str, list[Cell]]:
    """By table the cells of these methods (names, or `dense`) that answer every kind of term of `only`, each by one of
    its values: `model=llama-7b seed=0 seed=1 "Wanda 50 %"` are both seeds of that cell on that model.

    UsageError names what is nearest to a term that no cell answers, or says that no cell answers all of them.
    """
    every = [cell for cells in found.values() for cell in cells]
    names = [name.lower() for name in methods]
    _refuse_unknown("method", names, {method_name(cell.run) for cell in every})
    asked: dict[str, list[str]] = {}
    for word in only:
        kind, value = _term(word, every)
        asked.setdefault(kind, []).append(value)
    kept = {
        table: [
            cell
            for cell in cells
            if (not names or method_name(cell.run) in names)
            and all(values_of(cell, kind) & set(values) for kind, values in asked.items())
        ]
        for table, cells in found.items()
    }
    if every and not any(kept.values()):
        of = f" of {', '.join(names)}" if names else ""
        raise UsageError(f"No cell{of} matches {' and '.join(only).lower()}; use fewer conditions.")
    return kept


def values_of(cell: Cell, kind: str) -> set[str]:
    """What a cell answers to, in lower case and without spaces."""
    values = {
        "model": [cell.run.model_name],
        "seed": [str(seed)] if (seed := labels.seed(cell.run)) is not None else [],
        "setting": [cell.words[1], cell.title[1]],
        CELL: [
            cell.id,
            cell.label,
            *(word for both in (cell.words, cell.title) for word in (labels.full(both), both[1])),
        ],
    }
    return {_plain(value) for value in values[kind] if value}


def _term(word: str, cells: Sequence[Cell]) -> tuple[str, str]:
    name, equals, value = word.partition("=")
    plain = _plain(word)
    if any(plain in values_of(cell, CELL) for cell in cells) or not equals or name.lower() not in KINDS:
        if not any(plain in values_of(cell, CELL) for cell in cells):
            shown = {labels.full(cell.title).lower() for cell in cells} | {cell.label.lower() for cell in cells}
            raise UsageError(unknown("cell of this table", word.lower(), shown | {cell.id for cell in cells}))
        return CELL, plain
    kind = name.lower()
    value = _share(value) if kind == "setting" else value
    known = {one for cell in cells for one in values_of(cell, kind)}
    _refuse_unknown(kind, [_plain(value)], known)
    return kind, _plain(value)


def _share(value: str) -> str:
    """0.5 as 50 %, as tables call it; anything else as it is."""
    try:
        return f"{100 * share:g} %" if 0 < (share := float(value)) < 1 else value
    except ValueError:
        return value


def _plain(text: str) -> str:
    return "".join(text.lower().split())


def _refuse_unknown(kind: str, asked: Sequence[str], known: set[str]) -> None:
    for name in asked:
        if name not in known:
            raise UsageError(unknown(f"{kind} of this table", name, known))
