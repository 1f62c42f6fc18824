"""Metrics of lm-eval's tasks: by filter, with an error only where they are means, and none that would stay unseen."""

from __future__ import annotations

import json

import pytest
import small_table as small
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import tasks
from eval import zero_shot as zs
from eval.scorer import Scorer
from experiments import cells
from experiments.__main__ import main
from experiments.batch import run_table
from experiments.measures import zero_shot
from experiments.settings import Settings
from experiments.spec import ZeroShot
from experiments.store import audit, records
from pruners.interface.suggest import UsageError
from tests.conftest import needs_shared


@pytest.fixture(scope="module")
def stories():
    return AutoModelForCausalLM.from_pretrained(small.MODEL).eval(), AutoTokenizer.from_pretrained(small.MODEL)


def changes(folder, **splits: list[dict]) -> dict:
    files = {split: folder / f"{split}.jsonl" for split in splits}
    for split, path in files.items():
        path.write_text("".join(json.dumps(row) + "\n" for row in splits[split]))
    texts = {split: str(path) for split, path in files.items()}
    return {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": texts}}


@needs_shared
def test_documents_count_once_however_many_filters_read_their_answers(stories, tmp_path, monkeypatch):
    problems = [{"question": f"{n}?", "answer": f"#### {n}"} for n in (1, 2, 3)]
    monkeypatch.setattr(Scorer, "generate_until", lambda *_, **__: ["#### 1", "It is 2", "It is 4"])
    found = zs.zero_shot(*stories, {"gsm8k": changes(tmp_path, train=problems, test=problems)})
    score, strict, flexible = found.tasks["gsm8k"], "exact_match,strict-match", "exact_match,flexible-extract"
    assert score.documents == 3
    assert score.metrics == pytest.approx({strict: 1 / 3, flexible: 2 / 3})
    assert score.standard_errors == pytest.approx({strict: 1 / 3, flexible: 1 / 3})
    assert score.per_document == {strict: [1, 0, 0], flexible: [1, 1, 0]}
    assert [(row["document"], row[strict], row[flexible]) for row in found.samples] == [(0, 1, 1), (1, 0, 1), (2, 0, 0)]
    assert found.samples[1]["answers"] == {"strict-match": ["[invalid]"], "flexible-extract": ["2"]}


TEXTS = [{"text": text} for text in ("Once upon a time there was a girl", "The dog was very happy", "He saw a cat")]


@needs_shared
def test_what_is_no_mean_has_no_error_of_one_and_is_no_score(stories, tmp_path, monkeypatch):
    asked = {"lambada_openai": changes(tmp_path, test=TEXTS) | {"training_split": None}}
    score = zs.zero_shot(*stories, asked).tasks["lambada_openai"]
    assert score.metrics["perplexity"] > 1
    assert set(score.standard_errors) == set(score.per_document) == {"acc"}
    monkeypatch.setattr(zero_shot, "documents", lambda *_: (asked, {}))
    monkeypatch.setattr(zero_shot, "provenance", lambda *_: {})
    what = ZeroShot(None, (("lambada_openai", "acc"),))
    values = zero_shot.measure(what, *stories, tmp_path, zero_shot.Place(tmp_path / "id", tmp_path))
    assert "score" in values["lambada_openai.acc@0shot"]
    assert "score" not in values["lambada_openai.perplexity@0shot"]
    assert not [fault for value in values.values() for fault in audit._impossible(value)]


@pytest.mark.parametrize(
    ("task", "metric", "said"),
    [("wikitext", "acc", "word_perplexity, byte_perplexity, bits_per_byte; .* such as wikitext2/test@2048"),
     ("gsm8k", "acc", "leave the task out, or ask for exact_match,strict-match or exact_match,flexible-extract"),
     ("lambada_openai", "perplexity", "no perplexity that is a mean"), ("triviaqa", "acc", "ask for exact_match")],
)  # fmt: skip
def test_a_metric_that_a_task_does_not_have_is_one_sentence(task, metric, said):
    with pytest.raises(UsageError, match=said):
        tasks.check_metric(task, metric)


@pytest.mark.parametrize(
    ("task", "metric"),
    [("mmlu", "acc_norm"), ("sciq", "acc"), ("lambada_openai", "acc"), ("gsm8k", "exact_match,strict-match"),
     ("squadv2", "exact")],
)  # fmt: skip
def test_a_tasks_own_means_can_be_asked_for(task, metric):
    tasks.check_metric(task, metric)


@needs_shared
def test_a_task_without_accuracy_is_refused_before_any_work(tmp_path, capsys):
    assert main(["run", "embedded.tasks", "--tasks", "wikitext", "--results", str(tmp_path)]) == 2
    assert "wikitext has no acc" in capsys.readouterr().err
    table = small.table((None,), measures=(ZeroShot(None, (("wikitext", "word_perplexity"),)),))
    outcome = run_table(
        table.name, cells.cells(table.runs()), Settings(tmp_path, "cpu", data_dir=small.SHARED / "data")
    )
    assert len(outcome.failed) == 1
    (failure,) = records.load_failures(tmp_path, table.name).values()
    assert "wikitext has no word_perplexity that is a mean" in failure.message


@needs_shared
def test_a_class_whose_metrics_are_known_only_then_leaves_its_task_missing(stories, tmp_path, monkeypatch):
    score = zs.TaskScore(1, None, 1, "", 0, {"exact": 1.0}, {"exact": None}, {"exact": [1.0]})
    monkeypatch.setattr(zero_shot, "documents", lambda *_: ({"squadv2": {}}, {}))
    monkeypatch.setattr(zero_shot, "provenance", lambda *_: {})
    monkeypatch.setattr(zs, "zero_shot", lambda *_, **__: zs.ZeroShotResult({"squadv2": score}, {}, []))
    what = ZeroShot("mine", (("squadv2", "acc"),))
    values = zero_shot.measure(what, *stories, tmp_path, zero_shot.Place(tmp_path / "id", tmp_path))
    assert values[what.key]["missing"]["squadv2"]["reason"] == "lm-eval scores it by exact, not by a mean acc"


@needs_shared
@pytest.mark.parametrize("bleu", [[40.0, 20.0], [0.8, 0.0]])  # of a model that answers nothing right, too
def test_what_is_no_share_is_no_accuracy(stories, tmp_path, monkeypatch, bleu):
    means = {"bleu": sum(bleu) / 2, "acc": 0.5, "bleu_acc": 0.0}
    values = {"bleu": bleu, "acc": [1.0000000000000002, 0.0], "bleu_acc": [0, 0]}
    score = zs.TaskScore(2, None, 1, "", 0, means, {"bleu": 10.0, "acc": 0.5, "bleu_acc": 0.0}, values)
    monkeypatch.setattr(zero_shot, "documents", lambda *_: ({"truthfulqa_gen": {}}, {}))
    monkeypatch.setattr(zero_shot, "provenance", lambda *_: {})
    monkeypatch.setattr(zs, "zero_shot", lambda *_, **__: zs.ZeroShotResult({"truthfulqa_gen": score}, {}, []))
    for metric, lacking in (("bleu", ["its bleu is no share of documents"]), ("acc", []), ("bleu_acc", [])):
        what = ZeroShot("mine", (("truthfulqa_gen", metric),))
        found = zero_shot.measure(what, *stories, tmp_path, zero_shot.Place(tmp_path / "id", tmp_path))
        assert found[what.task_key("truthfulqa_gen", "bleu")]["value"] == means["bleu"]
        assert found[what.task_key("truthfulqa_gen", "bleu_acc")]["score"] == 0
        assert not zero_shot.obtainable(found[what.key], None)  # nor is it measured again and again
        assert "score" not in found[what.task_key("truthfulqa_gen", "bleu")]
        assert found[what.task_key("truthfulqa_gen", "acc")]["score"] == 0.5
        assert [entry["reason"] for entry in found[what.key]["missing"].values()] == lacking
        assert ("score" in found[what.key]) == (not lacking)
