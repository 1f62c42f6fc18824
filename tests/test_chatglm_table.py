"""LLM-Pruner's table 5 from its dialogues to its cells, on a tiny ChatGLM in the published layout."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from experiments import cells, models, papers, recover
from experiments.batch import run_table
from experiments.data import corpora
from experiments.data.tokens import Tokenizer
from experiments.papers import llm_pruner_chatglm
from experiments.recovery import Instructions
from experiments.settings import Settings
from experiments.spec import Windows, ZeroShot
from experiments.store import records
from pruners.chatglm import ChatGLMTokenizer
from pruners.retrain.batches import Batches
from pruners.run import inputs
from tests.chatglm import GOLDEN, golden, odd, published_folder
from tests.conftest import SHARED, needs_shared

DATA = SHARED / "data"
TURNS = [["the old model ", " counts words and numbers"], ["small models", "learn slowly", "and more"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = published_folder(tmp_path_factory.mktemp("chatglm") / "tiny")
    told = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(told | {"max_sequence_length": 1024}))
    return made


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture
def data(tmp_path):
    """A data folder with two dialogues, and instructions made of words that the tiny tokenizer knows."""
    for name, rows in {
        "dailydialog/dailydialog_train": [{"dialog": turns} for turns in TURNS],
        "alpaca/alpaca_data_cleaned": [{"instruction": "counts", "input": "", "output": "words"}] * 3,
    }.items():
        (tmp_path / name).parent.mkdir()
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@needs_shared
def test_what_is_predicted_of_a_dialogue_is_what_the_authors_predict():
    told = load_file(GOLDEN / "pruning.safetensors")
    tokens, expected = (told[f"tiny/calibration/{what}"] for what in ("input_ids", "labels"))
    assert torch.equal(inputs.labels(golden().config, tokens), expected)
    batches = Batches(tokens, 2, 0, golden().config)
    assert all(torch.equal(labels, row) for (_, labels), row in zip(batches.examples, expected, strict=True))


def test_dialogues_are_prompt_marks_answer_and_padding(tokenizer, data):
    windows = Windows("dailydialog/train", 2, 24, sampling="dialogues")
    for row, (asked, answer, *_) in zip(corpora.calibration(windows, tokenizer, data), TURNS, strict=True):
        before, after = (tokenizer.encode(turn.strip(), add_special_tokens=False) for turn in (asked, answer))
        expected = [*before[:11], 5, 8, *after[:10], 9]
        assert row.tolist() == expected + [3] * (24 - len(expected))
    short = Windows("dailydialog/train", 1, 8, sampling="dialogues")
    (row,) = corpora.calibration(short, tokenizer, data)
    assert row.tolist()[3:5] == [5, 8]
    assert row.tolist()[-1] == 9


@needs_shared
def test_dialogues_that_cannot_be_had_are_refused_in_a_sentence(tokenizer, data):
    llama = AutoTokenizer.from_pretrained(DATA / "tokenizers/llama")
    asked = Windows("dailydialog/train", 2, 24, sampling="dialogues")
    with pytest.raises(ValueError, match=r"needs a model with these special tokens \(ChatGLM\) .* has 0 of them"):
        corpora.calibration(asked, llama, data)
    with pytest.raises(ValueError, match="dailydialog/train has 2 dialogues; 3 were requested"):
        corpora.calibration(Windows("dailydialog/train", 3, 24, sampling="dialogues"), tokenizer, data)
    (data / "dailydialog/dailydialog_train.jsonl").write_text('{"dialog": ["alone"]}')
    with pytest.raises(ValueError, match="record 1 is not a dialogue of two or more text turns"):
        corpora.calibration(asked, tokenizer, data)


@needs_shared
def test_plain_text_has_the_marks_in_front_and_nowhere_else(tokenizer):
    stream = corpora.token_ids("ptb/test", tokenizer, DATA)
    assert not {5, 8} & set(stream[:200].tolist() + stream[-2:].tolist())
    for sampling in ("documents", "stream", "sentences", "first"):
        drawn = corpora.calibration(Windows("ptb/test", 3, 16, sampling=sampling), tokenizer, DATA)
        assert drawn.shape == (3, 16)
        assert (drawn[:, :2] == torch.tensor([5, 8])).all()
    with pytest.raises(ValueError, match="Windows of 2 tokens leave no room for text after the 2 special tokens"):
        corpora.calibration(Windows("ptb/test", 3, 2, sampling="first"), tokenizer, DATA)


def test_recovery_predicts_the_answers(tokenizer, data):
    text = Instructions("alpaca/train", length=400, held_out=1)
    examples = list(recover.examples(text, Tokenizer("tiny", tokenizer), data))
    answer = [*tokenizer.encode("words", add_special_tokens=False), 9]
    for example in examples:
        assert example["input_ids"][-len(answer) - 2 :] == [5, 8, *answer]
        assert [label for label in example["labels"] if label != inputs.IGNORED] == [8, *answer]
        assert inputs.labels(odd().config, torch.tensor(example["input_ids"])).tolist() == example["labels"]
    assert len(examples) == 2
    short = Instructions("alpaca/train", length=20, held_out=1)
    with pytest.raises(ValueError, match=r"None of the 2 records of alpaca/train .* within its first 20 tokens"):
        list(recover.examples(short, Tokenizer("tiny", tokenizer), data))


@needs_shared
def test_the_table_runs(folder, tmp_path):
    table = papers.find("llm_pruner.chatglm_6b")
    runs = papers.runs(table, str(folder), dtype="float32", limit=1)
    assert {run.measures[0].released_marks for run in runs} == {True}
    runs = [run for run in runs if run.recovery is None]
    found = run_table(table.name, cells.cells(runs, table), Settings(tmp_path, data_dir=DATA, device="cpu"))
    assert len(found.done) == len(runs) == 8
    (key,) = {run.measures[0].key for run in runs}
    assert key == "mean.llm_pruner_chatglm@0shot+marks[:1]"
    made = [records.read(path) for path in records.folder(tmp_path, table.name).glob("*.json")]
    heads = set()
    for record in made:
        assert 0 <= record.measures[key]["score"] <= 1
        if record.spec["method"]:
            assert record.achieved["sparsity"] == pytest.approx(0.1, abs=0.03)
            heads.add(tuple(record.spec["method"]["attention_blocks"]))
    assert heads == {(0, 0), (0, 2)}


def test_other_models_are_asked_and_calibrated_as_ever():
    (dense, *pruned) = papers.find("llm_pruner.chatglm_6b").runs("llama-7b")
    assert not dense.measures[0].released_marks
    assert {run.windows.corpus for run in pruned if run.windows} == {"bookcorpus/train"}
    assert models.find("chatglm-6b").marks
    assert llm_pruner_chatglm.at_10("Vector", "chatglm-6b").method.mlp_blocks == (0, 28)


def test_the_released_marks_move_no_other_id():
    plain = ZeroShot("flap", (("boolq", "acc"),))
    assert plain.key == "mean.flap@0shot"
    assert (
        ZeroShot("flap", (("boolq", "acc"),), released_marks=True).task_key("boolq", "acc") == "boolq.acc@0shot+marks"
    )
