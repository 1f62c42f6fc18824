"""Which cells the dense gate protects, and by what, where they measure no perplexity with a known dense value."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import small_table as small
import torch

import pruners
from analysis import published
from experiments import cells, estimate, models, papers
from experiments.batch import run_table
from experiments.measures import dense_gate
from experiments.models import catalogue
from experiments.models.catalogue import CATALOGUE
from experiments.settings import Settings
from experiments.spec import Efficiency, Perplexity
from experiments.store import records

needs_shared = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"needs the trained model in {small.MODEL}")
COUNTS = small.table((pruners.Magnitude(sparsity=0.5),), measures=(Efficiency((), ()),))
KEY = small.PPL.key
DENSE = 53.27  # of the trained model, to two digits


@pytest.fixture
def data(tmp_path):
    return small.data(tmp_path / "data")


@pytest.fixture
def stories(monkeypatch, tmp_path):
    """The table of counts on the trained model, as one of the catalogue with this dense perplexity."""

    def make(dense: float, folder=small.MODEL):
        monkeypatch.setitem(CATALOGUE, "stories", catalogue.Model("stories", folder=folder, dense={KEY: dense}))
        return replace(COUNTS, columns=(("stories",),))

    return make


def run(table, root, data, **changes):
    return run_table("tiny", cells.cells(table.runs()), Settings(root, data_dir=data, device="cpu", **changes))


def gated(runs) -> int:
    return sum(bool(dense_gate.asked(run.measures, models.find(run.model))) for run in runs)


def test_every_cell_of_a_model_with_a_known_dense_value_is_gated():
    runs = [run for name, table in papers.TABLES.items() if not name.startswith("embedded.") for run in table.runs()]
    without = Counter(run.model for run in runs if not dense_gate.asked(run.measures, models.find(run.model)))
    assert set(without) == {run.model for run in runs if not CATALOGUE[run.model].dense}
    assert (len(runs), without.total()) == (2560, 222)


def test_every_model_with_a_dense_value_of_the_papers_has_one_in_the_catalogue():
    printed = {
        cell.model
        for paper in published.papers()
        for cell in published.read(paper)
        if cell.method == "Dense" and cell.metric in ("perplexity", "score") and cell.protocol and not cell.caveat
    }
    assert {name for name in printed if name in CATALOGUE and not CATALOGUE[name].dense} == {"chatglm-6b"}  # accuracies
    assert len(printed & set(CATALOGUE)) > 20


@pytest.mark.parametrize("name", [name for name, table in papers.TABLES.items() if name.startswith("embedded.")])
def test_embedded_cells_are_gated_by_embedded_text(name):
    runs = papers.find(name).runs()
    assert gated(runs) == len(runs)
    asked = {what for run in runs for what in dense_gate.asked(run.measures, models.find(run.model))}
    assert asked == {Perplexity("embedded/wiki", 512, 8)}


@pytest.mark.parametrize("key", sorted({key for model in CATALOGUE.values() for key in model.dense}))
def test_a_key_says_which_perplexity_is_meant(key):
    assert Perplexity.of(key).key == key


def test_a_key_of_another_form_is_refused():
    with pytest.raises(ValueError, match=r"'mean\.wanda@0shot' is not a protocol key of a perplexity"):
        Perplexity.of("mean.wanda@0shot")


def test_a_cell_is_gated_by_its_own_perplexities_first():
    llama = CATALOGUE["llama-7b"]
    own = (Perplexity("wikitext2/test", 128), Efficiency(), Perplexity("wikitext2/test", 128, 3))
    assert dense_gate.asked(own, llama) == [own[0]]
    assert dense_gate.asked(own[1:], llama) == [Perplexity("wikitext2/test", 2048)]
    assert dense_gate.asked(own, CATALOGUE["mistral-7b"]) == []


@needs_shared
def test_a_cell_without_perplexity_is_believed_of_a_good_model_alone(stories, data, tmp_path):
    assert run(stories(DENSE), tmp_path / "r", data).failed == []
    (record,) = records.load(tmp_path / "r", "tiny").values()
    assert record.dense_gate[KEY]["found"] == pytest.approx(DENSE, abs=0.01)
    assert KEY not in record.measures
    model, tokenizer = models.load(str(small.MODEL))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "mutilated")
    table = stories(DENSE, tmp_path / "mutilated")
    assert run(table, tmp_path / "r", data).failed == ["Magnitude 50 %"]
    (failure,) = records.load_failures(tmp_path / "r", "tiny").values()
    assert failure.message.startswith("The dense stories has perplexity ")
    assert KEY in failure.message
    assert run(table, tmp_path / "r", data, dense_gate=False).failed == []
    skipped = [record.dense_gate for record in records.load(tmp_path / "r", "tiny").values()]
    assert {KEY: {"skipped": "--no-dense-gate"}} in skipped


@needs_shared
def test_a_gate_whose_text_is_absent_says_so_and_how_to_go_without(stories, tmp_path):
    (tmp_path / "empty").mkdir()
    assert estimate.lacking(stories(DENSE).runs()[0], tmp_path / "empty")[0].startswith("ptb/test (not in")
    assert run(stories(DENSE), tmp_path / "r", tmp_path / "empty").failed == ["Magnitude 50 %"]
    (failure,) = records.load_failures(tmp_path / "r", "tiny").values()
    assert f"The dense gate of stories measures {KEY}, and ptb/test cannot be read: " in failure.message
    assert "run with --no-dense-gate" in failure.message
    assert run(stories(DENSE), tmp_path / "r", tmp_path / "empty", dense_gate=False).failed == []


def test_the_embedded_models_value_is_that_of_the_kept_dense_record():
    """Whose first eight windows, in bfloat16, are the gate's."""
    model, kept = CATALOGUE["smollm2-135m"], Path(__file__).parents[1] / "results"
    (dense,) = (one for one in records.load(kept, "embedded.gblm").values() if one.spec["method"] is None)
    windows = dense.measures["embedded/wiki@512[:128]"]["nll_per_window"][:8]
    (what,) = dense_gate.asked((), model)
    measured = {what.key: {"perplexity": math.exp(statistics.fmean(windows))}}
    found = dense_gate.check(what, model, measured)
    assert found["found"] == pytest.approx(found["expected"], rel=2e-3)
