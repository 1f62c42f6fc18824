"""Retraining with weights away from home: to the bit the numbers of a model in place, and the way back after a kill."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import small_table as small
import torch
from conftest import needs_shared
from test_homes import at_home

import pruners
from experiments import cells
from experiments.batch import run_table
from experiments.settings import Settings
from experiments.store import records
from pruners.retrain import (
    LoRA,
    LoRAPrune,
    MaskLoRA,
    Reconstruction,
    ScaleLoRA,
    Trainable,
    choose_rate,
    finetune,
    held_out_loss,
    trainable,
)
from pruners.weights import homes, opening
from tests import families

SETS = {
    "norms, biases": Trainable(norms=True, biases=True),
    "embeddings": Trainable(embeddings=True),
    "MaskLoRA, head, norms": Trainable(adapters=MaskLoRA(rank=2), head=True, norms=True),
    "LoRA that drops out": Trainable(adapters=LoRA(rank=2, merge=True)),
    "LoRA that stays": Trainable(adapters=LoRA(rank=2)),
    "ScaleLoRA, embeddings": Trainable(adapters=ScaleLoRA(rank=2), embeddings=True),
    "LoRA-Prune": Trainable(adapters=LoRAPrune(rank=2)),
}
# Every set and every family, each family with the sets that meet something of its own: ties, dropout, marks, no biases.
PAIRS = [
    ("llama", "MaskLoRA, head, norms"),
    ("llama", "LoRA that drops out"),
    ("opt", "norms, biases"),
    ("opt", "ScaleLoRA, embeddings"),
    ("bloom", "LoRA-Prune"),
    ("bloom", "embeddings"),
    ("falcon: multi-query", "LoRA that stays"),
    ("falcon: multi-query", "norms, biases"),
    ("chatglm", "MaskLoRA, head, norms"),
    ("chatglm", "norms, biases"),
    ("gpt2", "norms, biases"),
    ("gpt2", "embeddings"),
    ("mixtral", "norms, biases"),
    ("qwen3_moe", "embeddings"),
]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    """A saved model that drops out where its family does."""
    model = families.tiny(request.param)
    for name in ("dropout", "resid_pdrop", "hidden_dropout"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.1)
    place = tmp_path_factory.mktemp("model")
    model.save_pretrained(place)
    return request.param, place


def opened(home, place):
    model = at_home(home, place)
    pruners.prune(model, pruners.Magnitude(sparsity=0.5))
    return model


def records_of(kind):
    rows = families.windows(kind, 6)
    if kind == "chatglm":  # whose marks stand in front of every text
        return rows
    return [{"input_ids": row[:length]} for row, length in zip(rows, (16, 5, 9, 12, 7, 16), strict=True)]


def weights_of(model):
    return {name: p.detach().clone() for part in homes.each(model) for name, p in part.items()}


def trained(home, kind, place, what, **more):
    model = opened(home, place)
    settings = {"steps": 3, "learning_rate": 1e-2, "batch_size": 4, "micro_batch_size": 2, "warmup": 0}
    told = finetune(model, what, records_of(kind), **{**settings, **more}).to_dict()
    return model, {**told, "seconds": 0, "resumed_seconds": 0, "resumed_at": 0}


@pytest.mark.parametrize(("folder", "what"), PAIRS, indirect=["folder"])
def test_losses_and_weights_are_those_of_a_model_in_place(folder, what):
    kind, place = folder
    plain, expected = trained("device", kind, place, SETS[what])
    one, loss = weights_of(plain), held_out_loss(plain, records_of(kind), batch_size=2)
    for home in ("host", "disk"):
        model, found = trained(home, kind, place, SETS[what])
        assert found == expected
        other = weights_of(model)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert held_out_loss(model, records_of(kind), batch_size=2) == loss
        assert homes.of(model).staying == {p for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("folder", ["opt", "chatglm"], indirect=True)
def test_a_step_reads_the_weights_twice(folder):
    kind, place = folder
    counts = []
    for steps in (2, 5):
        model, _ = trained("disk", kind, place, SETS["norms, biases"], steps=steps)
        counts.append(homes.of(model).sweeps)
    assert counts[1] - counts[0] == 2 * (5 - 2)


@pytest.mark.parametrize("folder", ["opt", "chatglm", "gpt2", "mixtral"], indirect=True)
def test_a_run_that_stopped_goes_on_to_the_same_bits(folder, tmp_path):
    kind, place = folder
    what = SETS["norms, biases"]
    whole, expected = trained("disk", kind, place, what)
    trained("disk", kind, place, what, folder=tmp_path, save_every=1, stop=2)
    model, found = trained("disk", kind, place, what, folder=tmp_path, save_every=1)
    assert found["losses"] == expected["losses"]
    one, other = weights_of(whole), weights_of(model)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_all_weights_away_from_home_are_refused_with_the_figure(tmp_path):
    families.tiny("llama").save_pretrained(tmp_path)
    model = opening.open_folder(tmp_path)
    before = weights_of(model)
    with pytest.raises(
        ValueError, match=r"Training all weights needs them, .* on the device, 0\.0 GB, and they are offloaded"
    ):
        finetune(model, Trainable.full(), families.windows("llama", 4), steps=1, learning_rate=1e-3)
    assert all(torch.equal(before[name], p) for name, p in weights_of(model).items())


def adapted():
    recovery = replace(
        small.retrained().runs()[0].recovery, trainable=Trainable(norms=True, adapters=MaskLoRA(rank=4)), batch_size=4
    )
    return [replace(small.retrained().runs()[0], recovery=recovery)]


@needs_shared
def test_a_cell_that_dies_while_it_merges_is_made_again_from_what_was_pruned(tmp_path, monkeypatch):
    data = small.data(tmp_path / "data")
    chosen = cells.cells(adapted())
    made, merge = {}, trainable.Attached.merge
    for home in ("device", "disk"):
        if home == "disk":

            def dying(self):
                merge(self)  # some blocks' merged weights lie on the disk by now
                raise SystemExit

            monkeypatch.setattr(trainable.Attached, "merge", dying)
            with pytest.raises(SystemExit):
                run_table("tiny", chosen, Settings(tmp_path / home, device="cpu", data_dir=data, weights=home))
            monkeypatch.setattr(trainable.Attached, "merge", merge)
        assert not run_table(
            "tiny", chosen, Settings(tmp_path / home, device="cpu", data_dir=data, weights=home)
        ).failed
        (record,) = records.load(tmp_path / home, "tiny").values()
        made[home] = json.loads(
            json.dumps([record.achieved, record.measures]), object_hook=lambda told: without_times(told)
        )
    assert made["disk"] == made["device"]


def without_times(told):
    return {name: value for name, value in told.items() if name not in ("seconds", "resumed_seconds", "resumed_at")}


@pytest.mark.parametrize(
    ("folder", "home"),
    [("llama", "host"), ("opt", "disk"), ("gpt2", "disk"), ("mixtral", "disk")],
    indirect=["folder"],
)
def test_a_rate_is_chosen_as_in_place_and_nothing_stays_of_the_tries(folder, home):
    kind, place = folder
    what = SETS["norms, biases" if kind in ("gpt2", "mixtral") else "MaskLoRA, head, norms"]
    made = []
    for where in ("device", home):
        model = opened(where, place)
        before, texts = weights_of(model), records_of(kind)

        def attempt(rate, model=model, texts=texts):
            finetune(model, what, texts[:4], steps=2, learning_rate=rate)
            rebuilt = Reconstruction(Trainable(norms=True), steps=2, learning_rate=rate)
            pruners.prune(model, pruners.Wanda(0.6), families.windows(kind, 4), reconstruct=rebuilt)

        made.append(choose_rate(model, attempt, (1e-4, 1e-2, 1e-1), texts[4:]))
        assert all(torch.equal(before[name], p) for name, p in weights_of(model).items())
        assert list(before) == [name for name, _ in model.named_parameters()]
    assert made[0] == made[1]
    assert homes.of(model).staying == set()
