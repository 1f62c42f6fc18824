"""The recovery stage of a cell: its text, its place in the id and the record, one pruning for several of them."""

from __future__ import annotations

import gzip
import math
import shutil
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path

import pytest
import small_table
from conftest import SHARED, needs_shared
from datasets import Dataset
from transformers import AutoTokenizer

import pruners
from experiments import cells, estimate, papers, provenance, resume
from experiments.__main__ import main
from experiments.batch import run_table
from experiments.data import corpora
from experiments.data.sources import SOURCES
from experiments.data.tokens import Tokenizer
from experiments.recover import examples, held_out
from experiments.recovery import MORE_DATA, POST_TRAINING, Documents, Instructions, Retraining, label, work_tokens
from experiments.settings import Settings
from experiments.spec import Run, Windows
from experiments.store import records
from pruners.retrain import MaskLoRA, Reconstruction, Trainable

FEW = 400  # records
TEXT = Windows("c4/train", count=4, length=32, seed=1)
NORMS = Retraining(Trainable(norms=True), TEXT, steps=3, learning_rate=1e-3)
MASKED = replace(NORMS, trainable=Trainable(norms=True, adapters=MaskLoRA(rank=4)))
BLOCKS = Reconstruction(Trainable(norms=True), steps=3, learning_rate=1e-3)
RUN = Run("stories260K", pruners.Wanda(sparsity=0.5), small_table.WINDOWS, (small_table.PPL,))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer("llama", AutoTokenizer.from_pretrained(SHARED / "data/tokenizers/llama"))


def test_what_moves_a_recovery_is_part_of_the_id_and_no_recovery_is_no_part():
    runs = [RUN, replace(RUN, recovery=NORMS), replace(RUN, recovery=MASKED), replace(RUN, recovery=BLOCKS)]
    runs += [replace(RUN, recovery=replace(NORMS, **change)) for change in ({"steps": 4}, {"seed": 1})]
    assert len({run.id() for run in runs}) == len(runs)
    assert replace(RUN, recovery=replace(NORMS, micro_batch_size=1)).id() == runs[1].id()
    assert "recovery" not in RUN.spec()


def test_a_stop_is_part_of_the_id_and_of_the_words_where_there_is_one():
    stopped = replace(NORMS, stop=2)
    assert "stop" not in replace(RUN, recovery=NORMS).spec()["recovery"]
    assert replace(RUN, recovery=stopped).spec()["recovery"]["stop"] == 2
    assert (label(NORMS), label(stopped)) == (" + norms", " + norms, step 2 of 3")
    assert work_tokens(stopped, None) == pytest.approx(2 / 3 * work_tokens(NORMS, None))


@needs_shared
def test_cells_that_stop_at_other_steps_go_on_from_each_other(tmp_path):
    data_dir = small_table.data(tmp_path / "data")
    long = replace(NORMS, steps=6, trainable=Trainable(norms=True, adapters=MaskLoRA(rank=4)))
    recoveries = [replace(long, stop=2), replace(long, stop=5), replace(long, stop=6), long]
    found = cells.cells([replace(RUN, model=str(small_table.MODEL), recovery=recovery) for recovery in recoveries])
    assert not run_table("tiny", found, Settings(tmp_path, data_dir=data_dir)).failed
    told = [records.find(tmp_path, "tiny", cell.id) for cell in found]
    assert [record.achieved["recovery"]["resumed_at"] for record in told] == [0, 2, 5, 0]
    losses = [record.achieved["recovery"]["losses"] for record in told]
    assert losses == [losses[-1][:2], losses[-1][:5], losses[-1], losses[-1]]
    assert told[2].measures == told[3].measures
    for before, record in pairwise(told[:3]):  # a later cell costs the steps it took over, too
        assert record.achieved["recovery"]["resumed_seconds"] == before.achieved["recovery"]["seconds"]
        assert record.cost.seconds["retrain"] > record.achieved["recovery"]["seconds"]
        assert record.cost.seconds["total"] > record.cost.seconds["retrain"]


