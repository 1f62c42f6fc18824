"""A model that consecutive cells share is loaded once and given to each as it was loaded."""

from __future__ import annotations

import copy

import pytest
import torch

import pruners
from experiments import cells, models
from experiments.batch import run_table
from experiments.measures.asked import Costs
from experiments.models import kept
from experiments.settings import Settings
from experiments.store import records
from tests import small_table as small

pytestmark = pytest.mark.skipif(not small.MODEL.exists(), reason="../shared/data is absent")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small.data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def loads(monkeypatch):
    """What is loaded while a test runs."""
    found, load = [], models.load
    monkeypatch.setattr(models, "load", lambda *args, **options: (found.append(args[:2]), load(*args, **options))[1])
    yield found
    kept.forget()


def everything(model):
    """Every tensor that a forward pass reads, and what the configuration says."""
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}, model.config.to_dict()


def test_each_gets_the_bits_that_were_loaded(loads):
    what, load = {"model": "stories"}, lambda: models.load(str(small.MODEL), "float32")
    first, _ = kept.load(what, load)
    tensors, told = everything(first)
    tokens = torch.arange(1, 40)[None]
    logits = first(tokens).logits
    for _ in range(4):
        model, tokenizer = kept.load(what, load)
        assert everything(model)[1] == told
        assert kept.nbytes() == sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        for name, tensor in everything(model)[0].items():
            assert torch.equal(tensor, tensors[name]), name
        assert model.lm_head.weight is model.model.embed_tokens.weight
        assert torch.equal(model(tokens).logits, logits)
        assert not model.training
        pruners.prune(model, pruners.Flap(ratio=0.5), torch.arange(64).view(2, 32))
        model.config.rms_norm_eps = 1.0
        tokenizer.add_tokens("<new>")
    assert len(loads) == 2  # whether a model is asked for again is known the second time
    kept.forget()
    assert kept.nbytes() == 0


def test_another_model_takes_its_place_and_a_large_one_is_not_kept(loads, monkeypatch):
    load = lambda: models.load(str(small.MODEL), "float32")  # noqa: E731
    for name in ("one", "one", "one", "two", "one", "one"):
        kept.load({"model": name}, load)
    assert len(loads) == 5
    monkeypatch.setattr(kept, "SHARE", 0.0)
    for _ in range(3):
        kept.load({"model": "large"}, load)
    assert len(loads) == 8


def test_the_records_of_a_table_are_those_of_its_cells_run_alone(tmp_path, data, loads):
    chosen = cells.cells(small.table().runs())
    assert not run_table("tiny", chosen, Settings(tmp_path / "together", data_dir=data)).failed
    assert len(loads) == 2
    for cell in chosen:
        assert not run_table("tiny", [cell], Settings(tmp_path / "alone", data_dir=data)).failed
    assert len(loads) == 2 + len(chosen)  # nothing is left of a table that is done
    together, alone = (records.load(tmp_path / name, "tiny") for name in ("together", "alone"))
    for cell in chosen:
        one, other = together[cell.id], alone[cell.id]
        assert (one.measures, without_seconds(one.achieved)) == (other.measures, without_seconds(other.achieved))


def without_seconds(achieved):
    return {key: value for key, value in copy.deepcopy(achieved).items() if "seconds" not in key}


def test_a_cell_that_tells_its_memory_shares_none(tmp_path, data, loads):
    chosen = cells.cells(small.table((None, *small.METHODS[1:3]), measures=(small.PPL, Costs())).runs())
    assert not run_table("tiny", chosen, Settings(tmp_path, data_dir=data)).failed
    assert len(loads) == len(chosen)
