"""Ours beside the paper's on made-up records: each verdict, several seeds, what cannot be compared."""

from __future__ import annotations

from dataclasses import replace

import made_up
import pytest
import small_table as small

from analysis import compare, coverage, rows
from analysis.claims import judge, statements
from analysis.tables import grid, markdown
from experiments import cells, papers
from experiments.papers import flap, gblm, headlines
from experiments.selection import terms
from experiments.store import records


def made(tmp_path, table, values, **changes):
    """Records of the runs whose label has a value; a list gives one value a seed."""
    for run in table.runs():
        value = values.get((run.model, *table.label(run)))
        if value is not None:
            number = value[run.windows.seed] if isinstance(value, list) else value
            if number is None:
                continue
            record = small.record(run, **changes).model_copy(update={"table": table.name})
            for measured in record.measures.values():
                measured["perplexity"] = number
            records.write(record, tmp_path)
    return {(c.model, c.method, c.setting, c.fold): c for c in compare.cells(table, rows.rows(table, tmp_path))}


@pytest.fixture
def found(tmp_path):
    values = {
        ("llama-7b", "Dense", ""): 5.68,
        ("llama-7b", "Wanda", "50 %"): 7.30,
        ("llama-7b", "SparseGPT", "50 %"): 7.40,
        ("llama-7b", "Wanda", "2:4"): 11.5,
    }
    return made(tmp_path, gblm.perplexity, values)


def test_within_the_spread_of_repeats_and_the_papers_last_digit_it_matches(found):
    dense, wanda = found["llama-7b", "Dense", "", "mean"], found["llama-7b", "Wanda", "50 %", "mean"]
    assert dense.verdict == wanda.verdict == "matches"
    assert wanda.difference == pytest.approx(0.04)
    assert wanda.half_width == pytest.approx(0.073)


def test_beyond_it_differs(found):
    assert found["llama-7b", "SparseGPT", "50 %", "mean"].verdict == "differs"


def test_what_was_not_run_is_missing_and_what_nobody_printed_is_said(found):
    assert found["llama-7b", "GBLM-Pruner (l1)", "50 %", "mean"].verdict == "missing"
    assert found["llama-7b", "GBLM-Pruner (l1)", "50 %", "mean"].ours is None
    assert found["llama-7b", "Wanda", "2:4", "mean"].verdict == "not published"


def test_a_failure_is_told(tmp_path):
    run = gblm.perplexity.runs()[0]
    failed = small.failure(run, "Out of memory.").model_copy(update={"table": "gblm.perplexity"})
    records.write_failure(failed, tmp_path)
    cell = compare.cells(gblm.perplexity, rows.rows(gblm.perplexity, tmp_path))[0]
    assert cell.verdict == "missing: Out of memory."


def test_partial_data_cannot_be_compared(tmp_path):
    found = made(
        tmp_path, gblm.perplexity, {("llama-7b", "Dense", ""): 5.68}, data={"wikitext2/test": {"complete": False}}
    )
    verdict = found["llama-7b", "Dense", "", "mean"].verdict
    assert verdict == "not comparable: only a part of wikitext2/test was available"


def test_a_caveat_of_the_paper_is_the_reason(tmp_path):
    found = made(tmp_path, papers.find("baselines.perplexity"), {("llama-30b", "Dense", ""): 4.10})
    assert found["llama-30b", "Dense", "", "mean"].verdict == "not comparable: 4.10 elsewhere: a slip"


def test_seeds_make_a_mean_an_interval_and_extremes(tmp_path):
    values = {("llama-2-7b", "GBLM-Pruner (l1)", "50 %, 128 samples"): [6.86, 6.87, 6.88, 6.87, 6.89]}
    found = made(tmp_path, gblm.calibration_seeds, values)
    low, high = (found[(*next(iter(values)), fold)] for fold in ("minimum", "maximum"))
    assert (low.ours, high.ours) == (6.86, 6.89)
    assert low.verdict.startswith("not comparable")
    assert "(5 seeds)" in compare.text([low])["Ours"][0]


def test_the_interval_of_seeds_is_that_of_one_more_draw(tmp_path):
    table = papers.find("baselines.calibration_seeds")
    found = made(tmp_path, table, {("llama-7b", "Wanda", "50 %"): [7.25, 7.26, 7.27, 7.25, 7.27]})
    mean = found["llama-7b", "Wanda", "50 %", "mean"]
    assert mean.ours == pytest.approx(7.26)
    assert mean.half_width == pytest.approx(2.776 * 0.01 * (1 / 5 + 1 / 5) ** 0.5, rel=1e-3)
    assert mean.half_width_of_mean == pytest.approx(2.776 * 0.01 / 5**0.5, rel=1e-3)
    assert (compare.text([mean])["Ours"][0], grid.value(mean)) == ("7.26 ± 0.02 (5 seeds)", "7.26 ± 0.01")
    assert found["llama-7b", "Wanda", "50 %", "std"].ours == pytest.approx(0.01)


def test_a_missing_seed_leaves_no_mean(tmp_path):
    values = {("llama-7b", "Wanda", "50 %"): [7.25, 7.26, 7.27, 7.25, None]}
    found = made(tmp_path, papers.find("baselines.calibration_seeds"), values | {})
    assert found["llama-7b", "Wanda", "50 %", "mean"].verdict == "missing"


