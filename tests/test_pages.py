"""Pages and notes name every cell by what tells it from the others, and no text of a cell breaks a table."""

from __future__ import annotations

from dataclasses import replace

import made_up
import pandas as pd
import pytest
import small_table as small

import pruners
from analysis import rows
from analysis.__main__ import main
from analysis.claims import statements
from analysis.pages import comparisons, generation, spread
from analysis.rows import Row
from analysis.tables import notes
from analysis.tables.markdown import marked
from experiments import papers
from experiments.measures.asked import DenseAnswers, OpenAnswers
from experiments.spec import Run, Table, ZeroShot
from experiments.store import records
from pruners.interface.suggest import UsageError

MODELS = ("opt-125m", "smollm2-135m")
KEY = small.PPL.key
BASE = pruners.Wanda(0.5)
OTHER = pruners.SparseGPT(0.5)
ENDS = ("\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x85", "\u2028", "\u2029")


def table(methods, measures=(small.PPL,), models=MODELS, seeds=(0, 1)) -> Table:
    def run(method, model, seed):
        return Run(model, method, replace(small.WINDOWS, seed=seed), measures)

    return Table("tiny", "A table", methods, tuple((model, seed) for model in models for seed in seeds), run)


def filled(declared: Table, root, measured) -> list[Row]:
    for run in declared.runs():
        told = small.record(run).measures
        records.write(small.record(run, measures={key: told[key] | measured(run) for key in told}), root)
    return rows.rows(declared, root)


def likelihoods(run: Run) -> dict:
    """Of seed 1 far worse, whatever the method."""
    seed = run.windows.seed if run.windows else 0
    worse = 2.0 * seed + (0.1 if run.method == OTHER else 0.0)
    return {"nll_per_window": [1.0 + worse, 1.5 + worse, 1.2 + worse], "perplexity": 3.0}


def test_generated_text_of_every_model_has_its_own_column(tmp_path, capsys):
    declared = papers.find("llm_pruner.generation")
    made_up.fill(declared, tmp_path)
    assert main(["generation", declared.name, "--results", str(tmp_path)]) == 0
    heads = next(line for line in capsys.readouterr().out.splitlines() if "| Dense, vicuna-7b-v0 " in line[5:])
    assert len(cells(heads)) == len(declared.runs()) == 9
    assert len(set(cells(heads))) == 9


def test_generated_text_is_shown_letter_by_letter():
    def told(text, number):
        row = {"prompt": "a\n# b *c*", "decoding": "greedy", "text": text}
        return [row | dict.fromkeys(generation.NUMBERS, number)]

    page = generation.page({"Dense": told("007", None), "|W| 50 %": told("1.50\n**x**|y", 0.5)})
    headings = [line for line in page.splitlines() if line.startswith("#")]
    assert headings == ["# Generated text", "## a<br># b \\*c\\* (greedy)"]
    assert "nan" not in page
    assert cells(page.splitlines()[-1]) == ["007", r"1.50<br>\*\*x\*\*\|y"]
    assert cells(page.splitlines()[-3]) == ["Dense", r"\|W\| 50 %"]


@pytest.mark.parametrize("end", ENDS)
def test_generated_text_keeps_to_its_cell_whatever_ends_its_lines(end):
    row = {"prompt": "a", "decoding": "greedy", "text": f"x{end}y"} | dict.fromkeys(generation.NUMBERS, 0.5)
    page = generation.page({"Dense": [row]})
    assert cells(page.splitlines()[-1]) == ["x<br>y"]


def cells(line: str) -> list[str]:
    return [cell.strip().replace("\0", r"\|") for cell in line.replace(r"\|", "\0").strip("| ").split("|")]


def test_seeds_are_paired_with_the_same_seed_of_a_baseline(tmp_path):
    declared = table((BASE, OTHER), models=MODELS[:1])
    made = filled(declared, tmp_path, likelihoods)
    base = comparisons.baselines(declared, made, [tmp_path], "wanda 50 %")
    pairs = comparisons._pairs(made, base)
    assert [(row.label, row.seed, other.seed) for row, other in pairs] == [
        ("SparseGPT 50 %", 0, 0),
        ("SparseGPT 50 %", 1, 1),
    ]
    page = comparisons.page(declared, made, base)
    assert "Baseline's seed" in page
    assert "does not have" not in page
    assert comparisons.page(declared, made, comparisons.baselines(declared, made, [tmp_path])) == page  # the first


