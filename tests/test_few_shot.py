"""Examples in the prompt, and MMLU: a group of tasks that counts as one, on made-up documents."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path

import lm_eval
import pytest
from lm_eval.api.group import Group
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import tasks
from eval import zero_shot as zs
from eval.answers import read_samples
from experiments import measures, protocols
from experiments.data import eval_tasks
from experiments.measures import zero_shot
from experiments.store.described import describe
from tests import golden

MODEL = Path(__file__).resolve().parents[1].parent / "shared/data/models/stories260K/hf"
pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="../shared/data is absent")
WORDS = ("Lily", "Tim", "dog", "cat", "sun", "tree", "happy", "sad", "big", "little", "red", "blue", "jump", "run")
MMLU = protocols.tasks("mmlu", examples=5)
PARTS = ("mmlu_marketing", "mmlu_virology")
SMALL = {"mmlu_marketing": 7, "mmlu_virology": 4}  # documents


@pytest.fixture(scope="module")
def stories():
    return AutoModelForCausalLM.from_pretrained(MODEL).eval(), AutoTokenizer.from_pretrained(MODEL)


def document(draw: random.Random) -> dict:
    return {"question": " ".join(draw.sample(WORDS, 4)) + "?", "choices": draw.sample(WORDS, 4),
            "answer": draw.randrange(4)}  # fmt: skip


def write(folder: Path, part: str, tested: int, examples: int = 5) -> None:
    draw = random.Random(part)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in {"dev": examples, "test": tested}.items():
        rows = [document(draw) for _ in range(count)]
        (folder / f"{part}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All of MMLU: three documents for most subjects."""
    folder = tmp_path_factory.mktemp("data")
    for part in tasks.parts("mmlu"):
        write(folder / "tasks", part, SMALL.get(part, 3))
    return folder


@pytest.fixture
def small(monkeypatch):
    """MMLU as if it had two subjects."""
    monkeypatch.setitem(tasks.task_manager("mmlu").task_index["mmlu"].cfg, "task", list(PARTS))


def found_in(folder: Path) -> dict:
    return zero_shot.documents(["mmlu"], folder, MMLU.examples)[0]


def test_mmlu_has_57_tasks():
    assert len(tasks.parts("mmlu")) == len(set(tasks.parts("mmlu"))) == 57
    assert tasks.parts("piqa") == ("piqa",)


@pytest.mark.skipif(not golden.WHOLE, reason="reading lm-eval's whole index takes half a minute; `make golden` does")
def test_a_task_is_what_lm_eval_s_whole_index_says():
    """For every task of the papers and every 400th other name."""
    whole = tasks._everything()
    papers = {name for convention in protocols.TASK_SETS for name, _ in protocols.zero_shot(convention).metrics}
    for name in (*papers, "mmlu", *whole.all_subtasks[::400], *whole.all_groups[::50]):
        known = tasks.task_manager(name)
        assert known.task_index[name].cfg == whole.task_index[name].cfg, name
        assert known.task_index[name].yaml_path == whole.task_index[name].yaml_path, name
        if name in papers or name == "mmlu":
            assert known is not whole
            assert tasks.parts(name) == tuple(tasks._parts(name, whole))


def test_the_examples_stand_in_the_prompt(stories, data, small):
    model, tokenizer = stories
    prompts = []
    hook = model.register_forward_pre_hook(lambda module, inputs, options: prompts.append(inputs[0]), with_kwargs=True)
    zs.zero_shot(*stories, found_in(data), limit=1, batch_size=1, examples=2)
    hook.remove()
    texts = {tokenizer.decode(row, skip_special_tokens=True) for batch in prompts for row in batch}
    for part in PARTS:
        rows = [json.loads(line) for split in ("dev", "test")
                for line in (data / f"tasks/{part}_{split}.jsonl").read_text().splitlines()]  # fmt: skip
        text = next(text for text in texts if rows[5]["question"] in text)
        answered = [f"{row['question']}\nA. {row['choices'][0]}" for row in rows[:2]]
        assert all(example in text for example in answered)
        assert text.count(f"Answer: {'ABCD'[rows[0]['answer']]}") > 0
        assert rows[2]["question"] not in text