def test_the_text_has_the_papers_digits(found):
    text = compare.text([found["llama-7b", "Wanda", "50 %", "mean"]]).iloc[0]
    assert text.to_list() == ["Wanda", "50 %", "wikitext2/test@2048", "7.30 ± 0.07", "7.26", "+0.04", "matches"]


def test_the_papers_value_keeps_its_digits_whatever_ours_is(tmp_path):
    values = {("llama-7b", "Wanda", "50 %"): 12345.678, ("llama-7b", "SparseGPT", "50 %"): 7.1234}
    found = made(tmp_path, gblm.perplexity, values)
    large, small_one = (found[(*name, "mean")] for name in values)
    shown = compare.text([large]).iloc[0]
    assert shown.to_list()[3:6] == ["12,346 ± 123", "7.26", "+12,338"]
    assert compare.printed(7.26, large) == "7.26"  # as the report prints it
    for rounding, value, told in ((0.0005, 0.01, "0.010"), (0.05, 7.1, "7.1"), (50.0, 1000.0, "1,000")):
        paper = replace(small_one.published, value=value, rounding=rounding)
        shown = compare.text([replace(small_one, published=paper)]).iloc[0]
        assert shown["Paper"] == told
        assert shown["Ours"].startswith("7.123" if rounding < 0.005 else "7.12")


def test_only_a_perplexity_has_the_interval_of_reruns():
    """An accuracy without a spread had one of width zero at 0, and a speed one of 1 %."""
    table = papers.find("gblm.zero_shot")
    made = made_up.rows(table)
    for row in made:
        for measured in row.record.measures.values():
            measured |= {"score": 0.0, "standard_error": 0.0}
            measured.pop("documents", None)
    judged = {cell.verdict for cell in compare.cells(table, made) if cell.published and not cell.published.caveat}
    assert judged == {"not comparable: no spread is known"}
    table = papers.find("flap.speed")
    speeds = [c for c in compare.cells(table, made_up.rows(table)) if c.metric == "tokens_per_second" and c.published]
    assert {cell.half_width for cell in speeds} == {None}


def test_every_number_beside_the_paper_says_what_it_is():
    units = {"perplexity", "score", "learning_rate", *compare.UNITS}  # the first three have keys that say so
    for table in papers.TABLES.values():
        assert units >= {metric for run in table.runs() for _, metric in compare.quantities(run)}
    for name in ("llm_pruner.statistics", "flap.speed"):
        table = papers.find(name)
        lines = compare.text(compare.cells(table, made_up.rows(table)))
        where = ["Method", "Setting", "Measured", "Paper", *lines.columns.intersection(["Model"])]
        assert not lines.duplicated(where).any()
        assert {"efficiency, parameters", "efficiency, MACs", "efficiency, bytes of weights"} <= set(lines["Measured"])


def test_seeds_without_a_paper_stand_as_their_mean(tmp_path):
    found = made(tmp_path, headlines.flap, {("smollm2-135m", "Wanda-sp", "20 %"): [40.0, 41.0, 42.0]})
    mean = found["smollm2-135m", "Wanda-sp", "20 %", "mean"]
    assert mean.half_width == pytest.approx(4.303 / 3**0.5, rel=1e-3)
    assert compare.text([mean]).iloc[0]["Ours"] == "41.00 ± 2.48 (3 seeds)"
    assert "Verdict" not in compare.text([mean]).columns
    text = markdown.markdown(headlines.flap, rows.rows(headlines.flap, tmp_path))
    grid = next(line for line in text.splitlines() if line.startswith("| Wanda-sp"))
    assert [value.strip() for value in grid.strip("|").split("|")] == ["Wanda-sp", "41.00 ± 2.48", "—"]


@pytest.mark.parametrize("table", [gblm.metric_ablation, gblm.perplexity, flap.zero_shot], ids=lambda table: table.name)
def test_titles_are_no_keys(table, tmp_path):
    """What readers see may change: the paper's values and the claims find their cells all the same."""
    words = {word for run in table.runs() for word in table.label(run) if word}
    renamed = replace(table, titles={word: f"Called {index}" for index, word in enumerate(sorted(words))})
    before, after = (compare.cells(one, made_up.rows(one)) for one in (table, renamed))
    assert all(cell.method.startswith("Called") for cell in after)
    assert [(cell.words, cell.ours, cell.published) for cell in before] == [
        (cell.words, cell.ours, cell.published) for cell in after
    ]
    assert any(cell.published for cell in after)
    assert coverage.expected(table) == coverage.expected(renamed)


def test_claims_ask_by_the_papers_words(tmp_path, monkeypatch):
    made_up.fill(gblm.metric_ablation, tmp_path, answers=False)
    claims = [claim for claim in statements.CLAIMS if any(p.table == gblm.metric_ablation.name for p in claim.places)]
    assert claims
    before = [judge.on_ours(claim, judge.Ours(tmp_path)) for claim in claims]
    monkeypatch.setitem(papers.TABLES, gblm.metric_ablation.name, replace(gblm.metric_ablation, titles={}))
    assert before == [judge.on_ours(claim, judge.Ours(tmp_path)) for claim in claims]
    assert all(answer.of for answer in before)


def test_a_cell_answers_to_the_papers_words_and_to_its_title():
    (cell, *_) = (c for c in cells.cells(gblm.metric_ablation.runs(), gblm.metric_ablation) if c.run.method)
    called = terms.values_of(cell, terms.CELL)
    assert {"gradienttermalone(l1)50%", "|w|*||g||_1(gradienttermonly)50%"} <= called
