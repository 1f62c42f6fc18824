"""Claims: the paper's numbers answer them, and made-up records of ours give each of the answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import small_table as small

from analysis import compare, rows
from analysis.claims import judge, statements
from analysis.claims.judge import Better, Claim, Ours, Place, on_ours, on_paper
from analysis.rows import COST
from experiments import papers
from experiments.labels import labels
from experiments.papers import gblm, headlines, perp
from experiments.recovery import Retraining
from experiments.store import records
from pruners.retrain import Trainable

WANDA = Better(("GBLM-Pruner (l1)", "50 %"), ("Wanda", "50 %"))
AT = Place("gblm.perplexity", ("llama-7b",), "wikitext2/test@2048")
CLAIM = Claim("c", "GBLM-Pruner", "GBLM below Wanda.", (WANDA,), (AT,), statements.stand_in("gblm"))


def store(root, table, words, windows, seed=None, token_sha256="a" * 64):
    """A record of the run with these words, whose windows have these log-likelihoods."""
    wanted = [run for run in table.runs() if table.label(run) == words and run.model in ("llama-7b", "smollm2-135m")]
    for run in wanted:
        if seed is None or run.windows is None or run.windows.seed == seed:
            record = small.record(run).model_copy(update={"table": table.name})
            for measured in record.measures.values():
                measured["perplexity"] = float(np.exp(np.mean(windows)))
                measured |= {"nll_per_window": list(map(float, windows)), "token_sha256": token_sha256}
            records.write(record, root)


def answers(root, ours, wanda, **how):
    store(root, gblm.perplexity, WANDA.left, ours)
    store(root, gblm.perplexity, WANDA.right, wanda, **how)
    found = Ours(root)
    return on_ours(CLAIM, found), on_ours(CLAIM, found, noise=True)


def test_the_papers_numbers_answer():
    assert str(on_paper(CLAIM)) == "holds (1 of 1)"
    reverse = Claim("r", "", "", (Better(WANDA.right, WANDA.left),), (AT,))
    assert str(on_paper(reverse)) == "fails (0 of 1; against it: llama-7b Wanda 50 %)"


def test_without_records_there_are_no_numbers(tmp_path):
    assert str(on_ours(CLAIM, Ours(tmp_path))) == "no numbers"
    assert str(on_ours(CLAIM, Ours(tmp_path), noise=True)) == "no numbers"


def test_a_sentence_of_which_a_part_was_run_holds_so_far(tmp_path):
    """What no table of ours declares, as 4:8 here, is never asked for."""
    both = Claim(
        "b", "", "", statements.over("Wanda", "Magnitude", "50 %", "2:4", "4:8"), (), statements.stand_in("gblm")
    )
    store(tmp_path, headlines.gblm, ("Magnitude", "50 %"), [2.5, 2.5])
    for seed in range(3):
        store(tmp_path, headlines.gblm, ("Wanda", "50 %"), [2.0, 2.0 + 0.01 * seed], seed)
    expected = "holds so far (1 of 1; 1 of 2 not measured) on smollm2-135m"
    assert str(on_ours(both, Ours(tmp_path))) == str(on_ours(both, Ours(tmp_path), noise=True)) == expected
    store(tmp_path, headlines.gblm, ("Magnitude", "2:4"), [2.5, 2.5])
    store(tmp_path, headlines.gblm, ("Wanda", "2:4"), [2.0, 2.01])
    assert on_ours(both, Ours(tmp_path)).verdict == "holds"


def test_what_the_paper_does_not_print_is_counted_beside_its_answer():
    unprinted = Better(WANDA.left, ("Nothing", "50 %"))
    assert (
        str(on_paper(Claim("u", "", "", (WANDA, unprinted), (AT,))))
        == "holds (1 of 1; 1 of 2 without its numbers here)"
    )


@pytest.mark.parametrize(("gains", "sign"), [((0.02, 0.021, 0.019), 1), ((0.02, -0.03, 0.02), 0)])
def test_three_seeds_of_an_accuracy_are_paired(gains, sign):
    left, right = (scores(values) for values in ([0.5 + gain for gain in gains], [0.5] * 3))
    low, high = judge.difference(left, right, 1.0)
    assert (low > 0) - (high < 0) == sign


def scores(values):
    """A cell with these accuracies and a standard error over documents that would hide any gap between them."""
    drawn = next(run for run in papers.find("gblm.zero_shot").runs() if run.windows)
    runs = [replace(drawn, windows=replace(drawn.windows, seed=seed)) for seed in range(len(values))]
    measured = [{"k": {"score": value, "standard_error": 0.1}} for value in values]
    found = [rows.Row("m", "s", r, small.record(r, measures=one), None) for r, one in zip(runs, measured, strict=True)]
    return compare.Cell("llama-7b", "m", "s", "k", "score", tuple(found))


def test_a_gap_far_beyond_the_noise_holds(tmp_path):
    plain, noisy = answers(tmp_path, [2.0, 2.1, 1.9, 2.0], [2.2, 2.31, 2.1, 2.19])
    assert str(plain) == str(noisy) == "holds (1 of 1) on llama-7b"


def test_a_gap_within_the_noise_is_undecided(tmp_path):
    plain, noisy = answers(tmp_path, [2.0, 2.1, 1.9, 2.0], [2.2, 2.0, 2.1, 1.9])
    assert plain.verdict == "holds"
    assert noisy.verdict == "undecided"


def test_the_other_way_round_fails(tmp_path):
    plain, noisy = answers(tmp_path, [2.2, 2.31, 2.1, 2.19], [2.0, 2.1, 1.9, 2.0])
    assert plain.verdict == noisy.verdict == "fails"
    assert plain.against == ["llama-7b GBLM-Pruner (l1) 50 %"]


def test_other_windows_cannot_be_paired(tmp_path):
    plain, noisy = answers(tmp_path, [2.0, 2.1, 1.9, 2.0], [2.2, 2.31, 2.1, 2.19], token_sha256="b" * 64)
    assert (plain.verdict, noisy.verdict) == ("holds", "undecided")


@pytest.mark.parametrize(("shifts", "verdict"), [((0.1, 0.11, 0.09), "holds"), ((0.1, -0.2, 0.12), "undecided")])
def test_three_seeds_speak_for_the_calibration(tmp_path, shifts, verdict):
    for seed, shift in enumerate(shifts):
        store(tmp_path, headlines.gblm, WANDA.left, [2.0, 2.0], seed)
        store(tmp_path, headlines.gblm, WANDA.right, [2.0 + shift] * 2, seed)
    answer = on_ours(CLAIM, Ours(tmp_path), noise=True)
    assert (answer.verdict, answer.where) == (verdict, "smollm2-135m")


def test_accuracies_are_better_when_higher():
    place = Place("gblm.zero_shot", ("llama-7b",), "mean.gblm@0shot", "score")
    assert on_paper(Claim("a", "", "", (WANDA,), (place,))).verdict == "holds"


def test_a_number_may_stand_on_the_right():
    assert on_paper(Claim("n", "", "", (Better(WANDA.left, 7.2),), (AT,))).verdict == "holds"
    assert on_paper(Claim("n", "", "", (Better(WANDA.left, 7.0),), (AT,))).verdict == "fails"


@pytest.mark.parametrize(
    ("recovery", "verdict"),
    [
        ({"seconds": 1800.0}, "holds"),
        ({"seconds": 7200.0}, "fails"),
        ({"seconds": 1800.0, "processes": 8}, "fails"),
        (None, "no numbers"),
    ],
)
def test_hours_are_those_of_the_retraining_alone_of_all_processes(tmp_path, recovery, verdict):
    words = ("Magnitude + norms, biases", "50 %")
    run = next(run for run in perp.magnitude.runs() if run.model == "opt-30b" and perp.words(run) == words)
    achieved = {"sparsity": 0.5, "recovery": recovery}
    record = small.record(run).model_copy(update={"table": "perp.magnitude", "achieved": achieved})
    records.write(record, tmp_path)
    claim = next(claim for claim in statements.CLAIMS if claim.name == "perp-minutes")
    assert on_ours(claim, Ours(tmp_path)).verdict == on_ours(claim, Ours(tmp_path), noise=True).verdict == verdict


def test_there_are_25_claims_at_least_each_with_its_own_name_and_places():
    assert len(statements.CLAIMS) >= 25
    assert len({claim.name for claim in statements.CLAIMS}) == len(statements.CLAIMS)
    for claim in statements.CLAIMS:
        for place in (*claim.places, *claim.stand_in):
            assert papers.find(place.table)


@pytest.mark.parametrize("claim", statements.CLAIMS, ids=lambda claim: claim.name)
def test_our_side_of_every_claim_is_declared(claim):
    """A misspelt method or key would read as 'no numbers' for ever."""
    for places, comparisons in judge.scopes(claim):
        for place in places:
            if place.key:
                known = declared(papers.find(place.table))
                for model in place.models:
                    wanted = {(model, *side.left, place.key) for side in comparisons}
                    assert wanted & known or claim.name in PRINTED_ONLY


PRINTED_ONLY = ("flap-faster",)


def declared(table):
    runs = table.runs()
    named = zip(runs, labels(runs, table.label), strict=True)
    keys = ((run, label, [COST, *(key for what in run.measures for key in what.keys)]) for run, label in named)
    return {(run.model, *label, key) for run, label, known in keys for key in known}


def test_the_frame_has_the_three_answers(tmp_path):
    found = statements.frame(tmp_path).set_index("Claim")
    assert found.loc["pruner-keeps", "Paper's numbers"] == "holds (1 of 1)"
    assert found.loc["flap-accuracy-wanda", "Paper's numbers"].startswith("fails (1 of 2")
    assert set(found["Ours"]) == set(found["Ours beyond noise"]) == {"no numbers", "no cells"}
    assert set(found.index[found["Ours"] == "no cells"]) == {"pruner-dependency"}


@pytest.mark.parametrize(("share", "verdict"), [(0.0003, "holds"), (0.0005, "holds"), (0.001, "fails")])
def test_the_share_that_was_trained_is_the_cells_own(tmp_path, share, verdict):
    table = papers.find("embedded.perp")
    for run in table.runs():
        if isinstance(run.recovery, Retraining) and run.recovery.trainable == Trainable(biases=True, norms=True):
            achieved = {"sparsity": 0.5, "recovery": {"seconds": 1.0, "share": share}}
            records.write(small.record(run).model_copy(update={"table": table.name, "achieved": achieved}), tmp_path)
    claim = next(claim for claim in statements.CLAIMS if claim.name == "perp-share")
    assert on_ours(claim, Ours(tmp_path), noise=True).verdict == verdict
    assert on_paper(claim).verdict == "no numbers"  # what was computed from public configurations is no paper's number
