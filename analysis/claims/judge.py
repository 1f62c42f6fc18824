"""Judges a claim by numbers: the paper's, ours, and ours with their noise.

A claim is a list of comparisons "left is better than factor * right" between cells of a table, for every model and
number that it speaks of.  Better is lower for perplexities, counts and shares, and higher for accuracies and speed.
With noise a comparison is decided only where its 95 % interval leaves no doubt:

    three seeds, more  log ratio of perplexities, or difference of accuracies, a t interval over the common seeds
    one run each       perplexity: t interval over the same windows' log-likelihoods, paired
                       accuracy: normal interval from both standard errors, as if unpaired, which is the cautious side
    counts             exact
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from analysis import published
from analysis.compare import Cell, cells
from analysis.rows import COST, Folders, Row, declared
from eval.intervals import half_width, normal_half_width
from experiments import papers

HIGHER = ("score", "tokens_per_second", "column_dispersion")
EXACT = ("parameters", "macs", "weight_bytes", "retraining_hours")
FEWEST_SEEDS = 3
Words = tuple[str, str]  # the paper's for a method and its setting


@dataclass(frozen=True)
class Better:
    """`left` is better than `factor` times `right`, which is another cell or a plain number."""

    left: Words
    right: Words | float
    factor: float = 1.0


@dataclass(frozen=True)
class Place:
    """Where to look: a declared table, or (without runs of ours) a printed one as `published`."""

    table: str
    models: tuple[str, ...]
    key: str
    metric: str = "perplexity"
    published: str | None = None


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
    """`verdict` is holds, holds so far (some comparisons have no numbers yet), fails, undecided or no numbers.

    `untuned` are cells without which a claim is undecided, as their learning rates were not chosen.

    `of` counts the comparisons with numbers and `without` those that lack them, for the reason that `lack` says;
    `against` names the comparisons that fail and `open` those that noise leaves undecided.
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
        if place.table and place.table not in self._known:
            self._known[place.table] = {
                (cell.model, *cell.words, cell.key, cell.metric): cell for cell in self._cells(place)
            }
        return self._known.get(place.table, {}).get((model, *words, place.key, place.metric))

    def _cells(self, place: Place) -> list[Cell]:
        table = papers.find(place.table)
        made = declared(table, self.root, table.runs(), self.data_dir)
        found = [cell for cell in cells(table, made) if cell.fold == "mean"]
        paid = (replace(cell, key=COST, metric="retraining_hours", published=None) for cell in found)
        return [*found, *paid]


def _is_untuned(row: Row) -> bool:
    if row.run.recovery is None or row.record is None:
        return False
    about = row.record.achieved.get("rate_choice")
    return about is None or about["at_edge"]


def on_paper(claim: Claim) -> Answer:
    """By the paper's own numbers; what it does not print is counted and decides nothing."""
    asked = list(_asked(claim.places, claim.comparisons))
    signs = [_sign(_printed(place, model, side.left), _number(place, model, side.right), side, place)
             for place, model, side in asked]  # fmt: skip
    return replace(_judged(signs, asked, "holds"), lack="not printed")


def on_ours(claim: Claim, ours: Ours, noise: bool = False) -> Answer:
    """By our numbers: on the paper's models where any of its comparisons was run, otherwise on the stand-in."""
    for places, comparisons in scopes(claim):
        asked = [one for one in _asked(places, comparisons) if ours.declares(*one)]
        signs = [(_noisy if noise else _plain)(ours, *one) for one in asked]
        if any(sign is not None for sign in signs):
            answer = _judged(signs, asked, "holds so far")
            known = [one for one, sign in zip(asked, signs, strict=True) if sign is not None]
            if claim.tuned and (untuned := list(dict.fromkeys(name for one in known for name in ours.untuned(*one)))):
                answer.verdict, answer.untuned = "undecided", untuned
            answer.where = ", ".join(dict.fromkeys(model for (_, model, _), sign in zip(asked, signs, strict=True)
                                                   if sign is not None))  # fmt: skip
            return answer
    return Answer("no numbers")


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


