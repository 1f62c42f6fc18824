"""LLM.int8 as the last stage of a cell, and beside the dense model's own numbers."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import small_table as small
import torch

import pruners
from eval import int8
from eval.efficiency import counts, speed_note
from eval.perplexity import perplexity
from experiments import cells, papers
from experiments.batch import run_table
from experiments.labels import labels
from experiments.settings import Settings
from experiments.store import records
from tests.families import tiny, windows

try:
    int8.library()
    HERE = True
except ModuleNotFoundError:
    HERE = False
needs_bitsandbytes = pytest.mark.skipif(not HERE, reason="needs bitsandbytes, which is optional")
needs_shared = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"needs the trained model in {small.MODEL}")


METHODS = (None, pruners.Flap(ratio=0.3))


def quantised_table():
    plain = small.table(METHODS)
    return replace(plain, run=lambda method, model: replace(plain.run(method, model), quantised=True))


def test_a_cell_that_is_quantised_has_an_id_and_words_of_its_own():
    (dense, pruned), (whole, cut) = (table.runs() for table in (quantised_table(), small.table(METHODS)))
    assert "quantised" not in whole.spec()
    assert dense.spec()["quantised"] == "LLM.int8"
    assert len({run.id() for run in (dense, pruned, whole, cut)}) == 4
    assert [method for method, _ in labels([dense, whole])] == ["Dense + LLM.int8", "Dense"]


@needs_shared
def test_without_its_library_a_cell_is_refused_in_a_sentence_before_it_begins(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    data = small.data(tmp_path / "data")
    found = run_table("tiny", cells.cells(quantised_table().runs()), Settings(tmp_path, data_dir=data, device="cpu"))
    assert len(found.failed) == 2
    (message,) = {failure.message for failure in records.load_failures(tmp_path, "tiny").values()}
    assert "LLM.int8 runs through bitsandbytes, which cannot be imported here" in message
    assert "pip install bitsandbytes" in message


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["llama", "opt", "gpt_neox", "falcon", "phi3", "gemma3_text"])
def test_a_quantised_model_computes_nearly_the_same_and_counts_the_same(kind):
    model, whole = tiny(kind), tiny(kind)
    before = counts(whole)
    if kind == "falcon":
        with pytest.raises(ValueError, match=r"is not a torch\.nn\.Linear, which LLM\.int8 replaces"):
            int8.quantise(model)
        return
    int8.quantise(model)
    after, tokens = counts(model), windows(kind).flatten()
    assert (after.parameters, after.macs) == (before.parameters, before.macs)
    assert after.weight_bytes < before.weight_bytes
    found, expected = (perplexity(m, tokens, 16).perplexity for m in (model, whole))
    assert found != expected
    assert found == pytest.approx(expected, rel=0.02)
    assert speed_note(model) is None
    with pytest.raises(TypeError, match="pruning needs a plain"):
        pruners.anatomy.blocks(model)[0].linears()


@needs_bitsandbytes
def test_what_pruning_left_is_quantised():
    model = tiny("llama")
    pruners.prune(model, pruners.Flap(target_parameters=0.5), windows("llama"))
    before = counts(model)
    int8.quantise(model)
    assert (counts(model).parameters, counts(model).macs) == (before.parameters, before.macs)
    with torch.no_grad():
        assert model(windows("llama")).logits.isfinite().all()


@needs_shared
@needs_bitsandbytes
def test_cells_are_measured_quantised(tmp_path):
    data = small.data(tmp_path / "data")
    found = run_table("tiny", cells.cells(quantised_table().runs()), Settings(tmp_path, data_dir=data, device="cpu"))
    assert len(found.done) == 2
    for path in records.folder(tmp_path, "tiny").glob("*.json"):
        assert records.read(path).achieved["quantised"].startswith("bitsandbytes ")


def test_table_13_is_four_cells():
    runs = papers.find("llm_pruner.quantised").runs()
    assert [(run.method is not None, run.quantised) for run in runs] == [
        (False, False), (False, True), (True, False), (True, True),
    ]  # fmt: skip
    assert runs[2].recovery == runs[3].recovery != runs[0].recovery is None
