"""Confidence intervals and paired tests.

Accuracies arrive as one array of scores a task (1 right, 0 wrong), perplexities as one negative log-likelihood a
window.  Two models are compared on the same documents or windows, in the same order; every resampling takes a seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2_000
CONFIDENCE = 0.95
_BATCH = 50  # resamples drawn at a time: 10,000 documents x 50 indices are 4 MB


@dataclass(frozen=True)
class Interval:
    """A number with its bootstrap interval; `low` and `high` are None where there is none, and `note` says why."""

    value: float
    standard_error: float | None
    low: float | None
    high: float | None
    note: str | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test: documents that only one of two models gets right, and the two-sided p-value."""

    only_first: int
    only_second: int
    pvalue: float


def standard_error(scores: ArrayLike) -> float | None:
    """Standard error of the mean; None for fewer than two scores, which have none."""
    from scipy import stats

    values = _scores(scores)
    return float(stats.sem(values)) if len(values) > 1 else None


def half_width(values: ArrayLike, draws: float = math.inf) -> float:
    """Half the 95 % t interval of the mean of two values or more; ValueError for fewer.

    With `draws` that of its distance to the mean of so many further ones: t(97.5 %) * s * sqrt(1/n + 1/draws).
    """
    found = _scores(values)
    if len(found) < 2 or not draws > 0:
        raise ValueError(f"An interval needs two values or more and draws above 0; got {len(found)} and {draws!r}.")
    from scipy import special

    spread = float(np.std(found, ddof=1)) * math.sqrt(1 / len(found) + 1 / draws)
    return float(special.stdtrit(len(found) - 1, (1 + CONFIDENCE) / 2)) * spread


def normal_half_width(error: float) -> float:
    """Half the 95 % interval of a mean with this standard error over many documents."""
    return NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error


def mean_over_tasks(scores: Mapping[str, ArrayLike], seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """The unweighted mean of the tasks' means, with a stratified percentile bootstrap.

    Documents are resampled within their own task, so a large task does not drown a small one.
    """
    if not isinstance(scores, Mapping):
        raise TypeError(f"scores maps each task to one score a document; got a {type(scores).__name__}.")
    tasks = [_scores(values) for values in scores.values()]
    if not tasks:
        raise ValueError("A mean needs the scores of at least one task; got none.")
    return _bootstrap(tasks, _mean_of_means, seed, resamples, "document")


def mean_difference(
    first: Mapping[str, ArrayLike], second: Mapping[str, ArrayLike], seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Mean over tasks of `first` minus `second`, paired by document."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        raise TypeError("Paired means take two mappings of tasks to one score a document.")
    if first.keys() != second.keys():
        raise ValueError(f"Paired means need the same tasks; got {sorted(first)} and {sorted(second)}.")
    differences = {task: np.subtract(*_paired(first[task], second[task], task)) for task in first}
    return mean_over_tasks(differences, seed, resamples)


def mcnemar(first: ArrayLike, second: ArrayLike) -> McNemar:
    """Exact McNemar test of two models' right and wrong answers to the same documents."""
    a, b = (values > 0.5 for values in _paired(first, second, "McNemar's test"))
    from statsmodels.stats.contingency_tables import mcnemar as exact_mcnemar

    table = [[np.sum(a & b), np.sum(a & ~b)], [np.sum(~a & b), np.sum(~a & ~b)]]
    return McNemar(int(table[0][1]), int(table[1][0]), float(exact_mcnemar(table, exact=True).pvalue))


def holm(pvalues: Sequence[float]) -> list[float]:
    """p-values of one table, corrected for their number by Holm's method; ValueError for what are none."""
    if not len(pvalues):
        return []
    found = _scores(pvalues)
    if found.min() < 0 or found.max() > 1:
        raise ValueError(f"p-values lie in [0, 1]; got {found.min():g} to {found.max():g}.")
    from statsmodels.stats.multitest import multipletests

    return [float(p) for p in multipletests(found, method="holm")[1]]


def perplexity_interval(nll_per_window: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Perplexity with a percentile bootstrap over windows; `nll_per_window` in nats per token."""
    return _bootstrap([_scores(nll_per_window)], _perplexity, seed, resamples, "window")


def perplexity_difference(first: ArrayLike, second: ArrayLike, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Perplexity of `first` minus that of `second`, both over the same windows, by a paired bootstrap."""
    return _bootstrap(list(_paired(first, second, "perplexity")), _difference, seed, resamples, "window", paired=True)


def _bootstrap(
    samples: list[NDArray[np.float64]], statistic: Any, seed: int, resamples: int, unit: str, paired: bool = False
) -> Interval:
    for name, number, least in (("seed", seed, 0), ("resamples", resamples, 1)):
        if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < least:
            raise ValueError(f"{name} is a whole number, {least} or more; got {number!r}.")
    value = float(statistic(*samples))
    if min(map(len, samples)) < 2:
        return Interval(value, None, None, None, f"no interval: one {unit} has no spread")
    from scipy import stats

    result = stats.bootstrap(
        samples, statistic, n_resamples=resamples, batch=_BATCH, vectorized=True, paired=paired, axis=-1,
        confidence_level=CONFIDENCE, method="percentile", rng=np.random.default_rng(seed),
    )  # fmt: skip
    low, high = map(float, result.confidence_interval)
    return Interval(value, float(result.standard_error), low, high)


def _mean_of_means(*samples: NDArray[np.float64], axis: int = -1) -> Any:
    return sum(np.mean(sample, axis=axis) for sample in samples) / len(samples)


def _perplexity(sample: NDArray[np.float64], axis: int = -1) -> Any:
    return np.exp(np.mean(sample, axis=axis))


def _difference(first: NDArray[np.float64], second: NDArray[np.float64], axis: int = -1) -> Any:
    return _perplexity(first, axis) - _perplexity(second, axis)


def _paired(first: ArrayLike, second: ArrayLike, what: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    a, b = _scores(first), _scores(second)
    if len(a) != len(b):
        raise ValueError(f"{what}: a paired comparison needs the same documents; got {len(a)} and {len(b)} of them.")
    return a, b


def _scores(values: ArrayLike) -> NDArray[np.float64]:
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError("Expected one score a document, each a number; got something else.") from error
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"Expected one score a document, at least one document; got shape {array.shape}.")
    if not math.isfinite(array.sum()):
        raise ValueError("Scores hold NaN or infinity; so they have no interval.")
    return array