@needs_shared
def test_the_state_that_cells_share_goes_when_all_of_the_table_are_done(tmp_path, monkeypatch):
    recoveries = tuple(replace(NORMS, stop=stop) for stop in (1, 2))
    plain = small_table.table(recoveries)
    stopped = replace(plain, run=lambda recovery, model: replace(RUN, model=model, recovery=recovery))
    monkeypatch.setitem(papers.TABLES, "tiny", stopped)
    words = ["run", "tiny", "--results", str(tmp_path), "--data-dir", str(small_table.data(tmp_path / "data"))]
    first, _ = (cell.id for cell in cells.cells(stopped.runs()))
    assert main([*words, "--only", first]) == 0
    assert len(list(tmp_path.rglob("steps of */*/retrain.safetensors"))) == 1
    assert main(words) == 0
    assert not list(tmp_path.rglob("steps of *"))


@needs_shared
def test_a_state_is_gone_on_with_only_where_it_was_made(tmp_path, monkeypatch):
    run = replace(RUN, model=str(small_table.MODEL), recovery=replace(NORMS, stop=2))
    settings = Settings(tmp_path, device="cpu", data_dir=small_table.data(tmp_path / "data"))
    here = resume.steps(run, "id", "tiny", settings)
    assert resume.steps(replace(run, recovery=replace(NORMS, stop=1)), "other", "tiny", settings) == here
    monkeypatch.setattr(provenance, "device_name", lambda device: "cuda (another)")
    assert resume.steps(run, "id", "tiny", settings) != here


def test_steps_that_cells_share_are_estimated_once():
    long = replace(NORMS, steps=1000)
    found = cells.cells([replace(RUN, model="llama-7b", recovery=replace(long, stop=stop)) for stop in (200, 500, 900)])
    apart, tokens = sum(map(estimate.gpu_hours, found)), 3 * NORMS.batch_size * TEXT.length * (200 + 500)
    hours = 2 * 6_738_415_616 * tokens / estimate.SUSTAINED_FLOPS / 3600
    assert estimate.total_gpu_hours(found) == pytest.approx(apart - hours)
    assert estimate.total_gpu_hours(found[:1]) == estimate.gpu_hours(found[0])


def test_calibration_windows_belong_to_a_run_that_reconstructs_after_magnitude():
    magnitude = replace(RUN, method=pruners.Magnitude(sparsity=0.5))
    assert magnitude.spec()["windows"] is None
    assert replace(magnitude, recovery=BLOCKS).spec()["windows"]["count"] == 4


def test_a_cell_says_how_it_was_recovered():
    runs = [replace(RUN, model="smollm2-135m", recovery=recovery) for recovery in (None, MASKED, BLOCKS)]
    labels = [cell.label for cell in cells.cells(runs)]
    assert labels == ["Wanda 50 %", "Wanda + MaskLoRA, norms 50 %", "Wanda + reconstruction (norms) 50 %"]


@needs_shared
def test_recovery_stages_share_one_pruning_and_leave_their_reports(tmp_path, monkeypatch):
    calls = []
    prune = pruners.prune
    monkeypatch.setattr(pruners, "prune", lambda *args, **options: calls.append(1) or prune(*args, **options))
    data_dir = small_table.data(tmp_path / "data")
    runs = [replace(RUN, model=str(small_table.MODEL), recovery=recovery) for recovery in (NORMS, MASKED, BLOCKS)]
    found = cells.cells(runs)
    outcome = run_table("tiny", found, Settings(tmp_path, data_dir=data_dir))
    assert not outcome.failed
    assert len(calls) == 2  # one for the two retrainings, one with reconstruction
    told = [records.find(tmp_path, "tiny", cell.id).achieved for cell in found]
    assert told[0]["sparsity"] == told[1]["sparsity"] == told[1]["recovery"]["sparsity"]
    assert told[0]["projections"] == told[1]["projections"]
    assert len(told[1]["recovery"]["losses"]) == 3
    assert [block["block"] for block in told[2]["reconstruction"]] == [f"model.layers.{i}" for i in range(5)]


@pytest.fixture(scope="module")
def alpaca(tmp_path_factory) -> Path:
    """A data folder with the first of Alpaca's records."""
    folder = tmp_path_factory.mktemp("alpaca")
    (folder / "alpaca").mkdir()
    with gzip.open(SHARED / "data/alpaca/alpaca_cleaned_head_5000.jsonl.gz", "rt", encoding="utf-8") as whole:
        (folder / "alpaca/alpaca_data_cleaned.jsonl").write_text("".join(islice(whole, FEW)), encoding="utf-8")
    return folder


