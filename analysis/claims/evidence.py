"""The 95 % interval of the difference of two cells, or why there is none.

Wherever one of both has several seeds the seeds are compared; a single run speaks for itself alone:

    several seeds      a t interval over the common ones, of log ratios of perplexities, otherwise of differences; with
                       fewer than two in common as if unpaired, by Welch's t interval over all
    one perplexity     a t interval over the same windows' log-likelihoods, paired
    one accuracy       from both intervals over documents, as if unpaired, which is the cautious side
    one timing         from the notches around both medians, on the same machine

What the same seed draws, such as the same windows, moves both cells alike, so that the difference within it says more
than both numbers apart; a seed that only one of them has, or by which it draws something else, says nothing of such a
difference, and to pair it with any other would be arbitrary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import numpy as np

from analysis.compare import Cell
from analysis.rows import Row
from eval.intervals import CONFIDENCE, half_width
from experiments.labels import drawn_part

# Times the quartiles' distance / sqrt(n), as a median's standard error is 1.25 / 1.35 of it (McGill et al. 1978):
NOTCH = 1.57  # two notches apart tell two medians apart at 95 %
MEDIAN = 1.96 * 1.25 / 1.35  # the 95 % interval of a median alone
NOTHING = (None, None)  # the `draw` of a method that draws nothing
Interval = tuple[float, float]


def difference(left: Cell, right: Cell | float, factor: float) -> Interval | str:
    """Of left - factor * right (of log left - log(factor * right) for perplexities), or why it has no interval."""
    if max(len(cell.values) for cell in _sides(left, right)) > 1:
        return _over_seeds(left, right, factor)
    alone = ALONE.get(left.metric)
    return alone(left, right, factor) if alone else "one run without a spread"


def _sides(left: Cell, right: Cell | float) -> list[Cell]:
    return [left] if isinstance(right, float) else [left, right]


def _over_seeds(left: Cell, right: Cell | float, factor: float) -> Interval | str:
    """The one run of a method that draws nothing stands beside every seed of the other."""
    first, second = _drawn(left), _drawn(right)
    if any(len(side) == 1 and NOTHING not in side for side in (first, second)):
        return "several seeds beside one"
    common = [draw for draw in first if draw in second]
    paired = len(common) > 1
    a, b = (np.asarray([side[draw] for draw in (common if paired else side)]) for side in (first, second))
    a, b = (np.log(a), np.log(factor * b)) if left.metric == "perplexity" else (a, factor * b)
    samples = [a - b] if paired or 1 in (len(a), len(b)) else [a, b]
    if all(np.allclose(some, some[0], rtol=0, atol=1e-12) for some in samples) and left.metric == "score":
        return "no spread over seeds"  # shares of few documents have none
    return _t_interval(*samples) if len(samples) == 1 else _welch(a, b)


def _drawn(cell: Cell | float) -> dict[Hashable, float]:
    """The values by what was drawn for them; by nothing that could be common where that does not tell them apart."""
    if isinstance(cell, float):
        return {NOTHING: cell}
    told = [(_draw(row), (row.measure(cell.key) or {}).get(cell.metric)) for row in cell.rows]
    known = [(draw, value) for draw, value in told if value is not None]
    found: dict[Hashable, float] = dict(known)
    return found if len(found) == len(known) else {object(): value for _, value in known}


def _draw(row: Row) -> Hashable:
    """Equal for rows for which the same was drawn: windows or examples as many, as long and of the same text, or groups
    and masks by the same method."""
    if row.draw == NOTHING:
        return NOTHING
    run, part = row.run, drawn_part(row.run.spec())
    if part == "windows":
        return row.draw, replace(run.windows, seed=0, order=None) if run.windows else None
    if part == "method":
        return row.draw, type(run.method)
    text: Any = getattr(run.recovery, "text", None)
    return row.draw, type(run.recovery), replace(text, seed=0) if hasattr(text, "seed") else text


def _perplexities(left: Cell, right: Cell | float, factor: float) -> Interval | str:
    told = [_measured(cell) for cell in _sides(left, right)]
    if len({one.get("token_sha256") for one in told}) > 1:
        return "other tokens"
    first, *second = (np.asarray(one.get("nll_per_window", [])) for one in told)
    if len(first) < 2 or any(len(other) != len(first) for other in second):
        return "no spread over windows"
    other = second[0] if second else math.log(float(right))  # type: ignore[arg-type]
    return _t_interval(first - other - math.log(factor))


def _accuracies(left: Cell, right: Cell | float, factor: float) -> Interval | str:
    halves = [cell.half_width_of_mean for cell in _sides(left, right)]
    known = [weight * half for half, weight in zip(halves, (1.0, factor), strict=False) if half is not None]
    if len(known) < len(halves):
        return "no spread over documents"
    gap, half = (left.ours or 0.0) - factor * _value(right), math.hypot(*known)
    return gap - half, gap + half


def _speeds(left: Cell, right: Cell | float, factor: float) -> Interval | str:
    told = [_measured(cell).get("timing") for cell in _sides(left, right)]
    timed = [one for one in told if one and one.get("runs")]
    if len(timed) < len(told):
        return "no spread of the timing"
    if len({(one["device"], one["threads"]) for one in timed}) > 1:
        return "timed on other machines"
    if any(one["runs"][0].get("noisy") for one in timed):
        return "timed on an unsteady machine"
    shapes = [one["runs"][0] for one in timed]
    steps = [shape["decode_s"] for shape in shapes]
    halves = [
        (NOTCH if len(steps) > 1 else MEDIAN) * (step["q3"] - step["q1"]) / math.sqrt(step["repetitions"])
        for step in steps
    ]
    if not all(halves):
        return "no spread of the timing"
    if any(half >= step["median"] for half, step in zip(halves, steps, strict=True)):  # reaches below no time at all
        return "too wide a spread of the timing"
    ranges = [
        (shape["batch"] / (step["median"] + half), shape["batch"] / (step["median"] - half))
        for shape, step, half in zip(shapes, steps, halves, strict=True)
    ]
    (low, high), (least, most) = ranges[0], ranges[1] if len(ranges) > 1 else (_value(right), _value(right))
    return low - factor * most, high - factor * least


ALONE: dict[str, Callable[[Cell, Cell | float, float], Interval | str]] = {
    "perplexity": _perplexities,
    "score": _accuracies,
    "tokens_per_second": _speeds,
}


def _measured(cell: Cell) -> dict[str, Any]:
    return cell.rows[0].measure(cell.key) or {}


def _value(right: Cell | float) -> float:
    return right if isinstance(right, float) else right.ours or 0.0


def _welch(a: Any, b: Any) -> Interval:
    """Of mean a - mean b, of independent draws."""
    from scipy import special

    gap, errors = float(np.mean(a) - np.mean(b)), [float(np.var(some, ddof=1)) / len(some) for some in (a, b)]
    if not any(errors):
        return gap, gap
    freedom = sum(errors) ** 2 / sum(error**2 / (len(some) - 1) for some, error in zip((a, b), errors, strict=True))
    half = float(special.stdtrit(freedom, (1 + CONFIDENCE) / 2)) * math.sqrt(sum(errors))
    return gap - half, gap + half


def _t_interval(samples: Any) -> Interval:
    mean, half = float(np.mean(samples)), half_width(samples)
    return mean - half, mean + half