def test_one_seed_of_a_baseline_can_be_chosen_and_is_named(tmp_path):
    declared = table((BASE, OTHER), models=MODELS[:1])
    made = filled(declared, tmp_path, likelihoods)
    base = comparisons.baselines(declared, made, [tmp_path], "Wanda 50 %, seed 1")
    assert {other.seed for _, other in comparisons._pairs(made, base)} == {1}
    assert "are compared with its seed 1." in comparisons.page(declared, made, base)


def test_a_table_of_one_cells_seeds_compares_them_with_the_first(tmp_path):
    declared = table((BASE,), models=MODELS[:1])
    made = filled(declared, tmp_path, likelihoods)
    base = comparisons.baselines(declared, made, [tmp_path])
    assert [(row.seed, base.seed) for row, base in comparisons._pairs(made, base)] == [(1, 0)]
    page = comparisons.page(declared, made, base)
    assert "\n\nThe baseline's other seeds are compared with its seed 0.\n" in page
    assert "does not have" not in page


def test_a_cell_without_a_seed_is_said_to_be_one(tmp_path):
    declared = table((BASE, pruners.Magnitude(0.5)), models=MODELS[:1], seeds=(0, 1, 2))
    made = filled(declared, tmp_path, likelihoods)
    page = comparisons.page(declared, made, comparisons.baselines(declared, made, [tmp_path]))
    assert "\n\nCells without a seed are compared with its seed 0.\n" in page
    assert "does not have" not in page


def test_a_cell_of_another_order_has_a_seed_that_the_baseline_has():
    made = made_up.rows(table((BASE, OTHER), models=MODELS[:1], seeds=(0,)))
    base, row = made
    told = replace(row, run=replace(row.run, windows=replace(row.run.windows, order=3)))
    based = replace(base, run=replace(base.run, windows=replace(base.run.windows, order=1)))
    assert comparisons._without_pair(told, based) == "Cells of an order of windows that the baseline does not have"


def test_tests_name_the_model_and_the_seed_of_their_cell(tmp_path):
    declared = table((None, BASE), measures=(ZeroShot(None, (("boolq", "acc"),)),))
    made_up.fill(declared, tmp_path)
    made = rows.rows(declared, tmp_path)
    page = comparisons.page(declared, made, comparisons.baselines(declared, made, [tmp_path]))
    lines = [cells(line)[:5] for line in page.splitlines() if "boolq" in line]
    task = "boolq.acc@0shot"
    assert lines == [["Wanda", "50 %", model, seed, task] for model in MODELS for seed in ("0", "1")]


def test_open_answers_are_compared_by_problem_and_what_cannot_be_is_named(tmp_path):
    asked, alike = OpenAnswers(limit=4), DenseAnswers()
    declared = table((None, BASE), measures=(asked, alike), models=MODELS[:1], seeds=(0,))
    for run in declared.runs():
        right = [1.0, 1.0, 1.0, 0.0] if run.method is None else [0.0, 0.0, 1.0, 0.0]
        told = {asked.key: {"score": sum(right) / 4, "documents": 4, "per_document": right}, alike.key: {"prompts": 8}}
        records.write(small.record(run, measures=told), tmp_path)
    made = rows.rows(declared, tmp_path)
    base = comparisons.baselines(declared, made, [tmp_path])
    page = comparisons.page(declared, made, base)
    assert f"{asked.key}, points" in page
    assert "-50.00 [" in page
    (test,) = comparisons.task_tests(declared, comparisons._pairs(made, base))
    assert (test.key, test.only_here, test.only_baseline) == (asked.key, 0, 2)
    assert page.strip().endswith(f"are in the records: {alike.key}.")


