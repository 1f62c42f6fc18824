"""Statistics against scipy's own tests and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from eval import intervals

RNG = np.random.default_rng(7)


def answers(right: int, total: int) -> np.ndarray:
    return np.arange(total) < right


def test_mcnemar_is_the_binomial_test_of_the_disagreements():
    first = np.repeat([1, 1, 0, 0], [40, 15, 4, 20])
    second = np.repeat([1, 0, 1, 0], [40, 15, 4, 20])
    found = intervals.mcnemar(first, second)
    assert (found.only_first, found.only_second) == (15, 4)
    assert found.pvalue == pytest.approx(stats.binomtest(4, 19).pvalue, abs=1e-12)


def test_equal_answers_have_p_one():
    assert intervals.mcnemar([1, 0, 1], [1, 0, 1]).pvalue == 1.0


def test_standard_error_of_an_accuracy_is_the_binomial_one():
    expected = np.sqrt(0.3 * 0.7 / 199)  # n - 1: the sample's own variance
    assert intervals.standard_error(answers(60, 200)) == pytest.approx(expected)
    assert intervals.standard_error([1]) is None


def test_half_widths_are_those_of_scipys_intervals():
    values = [20.0, 21.0, 22.5]
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert intervals.half_width(values) == pytest.approx((high - low) / 2)
    assert intervals.half_width(values, draws=3) == pytest.approx((high - low) / 2**0.5)  # two means of three
    assert intervals.normal_half_width(0.5) == pytest.approx(0.98, abs=1e-4)


def test_mean_over_tasks_weights_tasks_not_documents():
    found = intervals.mean_over_tasks({"large": answers(900, 1000), "small": answers(10, 100)})
    assert found.value == pytest.approx(0.5)
    variance = (0.9 * 0.1 / 1000 + 0.1 * 0.9 / 100) / 4  # strata are independent
    assert found.standard_error == pytest.approx(np.sqrt(variance), rel=0.08)
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(variance), rel=0.08)


def test_the_same_seed_gives_the_same_interval():
    scores = {"task": answers(30, 80)}
    assert intervals.mean_over_tasks(scores, seed=3) == intervals.mean_over_tasks(scores, seed=3)
    assert intervals.mean_over_tasks(scores, seed=3) != intervals.mean_over_tasks(scores, seed=4)


def test_pairing_narrows_the_interval_of_two_models_that_agree():
    first = RNG.random(500) < 0.6
    second = first.copy()
    second[:20] = False
    paired = intervals.mean_difference({"task": first}, {"task": second})
    assert paired.value == pytest.approx(first[:20].sum() / 500)
    assert paired.standard_error < 0.3 * np.hypot(*(intervals.standard_error(s) for s in (first, second)))


def test_perplexity_interval_agrees_with_the_delta_method():
    nll = RNG.normal(3.0, 0.4, 400)
    found = intervals.perplexity_interval(nll)
    assert found.value == pytest.approx(np.exp(nll.mean()))
    assert found.standard_error == pytest.approx(found.value * stats.sem(nll), rel=0.08)


def test_perplexity_difference_is_paired_by_window():
    nll = RNG.normal(3.0, 0.4, 400)
    found = intervals.perplexity_difference(nll + 0.01, nll)
    assert 0 < found.low < found.value < found.high
    assert found.value == pytest.approx(np.exp(nll.mean()) * (np.exp(0.01) - 1))


def test_holm_multiplies_the_smallest_by_their_number():
    assert intervals.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert intervals.holm([]) == []


def test_one_document_has_no_interval_and_says_so():
    found = intervals.mean_over_tasks({"a": [1], "b": [0, 1]})
    assert (found.value, found.low, found.high) == (0.75, None, None)
    assert "no interval" in found.note


@pytest.mark.parametrize("scores", [[], [[1, 0]], [1, np.nan]])
def test_scores_that_are_none_are_refused(scores):
    with pytest.raises(ValueError, match=r"document|NaN"):
        intervals.mean_over_tasks({"task": scores})


def test_pairs_of_other_documents_are_refused():
    with pytest.raises(ValueError, match="same documents; got 2 and 3"):
        intervals.mcnemar([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="same tasks"):
        intervals.mean_difference({"a": [1, 0]}, {"b": [1, 0]})
