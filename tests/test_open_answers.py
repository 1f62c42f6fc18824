"""Greedy answers: the last number of a problem, agreement with the dense model, and text that a model writes itself."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_table as small
import torch
from conftest import needs_shared
from transformers import AutoModelForCausalLM, AutoTokenizer

import pruners
from eval import greedy as greedy_module
from eval.generation import generate, written
from eval.greedy import Agreement, agreement, greedy, last_number, prompt, solved
from experiments import cells, estimate, papers
from experiments.batch import run_table
from experiments.data import corpora, eval_tasks
from experiments.data.sources import SOURCES
from experiments.measures.asked import DenseAnswers, OpenAnswers
from experiments.settings import Settings
from experiments.spec import Run, Windows
from experiments.store import records

DATA = small.SHARED / "data"


@pytest.fixture(scope="module")
def story():
    if not small.MODEL.is_dir():
        pytest.skip(f"{small.MODEL} is absent")
    return AutoModelForCausalLM.from_pretrained(small.MODEL).eval(), AutoTokenizer.from_pretrained(small.MODEL)


@pytest.fixture
def data(tmp_path):
    """Two corpora and a few problems."""
    folder = small.data(tmp_path / "data")
    (folder / "tasks").mkdir()
    problems = [
        {"question": f"What is {n} + {n}?", "answer": f"{n} and {n} are {2 * n}.\n#### {2 * n}"} for n in range(9)
    ]
    for split in ("train", "test"):
        (folder / f"tasks/gsm8k_{split}.jsonl").write_text("\n".join(map(json.dumps, problems)))
    return folder


@pytest.mark.parametrize(
    ("text", "number"),
    [("18", "18"), ("so she has $1,234.50.", "1234.5"), ("1 and then -7 apples.", "-7"), ("#### 2,000", "2000"),
     ("it is 3.", "3"), ("18.0", "18"), ("none", None), ("", None), ("x = 12% of 50", "50"), ("9,", "9"),
     ("The answer is .5", "0.5"), ("-.5", "-0.5"), ("No.5", "5"), ("it is...72", "72"), ("is 5.", "5"), ("10%", "10"),
     ("1,2,3", "3"), ("1,2345", "2345"), ("12,345,678.9", "12345678.9"), ("16-4", "4"), ("(16)-4", "4"),
     ("3-5 apples", "5"), ("x=-3", "-3"), ("[-1,000]", "-1000"), ("\u22125", "-5"), ("16\u22124", "4"), ("$.50", "0.5"),
     ("120-12 = 108 = 120-12 =", "12"), ("#### 72", "72"), ("_-3_", "-3"),
    ("1,00,000", "100000"), ("12345,678.5", "12345678.5"), ("-1,23", "23"), ("1,234" + 9_999 * ",567" + "8", "5678")],
)  # fmt: skip
def test_the_last_number_of_a_text(text, number):
    assert last_number(text) == (None if number is None else Decimal(number))


def test_problems_are_asked_as_lm_eval_asks_them():
    one, other = ({"question": f"{n}?", "answer": f"a {n}"} for n in (1, 2))
    assert prompt(one) == "Question: 1?\nAnswer:"
    assert prompt(other, [one]) == "Question: 1?\nAnswer: a 1\n\nQuestion: 2?\nAnswer:"


def test_what_is_written_behind_the_next_question_counts_for_nothing(monkeypatch):
    texts = iter(["It is 4.\n\nQuestion: 5?", " 5", "none"])
    tokenizer = SimpleNamespace(decode=lambda answer, **_: next(texts))
    monkeypatch.setattr(greedy_module, "greedy", lambda *args: [[1], [2], [3]])
    problems = [
        {"question": "q", "answer": "#### 4"},
        {"question": "r", "answer": "#### 6"},
        {"question": "s", "answer": "1"},
    ]
    found = solved.__wrapped__(None, tokenizer, problems)
    assert (found["score"], found["per_document"]) == (pytest.approx(1 / 3), [1.0, 0.0, 0.0])
    assert found["standard_error"] == pytest.approx((2 / 9 * 3 / 2 / 3) ** 0.5)
    with pytest.raises(ValueError, match="Problem 2 has an answer without a number"):
        solved.__wrapped__(None, tokenizer, [problems[0], {"question": "q", "answer": "no"}])


def test_answers_agree_up_to_the_first_token_that_differs():
    one, other = [[1, 2, 3], [4, 5, 6], [7]], [[1, 2, 3], [4, 9, 6], [7, 8]]
    assert agreement(one, other) == Agreement(1 / 3, (3 + 1 + 1) / 3, 3, [3, 1, 1])
    with pytest.raises(ValueError, match="equally long; got 3 and 2"):
        agreement(one, other[:2])


def test_greedy_answers_are_the_most_likely_tokens(story):
    model, tokenizer = story
    (answer,) = greedy(model, tokenizer, ["Once upon a time"], 6)
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    for token in answer:
        assert int(model(ids).logits[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    (stopped,) = greedy(model, tokenizer, ["Once upon a time"], 40, tokenizer.decode(answer[2:4]))
    assert len(stopped) < 40
    with pytest.raises(ValueError, match="at least one prompt"):
        greedy(model, tokenizer, [" "])


def test_a_model_writes_its_own_windows_by_seed(story):
    model, tokenizer = story
    state = torch.get_rng_state()
    one, again, other = (written(model, tokenizer, 5, 24, seed) for seed in (0, 0, 1))
    assert one.shape == (5, 24)
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert (one[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(torch.get_rng_state(), state)
    with torch.no_grad():
        own, noise = (model(ids, labels=ids).loss for ids in (one, one[:, torch.randperm(24)]))
    assert own < noise


HABITS = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": list(range(20, 60)),
    "bad_words_ids": [[70], [80]],
    "forced_eos_token_id": 2,
    "num_beams": 2,
    "min_p": 0.2,
    "stop_strings": ["a"],
}


@pytest.mark.parametrize("name", HABITS)
def test_the_models_own_settings_of_generation_change_nothing(name, story, monkeypatch):
    model, tokenizer = story

    def made():
        texts = [c.text for c in generate(model, tokenizer, ["Once upon a time"], 12)]
        return written(model, tokenizer, 3, 24).tolist(), greedy(model, tokenizer, ["Once upon a time"], 24), texts

    expected = made()
    own = copy.deepcopy(model.generation_config)
    setattr(own, name, HABITS[name])
    monkeypatch.setattr(model, "generation_config", own)
    assert made() == expected
    assert model.generation_config is own


def test_no_token_that_ends_a_text_is_written(story, monkeypatch):
    model, tokenizer = story
    often = written(model, tokenizer, 8, 40)[:, 1:].flatten().mode().values.item()
    own = copy.deepcopy(model.generation_config)
    own.eos_token_id = [tokenizer.eos_token_id, often]
    monkeypatch.setattr(model, "generation_config", own)
    assert not (written(model, tokenizer, 8, 40)[:, 1:] == often).any()


@needs_shared
def test_open_answers_and_agreement_are_measures_of_a_cell(data, tmp_path):
    asked = (DenseAnswers(new_tokens=5), OpenAnswers(examples=1, limit=3, new_tokens=8))
    windows = Windows("own/text", 4, 32, seed=3)
    runs = [Run(str(small.MODEL), method, windows, asked) for method in (None, pruners.Wanda(sparsity=0.7))]
    runs[0] = replace(runs[0], windows=None)
    made = cells.cells(runs)
    assert not run_table("tiny", made, Settings(tmp_path, data_dir=data)).failed
    dense, pruned = (records.find(tmp_path, "tiny", cell.id) for cell in made)
    assert dense.measures["as dense@5"]["exact_share"] == 1.0
    assert pruned.measures["as dense@5"]["exact_share"] < 1.0
    found = pruned.measures["gsm8k.exact_match@1shot+8[:3]"]
    assert (found["documents"], len(found["answers"])) == (3, 3)
    assert pruned.data["own/text"] == {"source": "written by the dense model", "rows": 0, "complete": True}
    assert {"gsm8k/test", "gsm8k/train"} < set(pruned.data)
    again = run_table("tiny", made, Settings(tmp_path, data_dir=data))
    assert len(again.found) == 2


@needs_shared
@pytest.mark.parametrize(
    ("corpus", "rows"),
    [("ptb/train", 42_068), ("c4/train_1000-1999", 1_000), ("c4/validation", 1_025), ("c4/validation_sample", 2_000),
     ("bookcorpus/train", 20_001), ("dailydialog/test", 1_000), ("alpaca/train", 5_000), ("gsm8k/test", 1_319),
     ("gsm8k/train", 7_473)],
)  # fmt: skip
def test_a_data_folder_holds_them_under_their_documented_names(corpus, rows):
    assert len(corpora.rows(corpus, DATA)) == rows
    told = corpora.provenance(corpus, DATA)
    assert told["rows"] == rows
    assert told["complete"] == (rows == corpora.find(corpus).rows)


@needs_shared
def test_what_a_data_folder_lacks_is_told_to_the_record(monkeypatch):
    perp = papers.find("perp.magnitude").runs()[-1]
    assert f"c4/train (800 of 2,000 records in {DATA})" in estimate.lacking(perp, DATA)
    tuned = next(run for run in papers.find("llm_pruner.llama_7b").runs() if run.recovery)
    assert not [text for text in estimate.lacking(tuned, DATA) if "alpaca" in text]
    tasks = papers.find("embedded.tasks").runs()[0]
    assert not [text for text in estimate.lacking(tasks, DATA) if "documents of" in text]


@pytest.mark.parametrize("table", [table for table in papers.TABLES.values() if table.name in (
    "gblm.metric_ablation", "gblm.calibration_size", "flap.structures", "flap.c4", "llm_pruner.ratios",
    "baselines.calibration_seeds", "baselines.comparison_group")], ids=lambda table: table.name)  # fmt: skip
def test_a_table_of_variants_has_its_models_unpruned_in_front(table):
    dense = [run for run in table.runs() if run.method is None]
    assert [run.model for run in dense] == list(dict.fromkeys(run.model for run in table.runs()))
    assert {table.label(run) for run in dense} == {("Dense", "")}
    assert {run.measures for run in dense} == {run.measures for run in table.runs()}
    assert all(run.windows is None and run.recovery is None for run in dense)


def test_every_file_of_a_data_folder_is_documented():
    told = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text()
    files = [file for source in SOURCES.values() for file in source.local]
    files += [f"{name.format(part='mmlu_SUBJECT')}.jsonl" for source in eval_tasks.SOURCES.values()
              for names in source.splits.values() for name in names]  # fmt: skip
    assert [file for file in files if f"`{file}`" not in told] == []