def test_every_tokenizer_has_its_own_note_of_a_protocol(tmp_path):
    tokens = dict(zip(MODELS, (("ab" * 32, 256), ("cd" * 32, 300)), strict=True))
    declared = table((None,))
    made = filled(declared, tmp_path, lambda run: dict(zip(("token_sha256", "tokens"), tokens[run.model], strict=True)))
    assert [note for note in notes.notes(declared, made) if note.startswith(KEY)] == [
        f"{KEY}: 4 windows, 256 tokens; ± one standard error over windows; tokens abababababab (opt-125m).",
        f"{KEY}: 4 windows, 300 tokens; ± one standard error over windows; tokens cdcdcdcdcdcd (smollm2-135m).",
    ]


def test_notes_name_model_and_seed_where_not_all_cells_of_a_label_are_meant(tmp_path):
    declared = table((None, BASE))
    broken = [run for run in declared.runs() if run.method and run.model == MODELS[1]]
    for run in declared.runs():
        if run in broken:
            records.write_failure(small.failure(run, "out of memory"), tmp_path)
        else:
            other = {"method": "other"} if run.method and run.windows.seed == 1 else {}
            records.write(small.record(run, code=other), tmp_path)
    told = notes.notes(declared, rows.rows(declared, tmp_path))
    assert [note for note in told if "failed" in note] == [
        *(f"Wanda 50 %, {MODELS[1]}, seed {seed} failed: out of memory" for seed in (0, 1)),
        "2 of 6 cells failed, and are tried again by: python -m experiments run tiny",
    ]
    assert any(f"code: Wanda 50 %, {MODELS[0]}, seed 1;" in note for note in told)


def test_a_structured_method_that_misses_what_was_asked_says_so(tmp_path):
    declared = table((pruners.LLMPruner(ratio=0.25), pruners.Flap(ratio=0.2)), models=MODELS[:1])
    for run in declared.runs():
        removed = 0.15 if isinstance(run.method, pruners.LLMPruner) else 0.199
        shares = {"asked_shares": {"decoder": 0.2}, "achieved_shares": {"decoder": removed}}
        records.write(small.record(run, achieved={"asked": 0.2, "sparsity": removed, "structure": shares}), tmp_path)
    told = [note for note in notes.notes(declared, rows.rows(declared, tmp_path)) if "requested" in note]
    assert told == [
        "LLMPruner 25 %: 15.0% of the decoder blocks' parameters removed, 20.0% requested, as groups of heads and "
        "channels go whole."
    ]


@pytest.mark.parametrize(("sparsity", "odd"), [(0.5011, True), (0.4991, True), (0.50002, False)])
def test_a_sparsity_that_is_not_quite_as_requested_is_explained(tmp_path, sparsity, odd):
    declared = table((None, BASE), models=MODELS[:1])
    for run in declared.runs():
        records.write(small.record(run, achieved={"asked": 0.5, "sparsity": sparsity if run.method else 0.0}), tmp_path)
    told = [note for note in notes.notes(declared, rows.rows(declared, tmp_path)) if "quite" in note]
    said = (
        "Sparsity that is not quite as requested, as a row loses whole weights and equal ones go together: Wanda 50 %."
    )
    assert told == [said] * odd


def test_a_model_that_was_sparse_before_is_not_explained_by_rounding(tmp_path):
    declared = table((None, BASE), models=MODELS[:1])
    for run in declared.runs():
        records.write(small.record(run, achieved={"asked": 0.5, "sparsity": 0.7 if run.method else 0.0}), tmp_path)
    (told,) = [note for note in notes.notes(declared, rows.rows(declared, tmp_path)) if "requested" in note]
    assert told == (
        "Far more zeros than requested, as the model had zeros before it was pruned or gives many weights the same "
        "score: Wanda 50 %."
    )


def test_a_baseline_nobody_knows_is_answered_by_the_names_that_are_taken(tmp_path):
    declared = table((None, BASE), models=MODELS[:1])
    made = filled(declared, tmp_path, likelihoods)
    with pytest.raises(UsageError, match=r"Known: Dense, Wanda 50 %, Wanda 50 %, seed 0, Wanda 50 %, seed 1\."):
        comparisons.baselines(declared, made, [tmp_path], "wanda 51 %")
    against = comparisons.baselines(declared, made, [tmp_path], "wanda 50 %, seed 1")
    assert "every cell minus Wanda 50 %, seed 1**" in comparisons.page(declared, made, against)