def by_lm_eval(stories, folder: Path, examples: int) -> dict:
    model, tokenizer = stories
    given = [{"task": part, **changes} for part, changes in found_in(folder)["mmlu"].items()]
    group = Group.from_config({"group": "pooled", "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]})
    for task in tasks.task_manager("mmlu").load([{"group": "changed", "task": given}])["tasks"].values():
        group.add(task)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    return lm_eval.simple_evaluate(lm, tasks=[group], num_fewshot=examples, task_manager=tasks.task_manager("mmlu"))


@pytest.mark.parametrize("examples", [0, 3, 5])
def test_a_groups_accuracy_is_lm_evals(stories, data, small, examples):
    ours = zs.zero_shot(*stories, found_in(data), examples=examples)
    theirs = by_lm_eval(stories, data, examples)
    score = ours.tasks["mmlu"]
    assert score.documents == 11
    assert score.metrics["acc"] == pytest.approx(theirs["results"]["pooled"]["acc,none"])
    assert score.standard_errors["acc"] == pytest.approx(theirs["results"]["pooled"]["acc_stderr,none"])
    samples = [row for part in PARTS for row in theirs["samples"][part]]
    expected = [[nats for nats, _ in row["filtered_resps"]] for row in samples]
    assert [row["answers"] for row in ours.samples] == [pytest.approx(nats, abs=1e-4) for nats in expected]


def test_examples_drawn_at_random_are_those_of_lm_eval(stories, tmp_path):
    rows = [{"goal": f"{a} {b}", "sol1": a, "sol2": b, "label": 0} for a, b in pairwise(WORDS)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes = {"dataset_path": "json", "dataset_name": None, "training_split": None,
               "dataset_kwargs": {"data_files": {"validation": str(tmp_path / "piqa.jsonl")}}}  # fmt: skip
    ours, again = (zs.zero_shot(*stories, {"piqa": changes}, examples=2) for _ in range(2))
    lm = HFLM(pretrained=stories[0], tokenizer=stories[1], batch_size=4)
    asked = [{"group": "changed", "task": [{"task": "piqa", **changes}]}]
    theirs = lm_eval.simple_evaluate(lm, tasks=asked, num_fewshot=2, task_manager=tasks.task_manager("piqa"))
    assert ours.tasks["piqa"].documents_sha256 == again.tasks["piqa"].documents_sha256
    assert ours.tasks["piqa"].documents_sha256 == zs._digest(theirs["samples"]["piqa"])


def test_a_broken_off_group_resumes_to_the_same_bits(stories, data, small, tmp_path):
    def stop_after_half(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    arguments = {"batch_size": 2, "examples": 5}
    with pytest.raises(KeyboardInterrupt):
        zs.zero_shot(*stories, found_in(data), **arguments, resume=tmp_path / "answers", progress=stop_after_half)
    asked: list[int] = []
    hook = stories[0].register_forward_hook(lambda module, inputs, output: asked.append(1))
    resumed = zs.zero_shot(*stories, found_in(data), **arguments, resume=tmp_path / "answers")
    hook.remove()
    undisturbed = zs.zero_shot(*stories, found_in(data), **arguments)
    assert (resumed, resumed.samples) == (undisturbed, undisturbed.samples)
    assert 1 < len(asked) < 15  # of 22 batches; one forward pass is the fingerprint


def test_a_record_shows_one_accuracy_and_keeps_every_document(stories, data, small, tmp_path):
    values = zero_shot.measure(MMLU, *stories, data, zero_shot.Place(tmp_path / "id", tmp_path))
    assert MMLU.keys == ("mmlu.acc@5shot",)
    shown, whole = values["mmlu.acc@5shot"], values["tasks@5shot"]
    rows = read_samples(tmp_path / whole["samples"]["file"])
    assert [(row["task"], row["part"]) for row in rows] == [("mmlu", PARTS[0])] * 7 + [("mmlu", PARTS[1])] * 4
    assert shown["score"] == pytest.approx(sum(row["acc"] for row in rows) / 11)
    assert shown["documents"] == 11
    assert shown["standard_error"] > 0
    assert (whole["missing"], len(whole["data"]["mmlu"]["sha256"])) == ({}, 4)


def test_a_group_that_lacks_a_task_has_no_accuracy(stories, data, tmp_path):
    changes = found_in(data)["mmlu"]
    broken = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "no.jsonl")}}}
    found = zs.zero_shot(*stories, {"mmlu": {**changes, tasks.parts("mmlu")[0]: broken}})
    assert found.tasks == {}
    assert "no accuracy without all of its 57 tasks, and mmlu_abstract_algebra is missing" in found.missing["mmlu"]
    values = zero_shot.measure(MMLU, *stories, tmp_path, zero_shot.Place(tmp_path / "id", tmp_path))
    assert "no tasks/mmlu_abstract_algebra_dev.jsonl" in values["tasks@5shot"]["missing"]["mmlu"]["reason"]
    assert list(values) == ["tasks@5shot"]
    assert measures.lacking(values, data)
    assert not measures.lacking(values, tmp_path)


def test_too_few_examples_are_refused(stories, data, small):
    found = zs.zero_shot(*stories, found_in(data), examples=6)
    assert "mmlu_marketing is missing: it has 5 documents to take the 6 examples" in found.missing["mmlu"]
    with pytest.raises(ValueError, match="at least 0; got -1"):
        zs.zero_shot(*stories, found_in(data), examples=-1)


def test_a_folder_without_documents_for_examples_is_refused(tmp_path):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/piqa_validation.jsonl").write_text('{"goal": "", "sol1": "", "sol2": "", "label": 0}\n')
    assert eval_tasks.changes("piqa", tmp_path)
    with pytest.raises(FileNotFoundError, match="its few-shot examples have no known file in a data folder"):
        eval_tasks.changes("piqa", tmp_path, examples=5)


@pytest.mark.parametrize("group", ["glue", "blimp"])
def test_a_group_without_one_accuracy_is_refused(group):
    with pytest.raises(LookupError, match="gives no accuracy over all documents"):
        tasks.check_names([group])


def test_no_examples_change_no_id_and_longer_prompts_cost_more():
    plain = protocols.tasks("mmlu")
    assert "examples" not in describe(plain)
    assert describe(MMLU)["examples"] == 5
    assert measures.work_tokens(MMLU) == 6 * measures.work_tokens(plain) == 6 * 14_042 * 200
    assert measures.work_tokens(protocols.tasks("mmlu", limit=2)) == 57 * 2 * 200
