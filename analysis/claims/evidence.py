"""The 95 % interval of the difference of two cells, or why there is none.

Wherever one of both has several seeds the seeds are compared; a single run speaks for itself alone:

    several seeds      a t interval over the common ones, of log ratios of perplexities, otherwise of differences
    one perplexity     a t interval over the same windows' log-likelihoods, paired
    one accuracy       from both intervals over documents, as if unpaired, which is the cautious side
    one timing         from the notches around both medians, on the same machine
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from analysis.compare import Cell
from eval.intervals import half_width

NOTCH = (
    1.57  # times the quartiles' distance / sqrt(n): two notches apart tell medians apart at 95 % (McGill et al. 1978)
)
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
    if any(len(cell.values) == 1 and cell.rows[0].seed is not None for cell in _sides(left, right)):
        return "several seeds beside one"
    a, b = np.asarray(left.values), np.asarray([right] if isinstance(right, float) else right.values)
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        return "other numbers of seeds"
    if left.metric == "perplexity":
        return _t_interval(np.log(a) - np.log(b) - math.log(factor))
    samples = a - factor * b
    if left.metric == "score" and np.allclose(samples, samples[0], rtol=0, atol=1e-12):  # shares of few documents do so
        return "no spread over seeds"
    return _t_interval(samples)


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
    ranges = [_tokens_per_second(one["runs"][0]) for one in timed]
    (low, high), (least, most) = ranges[0], ranges[1] if len(ranges) > 1 else (_value(right), _value(right))
    if not 0 < low < high or not 0 < least <= most:
        return "too few repetitions"
    return low - factor * most, high - factor * least


def _tokens_per_second(shape: Mapping[str, Any]) -> Interval:
    """At both ends of the notch around the median step; 0 where it reaches below no time at all."""
    step = shape["decode_s"]
    half = NOTCH * (step["q3"] - step["q1"]) / math.sqrt(step["repetitions"])
    if half >= step["median"]:
        return 0.0, 0.0
    return shape["batch"] / (step["median"] + half), shape["batch"] / (step["median"] - half)


ALONE: dict[str, Callable[[Cell, Cell | float, float], Interval | str]] = {
    "perplexity": _perplexities,
    "score": _accuracies,
    "tokens_per_second": _speeds,
}


def _measured(cell: Cell) -> dict[str, Any]:
    return cell.rows[0].measure(cell.key) or {}


def _value(right: Cell | float) -> float:
    return right if isinstance(right, float) else right.ours or 0.0


def _t_interval(samples: Any) -> Interval:
    mean, half = float(np.mean(samples)), half_width(samples)
    return mean - half, mean + half
