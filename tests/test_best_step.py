"""Retraining that ends with the best of its steps by text held out: which step it is, kills, homes, cells, refusals."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
import small_table as small
import torch
from conftest import needs_shared, tiny
from transformers import AutoModelForCausalLM

import pruners
from experiments import cells, estimate
from experiments.batch import run_table
from experiments.recovery import POST_TRAINING, Documents, Instructions, Retraining, label, work_tokens
from experiments.settings import Settings
from experiments.spec import Windows
from experiments.store import records
from experiments.store.described import describe
from pruners.retrain import Diverged, LoRA, MaskLoRA, ScaleLoRA, Trainable, finetune, held_out_loss
from pruners.retrain.held_out import NotFiniteError
from pruners.weights import homes, opening, sources
from tests import families

SMALL = Trainable(biases=True, norms=True)
KINDS = {
    "biases and norms": SMALL,
    "MaskLoRA, norms and head": Trainable(norms=True, head=True, adapters=MaskLoRA(rank=4)),
    "ScaleLoRA": Trainable(adapters=ScaleLoRA(rank=4)),
    "LoRA that drops out": Trainable(adapters=LoRA(rank=2, merge=True)),
    "embeddings": Trainable(embeddings=True),
    "full": Trainable.full(),
}
ASKED = {"steps": 20, "learning_rate": 0.2, "batch_size": 3, "warmup": 0, "micro_batch_size": 3}


def pruned(kind="llama grouped-query"):
    model = tiny(kind)
    pruners.prune(model, pruners.Magnitude(0.5))
    return model


def held_out():
    return torch.randint(3, 96, (5, 16), generator=torch.Generator().manual_seed(7))


def bits(model):
    return [p.detach().clone() for p in model.parameters()]


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(bits(one), bits(other), strict=True))


@pytest.mark.parametrize("what", KINDS)
def test_the_model_is_that_of_the_step_whose_loss_was_lowest(kind, what, windows):
    model, losses, models = pruned(kind), [], {}
    told = finetune(model, KINDS[what], windows, held_out=held_out(), check_every=6, **ASKED)
    assert [step for step, _ in told.checked] == [6, 12, 18, 20]
    for step, _ in told.checked:  # a run that stopped there
        models[step] = pruned(kind)
        finetune(models[step], KINDS[what], windows, stop=step, **ASKED)
        losses.append(held_out_loss(models[step], held_out(), batch_size=3)[0])
    assert [loss for _, loss in told.checked] == pytest.approx(losses, rel=1e-5)  # adapters merge with rounding
    assert told.kept_step == min(told.checked, key=lambda one: one[1])[0]
    assert same(model, models[told.kept_step])
    assert len(told.losses) == 20  # all steps are taken


def test_the_best_step_is_the_first_one_the_last_one_or_one_between(windows):
    """So that the tests here see every case."""
    steps = {
        finetune(pruned(), what, windows, held_out=held_out(), check_every=6, **ASKED).kept_step
        for what in KINDS.values()
    }
    assert steps >= {6, 12, 20}


def test_looking_at_the_loss_moves_no_step(kind, windows):
    plain, looked = pruned(kind), pruned(kind)
    what = Trainable(adapters=LoRA(rank=2, merge=True))  # whose draws evaluation must not move
    first = finetune(plain, what, windows, **ASKED)
    second = finetune(looked, what, windows, held_out=held_out(), check_every=1, **ASKED)
    assert first.losses == second.losses
    assert first.kept_step is None
    assert not {"checked", "kept_step"} & first.to_dict().keys()


@pytest.mark.parametrize("dies_after", [5, 7, 13, 19])
@pytest.mark.parametrize("what", ["biases and norms", "full"])
def test_a_killed_run_ends_with_the_same_bits_and_the_same_choice(kind, what, dies_after, windows, tmp_path):
    asked = {**ASKED, "held_out": held_out(), "check_every": 3, "save_every": 5}
    whole, again = pruned(kind), pruned(kind)
    expected = finetune(whole, KINDS[what], windows, **asked)

    def kill(done: int, total: int) -> None:
        if done == dies_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(pruned(kind), KINDS[what], windows, folder=tmp_path, progress=kill, **asked)
    told = finetune(again, KINDS[what], windows, folder=tmp_path, **asked)
    assert told.resumed_at == (dies_after - 1) // 5 * 5
    assert (told.checked, told.kept_step, told.losses) == (expected.checked, expected.kept_step, expected.losses)
    assert same(whole, again)
    finished = pruned(kind)  # from the state that a finished run leaves
    assert finetune(finished, KINDS[what], windows, folder=tmp_path, **asked).checked == expected.checked
    assert same(whole, finished)


def test_runs_of_one_schedule_that_stop_apart_choose_as_if_alone(windows, tmp_path):
    asked = {**ASKED, "held_out": held_out(), "check_every": 6, "save_every": 4}
    alone = {stop: finetune(pruned(), SMALL, windows, stop=stop, **asked) for stop in (6, 8, 20)}
    for stop in (8, 6, 20):  # the second finds a state that is further
        model, whole = pruned(), pruned()
        told = finetune(model, SMALL, windows, stop=stop, folder=tmp_path, **asked)
        finetune(whole, SMALL, windows, stop=stop, **asked)
        assert (told.checked, told.kept_step) == (alone[stop].checked, alone[stop].kept_step)
        assert same(model, whole)
    assert [step for step, _ in alone[8].checked] == [6, 8]  # and 8 is no candidate of the longer one
    assert [step for step, _ in alone[20].checked] == [6, 12, 18, 20]


def test_a_state_of_another_choice_is_not_gone_on_with(windows, tmp_path):
    asked = {**ASKED, "folder": tmp_path}
    finetune(pruned(), SMALL, windows, held_out=held_out(), check_every=6, **asked)
    for other in ({}, {"held_out": held_out(), "check_every": 5}, {"held_out": held_out()[:4], "check_every": 6}):
        with pytest.raises(ValueError, match="belongs to another run"):
            finetune(pruned(), SMALL, windows, **other, **asked)


@pytest.mark.parametrize(("family", "what"), [("llama", "MaskLoRA, norms and head"), ("opt", "embeddings"),
                                              ("bloom", "biases and norms"), ("chatglm", "biases and norms"),
                                              ("gpt2", "biases and norms")])  # fmt: skip
def test_weights_away_from_home_give_the_same_bits(family, what, tmp_path):
    families.tiny(family).save_pretrained(tmp_path)
    texts, made = families.windows(family, 6), []
    for home in ("device", "host", "disk"):
        if home == "disk":
            model = opening.open_folder(tmp_path)
        else:
            model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").eval()
        if home == "host":
            homes.settle(model, sources.Memory(model), "cpu")
        pruners.prune(model, pruners.Magnitude(0.5))
        told = finetune(model, KINDS[what], texts[:4], steps=6, learning_rate=5e-2, batch_size=2, micro_batch_size=1,
                        warmup=0, held_out=texts[4:], check_every=2)  # fmt: skip
        weights = {name: p.detach().clone() for part in homes.each(model) for name, p in part.items()}
        made.append((told.losses, told.checked, told.kept_step, weights))
    for *report, weights in made[1:]:
        assert report == list(made[0][:3])
        assert all(torch.equal(weights[name], p) for name, p in made[0][3].items())


def test_a_held_out_loss_that_is_not_finite_stops_and_leaves_the_last_state(windows, monkeypatch):
    module, asked = sys.modules["pruners.retrain.finetune"], {**ASKED, "save_every": 2, "check_every": 4}
    model, there = pruned(), pruned()
    finetune(there, SMALL, windows, stop=6, **ASKED)
    plain, losses = module.of_batches, iter((None, math.inf))

    def overflowing(*args, **options):
        if next(losses) is None:
            return plain(*args, **options)
        raise NotFiniteError("The held-out loss is inf after 3 of 5 examples: the model overflows.")

    monkeypatch.setattr(module, "of_batches", overflowing)
    said = "Retraining diverged after step 8 of 20: the held-out loss is inf after 3 of 5 examples, learning rate 0.2"
    with pytest.raises(Diverged, match=re.escape(f"{said}. The model is restored to its state after step 6")):
        finetune(model, SMALL, windows, held_out=held_out(), **asked)
    assert same(model, there)


TEXT = Windows("c4/train", count=4, length=32, sampling="first")
OTHER = Windows("ptb/test", count=3, length=32, sampling="first")
PLAIN = Retraining(Trainable(norms=True), TEXT, steps=8, learning_rate=3e-2)
BEST = replace(PLAIN, keep="best", check_every=3, held_out=OTHER)


def test_what_does_not_go_together_is_refused():
    for given, said in (
        ({"keep": "best"}, "keep='best' goes by text held out; give held_out= windows"),
        ({"keep": "best", "text": Instructions("alpaca/train", held_out=0)}, "keep='best' goes by text held out"),
        ({"keep": "best", "text": Documents("c4/train", 4, 32)}, "keep='best' goes by text held out"),
        ({"held_out": OTHER}, "held_out= is what keep='best' goes by; give both, or none"),
        ({"keep": "first"}, r"Unknown keep 'first'.*Known: best, last"),
        ({"keep": "best", "held_out": OTHER, "check_every": 0}, "check_every is a whole number, 1 or more"),
    ):
        with pytest.raises((ValueError, TypeError), match=said):
            replace(PLAIN, **given)


def test_ids_are_those_of_before_where_the_last_step_is_kept():
    assert not {"keep", "check_every", "held_out"} & describe(PLAIN).keys()
    assert describe(replace(PLAIN, check_every=7)) == describe(PLAIN)  # which nobody reads
    told = describe(BEST)
    assert (told["keep"], told["check_every"], told["held_out"]["corpus"]) == ("best", 3, "ptb/test")
    assert describe(replace(POST_TRAINING, keep="best"))["check_every"] == 200


@needs_shared
def test_labels_and_estimates_know_of_it():
    assert label(BEST) == " + norms, best of every 3 steps"
    assert work_tokens(BEST, None) == work_tokens(PLAIN, None) + 3 * 3 * 32
    more = work_tokens(replace(POST_TRAINING, keep="best"), None) - work_tokens(POST_TRAINING, None)
    assert more == 8 * 2000 * 256
    run = small.retrained().runs()[0]
    assert estimate.corpora_of(replace(run, recovery=BEST)).count("ptb/test") == 1


@needs_shared
def test_a_cell_keeps_its_best_step_and_says_which(tmp_path):
    data = small.data(tmp_path / "data")
    run = small.retrained().runs()[0]
    found = cells.cells([replace(run, recovery=recovery) for recovery in (PLAIN, BEST)])
    assert len({cell.id for cell in found}) == 2
    told = {}
    for home in ("device", "disk"):
        settings = Settings(tmp_path / home, device="cpu", data_dir=data, weights=home)
        assert not run_table("tiny", found, settings).failed
        last, best = (records.find(tmp_path / home, "tiny", cell.id) for cell in found)
        assert "checked" not in last.achieved["recovery"]
        assert last.achieved["recovery"]["losses"] == best.achieved["recovery"]["losses"]
        told[home] = (best.achieved["recovery"]["checked"], best.achieved["recovery"]["kept_step"], best.measures)
    assert told["disk"][:2] == told["device"][:2]
    checked, kept_step, _ = told["device"]
    assert [step for step, _ in checked] == [3, 6, 8]
    assert kept_step == min(checked, key=lambda one: one[1])[0]


@needs_shared
def test_post_training_goes_by_the_records_that_it_holds_out(tmp_path):
    """What it keeps has the lowest of the losses that it tells, and the loss after training is that one."""
    text = Instructions("alpaca/train", length=128, held_out=6)
    recovery = replace(PLAIN, text=text, batch_size=2, steps=9, keep="best", check_every=2)
    (cell,) = cells.cells([replace(small.retrained().runs()[0], recovery=recovery)])
    assert not run_table("tiny", [cell], Settings(tmp_path, device="cpu", data_dir=small.SHARED / "data")).failed
    told = records.find(tmp_path, "tiny", cell.id).achieved["recovery"]
    losses = dict(told["checked"])
    assert told["held_out"]["after"]["loss"] == pytest.approx(min(losses.values()), rel=1e-5)
    assert told["held_out"]["after"]["loss"] < told["held_out"]["before"]["loss"]
    assert all(before < after for before, after in pairwise(losses))