def _judged(signs: Sequence[int | None], asked: Sequence[tuple[Place, str, Better]], partly: str) -> Answer:
    """Signs: +1 holds, -1 fails, 0 cannot be told, None has no numbers; `partly` is said where all others hold."""
    known = [(sign, one) for sign, one in zip(signs, asked, strict=True) if sign is not None]
    if not known:
        return Answer("no numbers")
    against, undecided = ([f"{model} {' '.join(side.left)}" for sign, (_, model, side) in known if sign == which]
                          for which in (-1, 0))  # fmt: skip
    held = sum(sign > 0 for sign, _ in known)
    whole = "holds" if len(known) == len(asked) else partly
    verdict = "fails" if against else whole if held == len(known) else "undecided"
    return Answer(verdict, held, len(known), against, undecided, without=len(asked) - len(known))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _printed(place: Place, model: str, words: Words) -> float | None:
    source = place.published or papers.find(place.table).published
    key = (model, *words, place.key, place.metric)
    return next((cell.value for cell in published.of(source) if cell.key == key), None)


def _number(place: Place, model: str, right: Words | float) -> float | None:
    return right if isinstance(right, float) else _printed(place, model, right)


def _sign(left: float | None, right: float | None, side: Better, place: Place) -> int | None:
    if left is None or right is None:
        return None
    gain = side.factor * right - left
    better = -gain if place.metric in HIGHER else gain
    return 1 if better > 0 else -1


def _plain(ours: Ours, place: Place, model: str, side: Better) -> int | None:
    left = ours.cell(place, model, side.left)
    right = side.right if isinstance(side.right, float) else ours.cell(place, model, side.right)
    if left is None or right is None:
        return None
    return _sign(left.ours, right if isinstance(right, float) else right.ours, side, place)


def _noisy(ours: Ours, place: Place, model: str, side: Better) -> int | None:
    left = ours.cell(place, model, side.left)
    right = side.right if isinstance(side.right, float) else ours.cell(place, model, side.right)
    if left is None or right is None:
        return None
    interval = difference(left, right, side.factor)
    if interval is None:
        return 0
    low, high = interval
    sign = 1 if high < 0 else -1 if low > 0 else 0
    return -sign if place.metric in HIGHER else sign


def difference(left: Cell, right: Cell | float, factor: float) -> tuple[float, float] | None:
    """95 % interval of left - factor * right (of log left - log(factor * right) for perplexities); None: no spread."""
    if left.metric in EXACT:
        gap = (left.ours or 0) - factor * (right if isinstance(right, float) else right.ours or 0)
        return gap, gap
    if left.metric == "score":
        return _accuracies(left, right, factor)
    samples = _log_ratios(left, right, factor)
    return _t_interval(samples) if samples is not None and len(samples) > 1 else None


def _log_ratios(left: Cell, right: Cell | float, factor: float) -> Any:
    """By seed where there are enough of them, otherwise by window; None where neither can be paired.

    A method that sees no data has one run, which stands beside every seed of the other.
    """
    if isinstance(right, float):
        return np.asarray(_seeds(left) if len(left.values) >= FEWEST_SEEDS else _windows(left)) - math.log(
            factor * right
        )
    a, b = _seeds(left), _seeds(right)
    if max(len(a), len(b)) >= FEWEST_SEEDS:
        return np.subtract(a, b) - math.log(factor) if _pair(a, b) else None
    first, second = (cell.rows[0].measure(cell.key) or {} for cell in (left, right))
    if first.get("token_sha256") != second.get("token_sha256"):
        return None
    return np.subtract(_windows(left), _windows(right)) - math.log(factor)


def _pair(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) or 1 in (len(a), len(b))


def _seeds(cell: Cell) -> list[float]:
    return [math.log(value) for value in cell.values]


def _windows(cell: Cell) -> list[float]:
    return (cell.rows[0].measure(cell.key) or {}).get("nll_per_window", [])


def _accuracies(left: Cell, right: Cell | float, factor: float) -> tuple[float, float] | None:
    a, b = left.values, [right] if isinstance(right, float) else right.values
    if max(len(a), len(b)) >= FEWEST_SEEDS:
        return _t_interval(np.subtract(a, factor * np.asarray(b))) if _pair(a, b) else None
    sides = [(left, 1.0)] if isinstance(right, float) else [(left, 1.0), (right, factor)]
    errors = [(cell.rows[0].measure(cell.key) or {}).get("standard_error") for cell, _ in sides]
    if None in errors:
        return None
    weighed = [weight * error for error, (_, weight) in zip(errors, sides, strict=True) if error is not None]
    half = normal_half_width(math.hypot(*weighed))
    gap = (left.ours or 0.0) - factor * (right if isinstance(right, float) else right.ours or 0.0)
    return gap - half, gap + half


def _t_interval(samples: Any) -> tuple[float, float]:
    mean, half = float(np.mean(samples)), half_width(samples)
    return mean - half, mean + half