@needs_shared
def test_loss_is_on_the_answers_alone(tokenizer, alpaca):
    text = Instructions("alpaca/train", length=256, held_out=FEW - 10)
    made = list(examples(text, tokenizer, alpaca))
    prompts = {tokenizer.inner(corpora.alpaca_prompt(record), truncation=True, max_length=256).input_ids.__repr__()
               for record in corpora.instructions("alpaca/train", alpaca)}  # fmt: skip
    assert 0 < len(made) <= 10
    for record in made:
        asked = record["labels"].count(-100)
        assert repr(record["input_ids"][:asked]) in prompts
        assert record["labels"][asked:] == record["input_ids"][asked:]
        assert len(record["input_ids"]) == 256 or record["input_ids"][-1] == tokenizer.inner.eos_token_id


@needs_shared
def test_what_is_held_out_is_not_trained_on(tokenizer, alpaca):
    text = Instructions("alpaca/train", length=1024, held_out=FEW - 100)
    train, kept = (list(make(text, tokenizer, alpaca)) for make in (examples, held_out))
    assert (len(train), len(kept)) == (100, FEW - 100)
    assert not {repr(record) for record in train} & {repr(record) for record in kept}
    assert held_out(TEXT, tokenizer, SHARED / "data") == []


@needs_shared
def test_instructions_are_read_as_often_as_asked_and_split_by_their_numbers(tokenizer, alpaca):
    text = Instructions("alpaca/train", length=1024, held_out=FEW - 10)
    made = examples(text, tokenizer, alpaca)
    assert list(made) == list(made)
    asked = corpora.instructions("alpaca/train", alpaca)
    whole = Dataset.from_list(list(asked)).train_test_split(test_size=FEW - 10, shuffle=True, seed=42)["train"]
    answers = [tokenizer.inner(corpora.alpaca_prompt(row) + row["output"]).input_ids for row in whole]
    assert [record["input_ids"][: len(ids)] for record, ids in zip(made, answers, strict=True)] == answers


def test_more_data_takes_three_epochs_of_what_is_not_held_out():
    rows = SOURCES["lamini/train"].rows - MORE_DATA.text.held_out
    assert MORE_DATA.steps == 3 * math.ceil(rows / MORE_DATA.batch_size)
    assert POST_TRAINING.steps == 2 * math.ceil((SOURCES["alpaca/train"].rows - 2000) / POST_TRAINING.batch_size)


@needs_shared
def test_a_record_says_how_the_held_out_loss_moved(tmp_path, alpaca):
    data_dir = small_table.data(tmp_path / "data")
    shutil.copytree(alpaca / "alpaca", data_dir / "alpaca")
    text = Instructions("alpaca/train", length=256, held_out=40)
    recovery = Retraining(Trainable.full(), text, steps=10, learning_rate=3e-3, batch_size=4)
    found = cells.cells([replace(RUN, model=str(small_table.MODEL), recovery=recovery)])
    assert run_table("tiny", found, Settings(tmp_path, data_dir=data_dir)).done
    record = records.find(tmp_path, "tiny", found[0].id)
    before, after = (record.achieved["recovery"]["held_out"][when] for when in ("before", "after"))
    assert after["loss"] < before["loss"]
    assert before["tokens"] == after["tokens"] > before["records"] == after["records"] > 0
    assert record.cost.seconds["held-out loss"] > 0


@needs_shared
def test_documents_come_whole_or_cut(tokenizer):
    made = examples(Documents("c4/train", 20, 128), tokenizer, SHARED / "data")
    assert len(made) == 20
    assert max(len(record["input_ids"]) for record in made) == 128
    assert min(len(record["input_ids"]) for record in made) < 128


@needs_shared
def test_a_corpus_that_cannot_give_what_is_asked_is_refused(tokenizer, alpaca):
    with pytest.raises(ValueError, match=f"{FEW} records here, of which {FEW} are held out"):
        examples(replace(POST_TRAINING.text, held_out=FEW), tokenizer, alpaca)
    with pytest.raises(ValueError, match=r"holds plain texts, not instructions"):
        examples(Instructions("c4/train"), tokenizer, SHARED / "data")
    with pytest.raises(ValueError, match="has 800 documents"):
        examples(Documents("c4/train", 801, 16), tokenizer, SHARED / "data")
