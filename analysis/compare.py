"""Compares our numbers with the paper's: value, difference, interval and verdict for every cell of a table.

The verdict is *matches* where the paper's value lies within the interval around ours, half of the paper's last digit
added.  The interval says where a repeat of the experiment would land:

    several seeds     mean +- t(97.5 %) * s * sqrt(1/n + 1/m), m the number of draws that the paper averages (without
                      a printed value that of the mean itself: m infinite)
    accuracies        the same with the standard error over documents, from one run; where all are right or all wrong,
                      whose standard error is 0, the length of the exact interval (Clopper and Pearson)
    one perplexity    REPEATS, the relative distance at which independent runs of the released code have landed
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import published
from analysis.published import Published
from analysis.rows import Row, repeats
from eval.intervals import CONFIDENCE, half_width, normal_half_width
from experiments.spec import Run, Table

NOTE = (
    "± beside the paper: half the interval in which a repeat of the experiment would land, which is wider than that of "
    "the mean; of a single perplexity the relative distance at which independent reruns have landed."
)
MATCHES, DIFFERS, MISSING, UNPUBLISHED = "matches", "differs", "missing", "not published"
REPEATS = {"Flap": 0.04, "WandaSP": 0.13, "LLMPruner": 0.09, "LLMPruner l2": 0.3}
OTHERS = 0.01  # dense, and pruned without structure: BESA's reruns land within 0.3 %, Wanda's seeds vary by 0.15 %
FOLDS: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean,
    "std": statistics.stdev,
    "minimum": min,
    "maximum": max,
}
PERCENT = ("score",)
COUNTED = ("parameters", "macs", "weight_bytes")  # the same at every repeat
UNITS = {  # of quantities that their protocol key does not name
    "parameters": ("parameters",),
    "macs": ("MACs",),
    "weight_bytes": ("bytes of weights",),
    "tokens_per_second": ("tokens/s decoded",),
    "exact_share": ("share of answers equal to dense",),
    "first_difference": ("tokens before first difference",),
    "column_dispersion": ("column overdispersion",),
    "pruning_s": ("pruning, s",),
    "training_tokens_per_second": ("retraining, tokens/s",),
    "peak_bytes": ("peak memory, bytes",),
}


@dataclass(frozen=True)
class Cell:
    """One number of a table: the runs that differ only in their seed, and what the paper prints for it, if anything.

    `fold` says what of several seeds is meant: their mean, or their std, minimum or maximum; `words` are the paper's
    for method and setting, by which its values and its claims find this one.
    """

    model: str
    method: str
    setting: str
    key: str
    metric: str
    rows: tuple[Row, ...]
    published: Published | None = None
    fold: str = "mean"
    words: tuple[str, str] = ("", "")

    @property
    def is_dense(self) -> bool:
        return self.rows[0].is_dense

    @property
    def partial(self) -> list[str]:
        """The corpora and tasks of which only a part was at hand."""
        return list(dict.fromkeys(name for row in self.rows for name in row.partial_of(self.key)))

    @property
    def values(self) -> list[float]:
        found = ((row.measure(self.key) or {}).get(self.metric) for row in self.rows)
        return [value for value in found if value is not None]

    @property
    def ours(self) -> float | None:
        """None where a seed is missing, or where a spread is asked of one seed."""
        if len(self.values) < len(self.rows) or (self.fold != "mean" and len(self.values) < 2):
            return None
        return FOLDS[self.fold](self.values)

    @property
    def half_width(self) -> float | None:
        """Of the interval around ours in which a repeat would land; None where there is none."""
        if self.ours is None or self.fold != "mean":
            return None
        if len(self.values) > 1:
            return half_width(self.values, self._draws)
        if self.half_width_of_mean is not None:
            return self.half_width_of_mean
        if not self._varies:
            return 0.0
        if not self.published or self.metric != "perplexity":
            return None
        return self.ours * _repeats(self.rows[0].run.method)  # what a rerun elsewhere moves

    @property
    def half_width_of_mean(self) -> float | None:
        """Of the interval of the mean over seeds, or over documents for an accuracy; None where there is none."""
        if self.ours is None or self.fold != "mean":
            return None
        if len(self.values) > 1:
            return half_width(self.values)
        return _of_documents(self.ours, self.rows[0].measure(self.key) or {}) if self.metric in PERCENT else None

    @property
    def difference(self) -> float | None:
        paper = self.published.value if self.published else None
        return None if self.ours is None or paper is None else self.ours - paper

    @property
    def verdict(self) -> str:
        if self.published is None:
            return UNPUBLISHED
        if self.ours is None:
            failed = next((row.failure.message for row in self.rows if row.failure and not row.record), None)
            return f"{MISSING}: {failed}" if failed else MISSING
        partial = (f"only a part of {name} was available" for name in self.partial)
        reasons = [self.published.caveat, *partial]
        if self.difference is None:
            reasons.append("the paper prints no number")
        if any(reasons):
            return f"not comparable: {'; '.join(reason for reason in reasons if reason)}"
        if self.half_width is None:
            why = "no interval is computed for a spread over few seeds" if self.fold != "mean" else "no spread is known"
            return f"not comparable: {why}"
        allowed = self.half_width + (self.published.rounding or 0.0)
        return MATCHES if abs(self.difference or 0.0) <= allowed else DIFFERS

    @property
    def _draws(self) -> float:
        if self.published is None:
            return math.inf
        return len(self.values) if "seeds" in self.published.metric else 1

    @property
    def _varies(self) -> bool:
        return self.metric not in COUNTED


def cells(table: Table, rows: Sequence[Row]) -> list[Cell]:
    """Every number that the table declares, in its order, as often as the paper prints it, but as the mean at least."""
    printed: dict[tuple[str, ...], list[Published]] = {}
    for cell in published.of(table.published):
        printed.setdefault((*cell.key[:-1], cell.metric.partition(",")[0]), []).append(cell)
    found = []
    for group in repeats(rows):
        for key, metric in quantities(group[0].run):
            row = group[0]
            place = (row.run.model_name, *row.words, key, metric)
            papers: list[Published | None] = [*(printed.get(place, []) if row.run.is_of_catalogue else [])]
            if not any(_fold(paper) == "mean" for paper in papers):
                papers.insert(0, None)
            for paper in papers:
                seen = (row.run.model_name, row.method, row.setting)
                found.append(Cell(*seen, key, metric, group, paper, _fold(paper), row.words))
    return found


def tells_more(found: Sequence[Cell]) -> bool:
    """Whether there is a printed value or a mean over seeds, which the rows alone do not show."""
    return any(cell.published or len(cell.rows) > 1 for cell in found)


def quantities(run: Run) -> list[tuple[str, str]]:
    """(protocol key, quantity) of every number that a paper would print of this run."""
    return [(key, metric) for what in run.measures for key in what.keys for metric in what.shown]


def frame(found: Iterable[Cell]) -> pd.DataFrame:
    """Unrounded; what is missing is empty."""
    return pd.DataFrame([_numbers(cell) for cell in found])


def text(found: Sequence[Cell]) -> pd.DataFrame:
    """What a reader sees."""
    several = len({cell.model for cell in found}) > 1
    words = pd.DataFrame([_words(cell, several) for cell in found])
    return words if any(cell.published for cell in found) else words.drop(columns=["Paper", "Difference", "Verdict"])


def counts(found: Sequence[Cell]) -> str:
    """One sentence: how many cells match, differ, cannot be compared or are missing."""
    kinds = pd.Series([cell.verdict.partition(":")[0] for cell in found]).value_counts()
    several = {MATCHES: "match", DIFFERS: "differ"}
    return ", ".join(f"{count} {several.get(str(kind), kind) if count > 1 else kind}" for kind, count in kinds.items())


def printed(value: float | None, cell: Cell, sign: str = "") -> str:
    """The paper's value with its digits; what is ours with as many, two at least, and whole from 1,000.

    Accuracies are in per cent.
    """
    if value is None:
        return "—"
    scale = 100 if cell.metric in PERCENT else 1
    digits = _digits(cell, scale)
    if not cell.published or value != cell.published.value:
        whole = cell.metric in COUNTED or (scale == 1 and abs(cell.ours or value) >= 1000)
        digits = 0 if whole else max(2, digits)
    return f"{scale * value:{sign},.{digits}f}"


def _digits(cell: Cell, scale: int) -> int:
    """After the point in what the paper prints, half of whose last digit is its rounding."""
    rounding = cell.published.rounding if cell.published else None
    if not rounding:
        return 0 if cell.metric in COUNTED else 2
    return max(0, -round(math.log10(2 * scale * rounding)))


def _numbers(cell: Cell) -> dict[str, object]:
    paper = cell.published
    return {
        "model": cell.model,
        "method": cell.method,
        "setting": cell.setting,
        "protocol": cell.key,
        "metric": paper.metric if paper else cell.metric,
        "runs": len(cell.rows),
        "ours": cell.ours,
        "half_width": cell.half_width,
        "paper": paper.value if paper else None,
        "difference": cell.difference,
        "verdict": cell.verdict,
        "printed_in": paper.place if paper else None,
        "evidence": paper.evidence if paper else None,
        "note": paper.note if paper else None,
    }


def _words(cell: Cell, several: bool) -> dict[str, str]:
    ours = printed(cell.ours, cell)
    spread = f" ± {printed(cell.half_width, cell)}" if cell.ours is not None and cell.half_width else ""
    return {
        "Method": cell.method,
        **({"Model": cell.model} if several else {}),
        "Setting": cell.setting,
        "Measured": ", ".join([cell.key, *UNITS.get(cell.metric, ()), *_folded(cell)]),
        "Ours": ours + spread + _seeds_measured(cell),
        "Paper": printed(cell.published.value, cell) if cell.published else "—",
        "Difference": printed(cell.difference, cell, "+"),
        "Verdict": cell.verdict,
    }


def _folded(cell: Cell) -> list[str]:
    return [f"{cell.fold} of seeds"] if cell.fold != "mean" else []


def _seeds_measured(cell: Cell) -> str:
    done, asked = len(cell.values), len(cell.rows)
    if asked == 1 or not done:
        return ""
    return f" ({asked} seeds)" if done == asked else f" ({done} of {asked} seeds)"


def _of_documents(score: float, measured: Mapping[str, Any]) -> float | None:
    error, documents = measured.get("standard_error"), measured.get("documents")
    if error:
        return normal_half_width(error)
    if error is None or not documents or score not in (0.0, 1.0):
        return None
    from scipy import stats

    exact = stats.binomtest(round(score * documents), documents).proportion_ci(CONFIDENCE, method="exact")
    return float(exact.high - exact.low)


def _repeats(method: object) -> float:
    name = type(method).__name__
    importance = getattr(method, "importance", "")
    return REPEATS.get(f"{name} {importance}", REPEATS.get(name, OTHERS))


def _fold(published: Published | None) -> str:
    return next((fold for fold in FOLDS if published and f", {fold} of" in published.metric), "mean")
