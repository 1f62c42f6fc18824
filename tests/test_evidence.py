"""What is beyond noise: several seeds as seeds, few answers and timings with the spread that they have."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import small_table as small

import pruners
from analysis import rows, significance
from analysis.claims import judge, statements
from analysis.claims.evidence import difference
from analysis.claims.judge import Answer, Better, Claim, Ours, Place, on_ours
from analysis.compare import Cell
from experiments import papers
from experiments.cells import cells
from experiments.papers import flap
from experiments.recovery import Retraining
from experiments.spec import Windows
from experiments.store import records
from pruners.retrain import Trainable


def cell(metric: str, *measured: dict, method: str = "Wanda") -> Cell:
    """A pruned cell of so many seeds, each of which measured this."""
    run = next(c for c in cells(papers.find("gblm.perplexity").runs()) if c.run.windows).run
    runs = [replace(run, windows=replace(run.windows, seed=seed)) for seed in range(len(measured))]
    made = [
        rows.Row(method, "50 %", run, small.record(run, measures={"k": one}), None)
        for run, one in zip(runs, measured, strict=True)
    ]
    return Cell("m", method, "50 %", "k", metric, tuple(made))


def seeds(found: Cell, *drawn: int) -> Cell:
    """The same values of other seeds, in this order."""
    made = [
        replace(row, run=replace(row.run, windows=replace(row.run.windows, seed=seed)))
        for row, seed in zip(found.rows, drawn, strict=True)
    ]
    return replace(found, rows=tuple(made))


def perplexities(*values: float, method: str = "Wanda") -> Cell:
    """Seeds whose windows all but agree."""
    windows = [[math.log(value) + shift for shift in (-0.01, 0.0, 0.011)] for value in values]
    measured = [
        {"perplexity": v, "token_sha256": "a", "nll_per_window": w} for v, w in zip(values, windows, strict=True)
    ]
    return cell("perplexity", *measured, method=method)


def accuracies(*values: float, error: float = 0.01, documents: int | None = None, method: str = "Wanda") -> Cell:
    told = {"standard_error": error, "documents": documents}
    return cell("score", *({"score": value, **told} for value in values), method=method)


@pytest.mark.parametrize(
    ("worse", "better"),
    [(perplexities(10.0, 19.9), perplexities(15.0, 15.0, method="Other")),
     (accuracies(0.9, 0.5), accuracies(0.65, 0.65, method="Other"))],
)  # fmt: skip
def test_two_seeds_that_disagree_decide_nothing(worse, better):
    low, high = difference(worse, better, 1.0)
    assert low < 0 < high
    assert significance.best([worse, better]) == set()


def test_two_seeds_that_agree_do():
    first, second = perplexities(10.0, 10.1), perplexities(15.0, 15.2, method="Other")
    assert significance.best([first, second]) == {significance.name(first)}
    assert difference(first, 12.0, 1.0)[1] < 0


def test_several_seeds_stand_beside_one_run_only_where_it_draws_nothing():
    several, drawn = perplexities(10.0, 10.1, 10.2), perplexities(15.0, method="Other")
    assert difference(several, drawn, 1.0) == "several seeds beside one"
    (row,) = drawn.rows
    dense = rows.Row("Dense", "", papers.find("gblm.perplexity").runs()[0], row.record, None)
    assert difference(several, Cell("m", "Dense", "", "k", "perplexity", (dense,)), 1.0)[1] < 0


def test_seeds_are_paired_by_seed_wherever_they_stand():
    first = accuracies(0.50, 0.60, 0.70)
    placed = accuracies(0.69, 0.485, 0.59, method="Other")  # each a little below the same seed of the first
    low, high = difference(first, seeds(placed, 2, 0, 1), 1.0)
    turned = difference(seeds(first, 2, 1, 0), seeds(placed, 0, 2, 1), 1.0)
    assert (low, high) == pytest.approx(turned)
    assert 0 < low < high < 0.02
    assert significance.best([first, seeds(placed, 2, 0, 1)]) == {significance.name(first)}
    assert difference(first, placed, 1.0)[0] < 0


def test_of_other_seeds_the_common_ones_are_paired():
    three, two = perplexities(10.0, 11.0, 30.0), perplexities(15.0, 16.6, method="Other")
    assert difference(three, two, 1.0) == difference(perplexities(10.0, 11.0), two, 1.0)
    assert difference(two, three, 1.0)[0] > 0


@pytest.mark.parametrize("drawn", [(3, 4, 5), (2, 3, 4), (0, 0, 0)])
def test_fewer_than_two_common_seeds_are_compared_unpaired(drawn):
    first, second = perplexities(10.0, 11.0, 12.0), seeds(perplexities(10.1, 11.1, 12.1, method="Other"), *drawn)
    a, b = np.log(first.values), np.log(second.values)
    spread = math.sqrt(np.var(a, ddof=1) / 3 + np.var(b, ddof=1) / 3)
    low, high = difference(first, second, 1.0)
    assert (low + high) / 2 == pytest.approx(np.mean(a) - np.mean(b))
    assert 2.776 * spread < (high - low) / 2 < 2.79 * spread  # t of all but 4 degrees of freedom
    assert difference(first, perplexities(10.1, 11.1, 12.1), 1.0)[1] < 0


def retraining(corpus: str, seed: int) -> Retraining:
    return Retraining(Trainable(norms=True), Windows(corpus, 4, 32, seed), 2, 1e-3, seed=seed)


def drawn_by(how, found: Cell) -> Cell:
    """The same numbers, of runs that draw something else by their seeds."""
    made = [replace(row.run, windows=None, **how(seed)) for seed, row in enumerate(found.rows)]
    return replace(found, rows=tuple(replace(row, run=run) for row, run in zip(found.rows, made, strict=True)))


def test_a_seed_by_which_something_else_is_drawn_is_no_common_one():
    first, second = perplexities(10.0, 11.0, 12.0), perplexities(10.1, 11.1, 12.1, method="Other")
    paired, unpaired = difference(first, second, 1.0), difference(first, seeds(second, 3, 4, 5), 1.0)
    shorter = [
        replace(row, run=replace(row.run, windows=replace(row.run.windows, length=row.run.windows.length // 2)))
        for row in second.rows
    ]
    assert difference(first, replace(second, rows=tuple(shorter)), 1.0) == pytest.approx(unpaired)
    drawing = [
        lambda seed: {"method": pruners.Random(0.5, seed=seed)},
        lambda seed: {"method": pruners.LLMPruner(0.25, importance="random", seed=seed)},
        lambda seed: {"method": pruners.Magnitude(0.5), "recovery": retraining("embedded/c4", seed)},
        lambda seed: {"method": pruners.Magnitude(0.5), "recovery": retraining("wikitext2/train", seed)},
    ]
    lefts, rights = ([drawn_by(how, cell) for how in drawing] for cell in (first, second))
    for place, left in enumerate(lefts):
        for other, right in enumerate(rights):
            assert difference(left, right, 1.0) == pytest.approx(paired if place == other else unpaired)
        assert difference(left, second, 1.0) == pytest.approx(unpaired)
    assert unpaired[1] - unpaired[0] > 10 * (paired[1] - paired[0])


def test_unpaired_seeds_without_a_spread():
    same, other = accuracies(0.5, 0.5), seeds(accuracies(0.6, 0.6), 2, 3)
    assert difference(same, other, 1.0) == "no spread over seeds"
    none, some = (cell("column_dispersion", *[{"column_dispersion": v}] * 2) for v in (0.0, 2.0))
    assert difference(none, seeds(some, 2, 3), 1.0) == (-2.0, -2.0)


def test_a_dispersion_of_zero_has_a_difference_too():
    none, some = (
        cell("column_dispersion", *({"column_dispersion": v} for v in many)) for many in ((0.0,) * 3, (2.0, 3.0, 4.0))
    )
    assert difference(some, none, 1.0) == pytest.approx((3 - 2.484, 3 + 2.484), abs=1e-3)
    assert difference(none, 1.0, 1.0) == (-1.0, -1.0)


@pytest.mark.parametrize(("documents", "is_bold"), [(3, False), (5, True), (None, False)])
def test_all_right_beside_all_wrong_is_as_sure_as_there_are_documents(documents, is_bold):
    right, wrong = (accuracies(v, error=0.0, documents=documents, method=str(v)) for v in (1.0, 0.0))
    assert significance.best([right, wrong]) == ({significance.name(right)} if is_bold else set())
    exact = None if documents is None else pytest.approx(1 - 0.025 ** (1 / documents))
    assert right.half_width_of_mean == wrong.half_width_of_mean == exact


def test_accuracies_that_every_seed_has_alike_have_no_spread():
    assert difference(accuracies(0.0, 0.0, 0.0), accuracies(0.1, 0.1, 0.1), 1.0) == "no spread over seeds"


FASTER = next(claim for claim in statements.CLAIMS if claim.name == "flap-faster")
SPEED = "efficiency@1x128+128"


def timed(root, steps: dict[str, tuple[float, float, float]], device="cpu: x", **told) -> Answer:
    """The answer where 20 % of each method take such a step: median and quartiles in seconds."""
    for run in flap.speed.runs():
        method, setting = flap.speed.label(run)
        if setting == "20 %" and method in steps and SPEED in {what.key for what in run.measures}:
            middle, low, high = steps[method]
            step = {"median": middle, "q1": low, "q3": high, "repetitions": 5}
            where = {"device": device if method == "FLAP" else "cpu: x", "threads": 1}
            timing = where | {"runs": [{"batch": 1, "decode_s": step} | told]}
            measures = {SPEED: {"tokens_per_second": 1 / middle, "timing": timing}}
            records.write(small.record(run, table=flap.speed.name, measures=measures), root)
    return on_ours(FASTER, Ours(root), noise=True)


@pytest.mark.parametrize(
    ("flap_step", "verdict"),
    [((0.010, 0.009, 0.011), "holds so far"), ((0.030, 0.029, 0.031), "fails"), ((0.019, 0.017, 0.021), "undecided")],
)  # fmt: skip
def test_speeds_are_decided_where_their_notches_lie_apart(tmp_path, flap_step, verdict):
    answer = timed(tmp_path, {"FLAP": flap_step, "LLM-Pruner": (0.020, 0.0195, 0.0205)})
    assert answer.verdict == verdict
    assert answer.open == (["llama-7b FLAP 20 %"] if verdict == "undecided" else [])


@pytest.mark.parametrize(
    ("told", "why"),
    [({"device": "cuda: y"}, "timed on other machines"), ({"noisy": True}, "timed on an unsteady machine")],
)
def test_speeds_that_cannot_be_compared_say_why(tmp_path, told, why):
    answer = timed(tmp_path, {"FLAP": (0.01, 0.0099, 0.0101), "LLM-Pruner": (0.02, 0.0199, 0.0201)}, **told)
    assert (answer.verdict, answer.open) == ("undecided", [f"llama-7b FLAP 20 % ({why})"])


def speed(median: float, q1: float, q3: float, repetitions: int = 4) -> Cell:
    step = {"median": median, "q1": q1, "q3": q3, "repetitions": repetitions}
    timing = {"device": "cpu: x", "threads": 1, "runs": [{"batch": 1, "decode_s": step}]}
    return cell("tokens_per_second", {"tokens_per_second": 1 / median, "timing": timing})


def test_a_timing_without_an_interval_says_what_its_spread_is():
    good, equal, wide = speed(0.010, 0.009, 0.011), speed(0.01, 0.01, 0.01, 100), speed(0.010, 0.001, 0.020)
    for pair in ((equal, good), (good, equal), (equal, 90.0)):
        assert difference(*pair, 1.0) == "no spread of the timing"
    for pair in ((wide, good), (good, wide), (wide, 90.0)):
        assert difference(*pair, 1.0) == "too wide a spread of the timing"


def test_the_interval_of_one_median_is_wider_than_the_notch_of_two():
    good = speed(0.010, 0.009, 0.011)
    notch, alone = 1.57 * 0.001, 1.815 * 0.001
    assert difference(good, 90.0, 1.0) == pytest.approx((1 / (0.01 + alone) - 90, 1 / (0.01 - alone) - 90), abs=1e-2)
    widest = 1 / (0.01 - notch) - 1 / (0.01 + notch)
    assert difference(good, good, 1.0) == pytest.approx((-widest, widest))


@pytest.mark.parametrize(("or_equal", "verdict"), [(False, "fails"), (True, "holds")])
def test_a_tie_of_counts_is_no_less_and_at_most(tmp_path, or_equal, verdict):
    place = Place("flap.speed", ("llama-7b",), "efficiency", "parameters")
    claim = Claim("c", "", "", (Better(("FLAP", "20 %"), 5e9, or_equal=or_equal),), (place,))
    for run in flap.speed.runs():
        records.write(small.record(run, table=flap.speed.name, measures={"efficiency": {"parameters": 5e9}}), tmp_path)
    for noise in (False, True):
        assert on_ours(claim, Ours(tmp_path), noise).verdict == verdict


def test_claims_that_allow_as_much_say_so():
    for claim in statements.CLAIMS:
        allows = bool(re.search(r"within \d|at most|or more\.|keeps \d", claim.sentence))
        assert {side.or_equal for _, sides in judge.scopes(claim) for side in sides} == {allows}


def test_comparisons_of_one_left_side_are_told_apart():
    place = Place("gblm.perplexity", ("llama-7b",), "wikitext2/test@2048")
    sides = tuple(Better(("Magnitude", "50 %"), (name, "50 %")) for name in ("Wanda", "SparseGPT"))
    answer = judge.on_paper(Claim("c", "", "", (*sides, Better(("Magnitude", "50 %"), 1.5)), (place,)))
    assert answer.against == [
        f"llama-7b Magnitude 50 % against {right}" for right in ("Wanda 50 %", "SparseGPT 50 %", "1.5")
    ]
    local = next(claim for claim in statements.CLAIMS if claim.name == "pruner-local")
    assert judge.on_paper(local).against == ["llama-7b Element^1 - local 20 % at ptb/validation@128"]
