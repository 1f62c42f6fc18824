"""Judges a claim by numbers: the paper's, ours, and ours with their noise.

A claim is a list of comparisons "left is better than factor * right" between cells of a table, for every model and
number that it speaks of.  Better is lower for perplexities, counts and shares, and higher for accuracies and speed.
With noise a comparison is decided only where its 95 % interval (`evidence`) leaves no doubt; counts have no noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from analysis import published
from analysis.claims.evidence import difference
from analysis.compare import Cell, cells
from analysis.rows import COST, Folders, Row, declared
from experiments import papers

HIGHER = ("score", "tokens_per_second", "column_dispersion")
PAID = ("retraining_hours", "trained_share")  # of a cell's own making
EXACT = ("parameters", "macs", "weight_bytes", *PAID)
Words = tuple[str, str]  # the paper's for a method and its setting
Sign = int | str | None  # +1 holds, -1 fails, 0 or a reason cannot be told, None has no numbers


@dataclass(frozen=True)
class Better:
    """`left` is better than `factor` times `right`, which is another cell or a plain number.

    `or_equal` where the claim allows as much ("within", "at most").
    """

    left: Words
    right: Words | float
    factor: float = 1.0
    or_equal: bool = False


@dataclass(frozen=True)
class Place:
    """Where to look: a declared table."""

    table: str
    models: tuple[str, ...]
    key: str
    metric: str = "perplexity"


@dataclass(frozen=True)
class Claim:
    """A paper's claim; `stand_in` is where the embedded model is asked while the paper's models were not run.

    A claim about retraining at its best says `tuned`: it is undecided where a learning rate was not chosen within a
    grid.
    """

    name: str
    paper: str
    sentence: str
    comparisons: tuple[Better, ...]
    places: tuple[Place, ...]
    stand_in: tuple[Place, ...] = ()
    stand_in_comparisons: tuple[Better, ...] = ()
    tuned: bool = False


@dataclass
class Answer:
    """`verdict` is holds, holds so far (some comparisons have no numbers yet), fails, undecided, no numbers, or no
    cells where no table has those that it compares.

    `untuned` are cells without which a claim is undecided, as their learning rates were not chosen.

    `of` counts the comparisons with numbers and `without` those that lack them, for the reason that `lack` says;
    `against` names the comparisons that fail and `open` those that noise leaves undecided, with the reason where no
    interval could be had.
    """

    verdict: str
    held: int = 0
    of: int = 0
    against: list[str] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    where: str = ""
    without: int = 0
    lack: str = "not measured"
    untuned: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.of:
            return self.verdict
        if self.untuned:
            return f"{self.verdict}: not tuned ({_listed(self.untuned)}){f' on {self.where}' if self.where else ''}"
        return f"{self.verdict} ({self.told()}){f' on {self.where}' if self.where else ''}"

    def told(self, known: str = "") -> str:
        """How many comparisons hold, which fail or are undecided (without the words `known`), and what is not known."""
        parts = {"against it: ": self.against, "undecided: ": self.open}
        said = [head + _listed([name.removeprefix(known) for name in names]) for head, names in parts.items() if names]
        return "; ".join([f"{self.held} of {self.of}", *said]) + self.gap

    @property
    def gap(self) -> str:
        """E.g. `; 1 of 2 not measured`; empty where there are all numbers."""
        return f"; {self.without} of {self.of + self.without} {self.lack}" if self.without else ""


class Ours:
    """Our cells by table, read once; with `data_dir` without the records of other texts than lie there."""

    def __init__(self, root: Folders, data_dir: Path | None = None) -> None:
        self.root, self.data_dir = root, data_dir
        self._known: dict[str, dict[tuple[str, ...], Cell]] = {}

    def declares(self, place: Place, model: str, side: Better) -> bool:
        """Whether our table has the cells of this comparison, run or not."""
        asked = [words for words in (side.left, side.right) if not isinstance(words, float)]
        return all(self._declared(place, model, words) for words in asked)

    def cell(self, place: Place, model: str, words: Words) -> Cell | None:
        found = self._declared(place, model, words)
        return found if found and found.ours is not None else None

    def untuned(self, place: Place, model: str, side: Better) -> Iterator[str]:
        """The cells of a comparison whose learning rate was not chosen, or is the lowest or highest of its grid."""
        for words in (side.left, side.right):
            found = None if isinstance(words, float) else self._declared(place, model, words)
            if found and any(_is_untuned(row) for row in found.rows) and not papers.find(place.table).rates:
                yield f"{model} {found.method} {found.setting}"

    def _declared(self, place: Place, model: str, words: Words) -> Cell | None:
        if place.table not in self._known:
            self._known[place.table] = {
                (cell.model, *cell.words, cell.key, cell.metric): cell for cell in self._cells(place)
            }
        return self._known.get(place.table, {}).get((model, *words, place.key, place.metric))

    def _cells(self, place: Place) -> list[Cell]:
        table = papers.find(place.table)
        made = declared(table, self.root, table.runs(), self.data_dir)
        found = [cell for cell in cells(table, made) if cell.fold == "mean"]
        paid = [replace(cell, key=COST, metric=what, published=None) for cell in found for what in PAID]
        return [*found, *paid]


def _is_untuned(row: Row) -> bool:
    if row.run.recovery is None or row.record is None:
        return False
    about = row.record.achieved.get("rate_choice")
    return about is None or about["at_edge"]


def on_paper(claim: Claim) -> Answer:
    """By the paper's own numbers; those that are not at hand, or in no paper, are counted and decide nothing."""
    asked = list(_asked(claim.places, claim.comparisons))
    signs = [_sign(_printed(place, model, side.left), _number(place, model, side.right), side, place)
             for place, model, side in asked]  # fmt: skip
    return replace(_judged(signs, asked, "holds"), lack="without its numbers here")