def test_some_rows_go_by_their_label_where_they_are_all_of_it():
    made = made_up.rows(table((None, BASE), models=MODELS[:1]))
    assert rows.called(made[1:], made) == "Wanda 50 %"
    assert rows.called(made[:2], made) == "Dense; Wanda 50 %, seed 0"


def test_bars_and_ends_of_lines_stay_in_their_cell():
    for end in ENDS:
        text = marked(pd.DataFrame({"a|b": [f"x|y{end}z"]}))
        assert text.splitlines()[0].strip("| ") == r"a\|b"
        assert text.splitlines()[-1].strip("| ") == r"x\|y z"
        assert len(text.splitlines()) == 3


@pytest.mark.parametrize("documents", [1_000, 10_042])
def test_a_task_of_which_only_a_part_was_at_hand_is_said_to_be_one(documents, tmp_path):
    asked = ZeroShot("wanda", (("boolq", "acc"), ("hellaswag", "acc_norm")))
    declared = table((None,), measures=(asked,), models=MODELS[:1], seeds=(0,))
    made_up.fill(declared, tmp_path, answers=False)
    (row,) = rows.rows(declared, tmp_path)
    row.measure("hellaswag.acc_norm@0shot")["documents"] = documents
    part = ["hellaswag (1,000 of 10,042 documents)"] if documents < 10_042 else []
    assert row.partial_of("hellaswag.acc_norm@0shot") == row.partial_of(asked.key) == part
    assert row.partial_of("boolq.acc@0shot") == []
    (note,) = [note for note in notes.notes(declared, [row]) if note.startswith(asked.key)]
    assert ("all documents at hand, only a part of hellaswag (1,000" in note) == bool(part)
    assert ("all documents;" in note) == (not part)


def test_rows_that_were_asked_in_unlike_ways_say_so(tmp_path):
    asked = ZeroShot("wanda", (("boolq", "acc"),))
    declared = table((None, BASE), measures=(asked,), models=MODELS[:1], seeds=(0,))
    made_up.fill(declared, tmp_path, answers=False)
    dense, pruned = rows.rows(declared, tmp_path)
    assert not [note for note in notes.notes(declared, [dense, pruned]) if "by itself" in note]
    pruned.measure(asked.key)["every_request_by_itself"] = "it takes no position_ids"
    (note,) = [note for note in notes.notes(declared, [dense, pruned]) if "by itself" in note]
    assert note.startswith(pruned.name)
    assert note.endswith("every request was computed by itself, with its whole context: it takes no position_ids.")


def test_a_task_with_two_metrics_says_once_what_did_not_fit(tmp_path):
    asked = ZeroShot(None, (("arc_easy", "acc"), ("arc_easy", "acc_norm"), ("boolq", "acc")))
    declared = table((None,), measures=(asked,), models=MODELS[:1], seeds=(0,))
    made_up.fill(declared, tmp_path, answers=False)
    (row,) = rows.rows(declared, tmp_path)
    for key in asked.keys:
        row.measure(key)["truncated"] = 2
    told = [note.partition(":")[0] for note in notes.notes(declared, [row]) if "did not fit the model" in note]
    assert told == ["arc_easy", "boolq"]


def test_bars_in_a_method_or_a_claim_break_no_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(statements, "frame", lambda *_, **__: pd.DataFrame({"Claim": ["a|b"], "Paper": ["c"]}))
    assert main(["claims", "--results", str(tmp_path)]) == 0
    pages = [capsys.readouterr().out]
    declared = table((None, BASE), models=MODELS[:1])
    made = [replace(row, method="|W|") for row in filled(declared, tmp_path, likelihoods)]
    pages.append(comparisons.page(declared, made, {MODELS[0]: made[:1]}))
    pages.append(spread.page(declared, made))
    for page in pages:
        lines = [line for line in page.splitlines() if line.startswith("|")]
        assert len({len(cells(line)) for line in lines}) == 1