def on_ours(claim: Claim, ours: Ours, noise: bool = False) -> Answer:
    """By our numbers: on the paper's models where any of its comparisons was run, otherwise on the stand-in."""
    verdict = "no cells"
    for places, comparisons in scopes(claim):
        asked = [one for one in _asked(places, comparisons) if ours.declares(*one)]
        verdict = "no numbers" if asked else verdict
        signs = [(_noisy if noise else _plain)(ours, *one) for one in asked]
        if any(sign is not None for sign in signs):
            answer = _judged(signs, asked, "holds so far")
            known = [one for one, sign in zip(asked, signs, strict=True) if sign is not None]
            if claim.tuned and (untuned := list(dict.fromkeys(name for one in known for name in ours.untuned(*one)))):
                answer.verdict, answer.untuned = "undecided", untuned
            answer.where = ", ".join(dict.fromkeys(model for (_, model, _), sign in zip(asked, signs, strict=True)
                                                   if sign is not None))  # fmt: skip
            return answer
    return Answer(verdict)


def scopes(claim: Claim) -> tuple[tuple[tuple[Place, ...], tuple[Better, ...]], ...]:
    return (
        (claim.places, claim.comparisons),
        (claim.stand_in, claim.stand_in_comparisons or claim.comparisons),
    )


def _asked(places: Sequence[Place], comparisons: Sequence[Better]) -> Iterator[tuple[Place, str, Better]]:
    for place in places:
        for model in place.models:
            for side in comparisons:
                yield place, model, side


def _judged(signs: Sequence[Sign], asked: Sequence[tuple[Place, str, Better]], partly: str) -> Answer:
    """`partly` is said where all that have numbers hold and others have none."""
    known = [(sign, name) for sign, name in zip(signs, _names(asked), strict=True) if sign is not None]
    if not known:
        return Answer("no numbers")
    against = [name for sign, name in known if sign == -1]
    undecided = [f"{name} ({sign})" if isinstance(sign, str) else name for sign, name in known if sign not in (1, -1)]
    held = len(known) - len(against) - len(undecided)
    whole = "holds" if len(known) == len(asked) else partly
    verdict = "fails" if against else whole if held == len(known) else "undecided"
    return Answer(verdict, held, len(known), against, undecided, without=len(asked) - len(known))


def _names(asked: Sequence[tuple[Place, str, Better]]) -> list[str]:
    """Each comparison's model and left side; where several have the same, what tells them apart."""
    named = [f"{model} {' '.join(side.left)}" for _, model, side in asked]
    tells = ([f" against {_words(side.right)}" for _, _, side in asked], [f" at {place.key}" for place, _, _ in asked])
    for tell in tells:
        same: dict[str, set[str]] = {}
        for name, more in zip(named, tell, strict=True):
            same.setdefault(name, set()).add(more)
        named = [name + more if len(same[name]) > 1 else name for name, more in zip(named, tell, strict=True)]
    return named


def _words(right: Words | float) -> str:
    return f"{right:,g}" if isinstance(right, float) else " ".join(right).strip()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _printed(place: Place, model: str, words: Words) -> float | None:
    key = (model, *words, place.key, place.metric)
    return next((cell.value for cell in published.of(papers.find(place.table).published) if cell.key == key), None)


def _number(place: Place, model: str, right: Words | float) -> float | None:
    return right if isinstance(right, float) else _printed(place, model, right)


def _sign(left: float | None, right: float | None, side: Better, place: Place) -> int | None:
    if left is None or right is None:
        return None
    gain = side.factor * right - left
    better = -gain if place.metric in HIGHER else gain
    return 1 if better > 0 or (side.or_equal and better == 0) else -1


def _plain(ours: Ours, place: Place, model: str, side: Better) -> int | None:
    left = ours.cell(place, model, side.left)
    right = side.right if isinstance(side.right, float) else ours.cell(place, model, side.right)
    if left is None or right is None:
        return None
    return _sign(left.ours, right if isinstance(right, float) else right.ours, side, place)


def _noisy(ours: Ours, place: Place, model: str, side: Better) -> Sign:
    if place.metric in EXACT:
        return _plain(ours, place, model, side)
    left = ours.cell(place, model, side.left)
    right = side.right if isinstance(side.right, float) else ours.cell(place, model, side.right)
    if left is None or right is None:
        return None
    found = difference(left, right, side.factor)
    if isinstance(found, str):
        return found
    low, high = found
    sign = 1 if high < 0 else -1 if low > 0 else 0
    return -sign if place.metric in HIGHER else sign
