"""The training loop: what it keeps, that it resumes exactly, and that it says when it cannot go on."""

from __future__ import annotations

import math
from itertools import cycle

import pytest
import safetensors.torch
import torch
from conftest import tiny
from small_table import full_disk
from torch.nn import functional as F
from torch.testing import assert_close

import pruners
from pruners.retrain import Diverged, LoRA, LoRAPrune, MaskLoRA, ScaleLoRA, Trainable, finetune, held_out_loss, state
from pruners.retrain.batches import Batches
from pruners.retrain.schedule import Schedule, precision_for
from pruners.run.ranks import RankLostError, Ranks, explained
from pruners.weights import storage

MASKED = {
    "biases and norms": Trainable(biases=True, norms=True),
    "MaskLoRA, norms and head": Trainable(norms=True, head=True, adapters=MaskLoRA(rank=4)),
    "ScaleLoRA": Trainable(adapters=ScaleLoRA(rank=4)),
    "LoRA-Prune": Trainable(adapters=LoRAPrune(rank=4)),
    "embeddings": Trainable(embeddings=True),
    "full": Trainable.full(),
}
PEFT = Trainable(biases=True, norms=True, adapters=MaskLoRA(rank=4))


def pruned(kind: str, **method: object):
    model = tiny(kind)
    pruners.prune(model, pruners.Magnitude(**(method or {"sparsity": 0.5})))
    return model


def bits(model) -> list[torch.Tensor]:
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize(("what", "method"), list(zip(MASKED, cycle(({"sparsity": 0.5}, {"pattern": "2:4"})))))
def test_the_loss_falls_and_sparsity_stays(kind, method, what, windows):
    model = pruned(kind, **method)
    gone = {name: p == 0 for name, p in model.named_parameters() if "_proj" in name and p.ndim == 2}
    report = finetune(model, MASKED[what], windows, steps=50, learning_rate=5e-3, batch_size=3)
    assert sum(report.losses[-5:]) < sum(report.losses[:5])
    assert report.sparsity == report.sparsity_before
    assert all((model.get_parameter(name)[zero] == 0).all() for name, zero in gone.items())


def test_the_step_is_that_of_plain_adamw(windows):
    model, reference = tiny("llama multi-head"), tiny("llama multi-head")
    finetune(model, Trainable.full(), windows, steps=3, learning_rate=1e-3, batch_size=6, warmup=0)
    optimizer = torch.optim.AdamW(reference.parameters(), weight_decay=0.0)
    for step in range(3):
        optimizer.param_groups[0]["lr"] = 1e-3 * (3 - step) / 3
        reference(input_ids=windows, labels=windows).loss.backward()
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert_close(bits(model), bits(reference))


def test_warm_up_and_decay_are_linear():
    rates = [Schedule(10, 1.0, warmup=0.2).rate(step) for step in range(10)]
    assert_close(rates, [0.0, 0.5, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    assert Schedule(10, 1.0, warmup=4).rate(2) == 0.5


def test_every_example_comes_once_before_any_comes_again(windows):
    batches = Batches(windows, 4, seed=0, config=tiny("opt").config)
    seen = [index for step in range(3) for index in batches.indices(step)]
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    assert batches.indices(1) == seen[4:8]


def test_examples_are_read_once_and_kept_as_they_were():
    given = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    batches = Batches(iter(given), 2, seed=0, config=tiny("opt").config)
    kept = [(tokens.tolist(), labels.tolist()) for tokens, labels in batches.examples]
    assert kept == [([1, 2, 3], [1, 2, 3]), ([4, 5], [-100, 5])]
    assert {tensor.dtype for pair in batches.examples for tensor in pair} == {torch.int64}
    # of these two since the first state that was kept by it
    assert batches.digest() == "0f104da2e0d1b3874a0b3a0e1567fab953b6be5552c0d7774034863f517b26e3"


@pytest.mark.parametrize(
    "trainable",
    [PEFT, Trainable.full(), Trainable(adapters=LoRA(rank=2, merge=True))],
    ids=["MaskLoRA", "full", "LoRA"],
)
def test_a_killed_run_ends_with_the_same_bits(kind, trainable, windows, tmp_path):
    asked = {"steps": 12, "learning_rate": 1e-3, "seed": 3, "save_every": 5}
    whole, broken = pruned(kind), pruned(kind)
    finetune(whole, trainable, windows, **asked)

    def kill(done: int, total: int) -> None:
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(broken, trainable, windows, folder=tmp_path, progress=kill, **asked)
    again = pruned(kind)
    report = finetune(again, trainable, windows, folder=tmp_path, **asked)
    assert report.resumed_at == 5
    assert len(report.losses) == 12
    assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(again), strict=True))


def test_a_checkpoint_of_another_run_is_refused(windows, tmp_path):
    asked = {"steps": 2, "learning_rate": 1e-3, "folder": tmp_path}
    finetune(pruned("opt"), PEFT, windows, **asked)
    swapped = pruned("opt")
    norm = swapped.model.decoder.final_layer_norm.weight.data
    norm[:2] = norm[:2].flip(0)  # the same numbers in other places
    for model, trainable in ((tiny("opt"), PEFT), (pruned("opt"), Trainable(norms=True)), (swapped, PEFT)):
        with pytest.raises(ValueError, match="belongs to another run"):
            finetune(model, trainable, windows, **asked)


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b[:-9] + b"\0" + b[-8:], lambda b: b"[" * 99_999])
def test_a_damaged_checkpoint_is_reported_and_begun_again(windows, tmp_path, caplog, damage):
    asked = {"steps": 2, "learning_rate": 1e-3}
    models = [pruned("opt"), pruned("opt")]
    whole = finetune(models[0], PEFT, windows, folder=tmp_path, **asked)
    file = tmp_path / "retrain.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    again = finetune(models[1], PEFT, windows, folder=tmp_path, **asked)
    assert (again.resumed_at, again.losses) == (0, whole.losses)
    assert str(file) in caplog.text
    assert state.load(file, mark := storage.read_about(file)["fingerprint"]) is not None
    assert state.step_in(file, mark) == 2


def test_a_disk_that_refuses_the_checkpoint_stops_no_training(windows, tmp_path, caplog):
    with full_disk():
        report = finetune(pruned("opt"), PEFT, windows, steps=2, learning_rate=1e-3, folder=tmp_path)
    assert len(report.losses) == 2
    assert "retrain.safetensors: file too large" in caplog.text
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_holds_trained_tensors_and_their_moments_only(windows, tmp_path):
    model = pruned("opt")
    report = finetune(model, Trainable(biases=True), windows, steps=2, learning_rate=1e-3, folder=tmp_path)
    assert (tmp_path / "retrain.safetensors").stat().st_size < 3 * 4 * report.trained + 20_000


def test_accumulating_changes_no_loss(windows):
    asked = {"steps": 4, "learning_rate": 1e-3, "batch_size": 6}
    losses = [finetune(pruned("llama multi-head"), PEFT, windows, micro_batch_size=size, **asked).losses
              for size in (6, 4, 1)]  # fmt: skip
    assert_close(losses[1], losses[0])
    assert_close(losses[2], losses[0])


def test_checkpointing_changes_no_loss(windows):
    asked = {"steps": 4, "learning_rate": 1e-3}
    plain, checkpointed = (finetune(pruned("llama grouped-query"), PEFT, windows, checkpointing=on, **asked).losses
                           for on in (False, True))  # fmt: skip
    assert_close(plain, checkpointed)


def test_padding_and_masked_labels_carry_no_loss(windows):
    model = pruned("llama grouped-query")
    long, short = windows[0].tolist(), windows[1, :9].tolist()
    records = [{"input_ids": long, "labels": [-100] * 10 + long[10:]}, {"input_ids": short}]
    with torch.no_grad():
        by_hand = [
            F.cross_entropy(model(torch.tensor([long])).logits[0, 9:-1], torch.tensor(long[10:]), reduction="sum"),
            F.cross_entropy(model(torch.tensor([short])).logits[0, :-1], torch.tensor(short[1:]), reduction="sum"),
        ]
    report = finetune(model, PEFT, records, steps=1, learning_rate=1e-3)
    assert report.losses[0] == pytest.approx(float(sum(by_hand)) / (6 + 8), rel=1e-5)


def test_a_learning_rate_that_diverges_is_stopped_with_the_last_good_state(kind, windows):
    model = pruned(kind)
    before = bits(model)
    with pytest.raises(Diverged, match=r"restored to its state after step 0; use a lower learning rate"):
        finetune(model, Trainable.full(), windows, steps=60, learning_rate=50.0)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(model), strict=True))


def test_a_divergence_after_resuming_leaves_what_was_resumed_from(windows, tmp_path):
    asked = {"steps": 60, "learning_rate": 50.0, "folder": tmp_path}
    early, late = pruned("opt"), pruned("opt")
    finetune(early, Trainable.full(), windows, stop=5, **asked)
    with pytest.raises(Diverged, match="restored to its state after step 5;"):
        finetune(late, Trainable.full(), windows, **asked)
    assert all(torch.equal(a, b) for a, b in zip(bits(early), bits(late), strict=True))


def test_a_loss_that_is_not_finite_stops(windows):
    model = tiny("llama multi-head")
    model.lm_head.weight.data.fill_(math.inf)
    with pytest.raises(Diverged, match="step 1 of 5: loss nan"):
        finetune(model, Trainable(norms=True), windows, steps=5, learning_rate=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_model_trains_and_stays_half_precision(kind, dtype, windows):
    model = pruned(kind).to(dtype)
    report = finetune(model, PEFT, windows, steps=30, learning_rate=5e-3)
    assert sum(report.losses[-5:]) < sum(report.losses[:5])
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert report.merging == pytest.approx(report.merging[::-1], rel=2e-2)
    with pytest.raises(ValueError, match="cannot train in float32"):
        finetune(model, PEFT, windows, steps=1, learning_rate=1e-3, precision="float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", [{"adapters": LoRA(merge=True)}, {"embeddings": True}], ids=["LoRA", "embeddings"])
def test_layer_norms_that_are_not_trained_take_what_half_precision_adds_up_to(trained, dtype, windows):
    model = pruned("opt").to(dtype)
    report = finetune(model, Trainable(**trained), windows, steps=10, learning_rate=5e-3)
    assert sum(report.losses[-3:]) < sum(report.losses[:3])
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_bfloat16_where_the_device_lacks_it_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    cuda = torch.device("cuda")
    for asked, dtype in (("bfloat16", torch.float32), (None, torch.float16)):
        with pytest.raises(ValueError, match="cuda has no bfloat16; load the model in float32"):
            precision_for(asked, dtype, cuda)
    assert precision_for(None, torch.float32, cuda) is None


def test_every_step_is_told(windows):
    told = []
    report = finetune(pruned("opt"), PEFT, windows, steps=3, learning_rate=1e-3, watch=lambda *step: told.append(step))
    assert [(step, loss) for step, loss, _ in told] == list(enumerate(report.losses, start=1))
    assert told[-1][2] == pytest.approx(3 * 2 * 16 / report.seconds)


def test_the_global_generator_is_left_alone(windows):
    state = torch.get_rng_state()
    finetune(pruned("opt"), Trainable(adapters=LoRA(rank=2)), windows, steps=2, learning_rate=1e-3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        (torch.empty(0, 16, dtype=torch.long), "at least one example"),
        (torch.zeros(1, 1, dtype=torch.long), "too short"),
        (torch.zeros(1, 65, dtype=torch.long), "longer than the model's context length, 64"),
        (torch.full((1, 8), 96), "outside the model's vocabulary of 96"),
        ([{"input_ids": [3, 4, 5], "labels": [-100] * 3}], "tokens is predicted"),
        ([{"input_ids": [3, 4, 5], "labels": [3]}], "3 tokens and 1 labels"),
    ],
)
def test_examples_that_do_not_fit_are_refused(examples, says):
    with pytest.raises(ValueError, match=says):
        finetune(tiny("opt"), PEFT, examples, steps=1, learning_rate=1e-3)


def test_a_batch_that_processes_cannot_share_is_refused():
    with pytest.raises(ValueError, match="multiple of 2"):
        Ranks(0, 2).share([1, 2, 3])
    assert Ranks(1, 2).share([1, 2, 3, 4]) == [2, 4]


def test_the_held_out_loss_weighs_tokens_not_batches(kind, windows):
    model = pruned(kind).train()
    records = [{"input_ids": row[:length].tolist()} for row, length in zip(windows, (16, 3, 9, 16, 5, 2), strict=True)]
    records[0]["labels"] = [-100] * 12 + records[0]["input_ids"][12:]
    summed, tokens = 0.0, 0
    for record in records:
        ids, labels = torch.tensor([record["input_ids"]]), torch.tensor(record.get("labels", record["input_ids"]))
        with torch.no_grad():
            logits = model.eval()(ids).logits[0, :-1].double()
        summed += float(F.cross_entropy(logits, labels[1:], reduction="sum"))
        tokens += int((labels[1:] != -100).sum())
    model.train()
    for batch_size in (1, 2, 6):
        loss, counted = held_out_loss(model, records, batch_size=batch_size)
        assert (loss, counted) == (pytest.approx(summed / tokens, rel=1e-5), tokens)
    assert model.training
    assert held_out_loss(model, records) == held_out_loss(model, records)


def test_the_held_out_loss_of_a_model_whose_adapters_stay(kind, windows):
    model = pruned(kind)
    finetune(model, Trainable(adapters=LoRA(rank=2)), windows, steps=8, learning_rate=1e-2)
    with torch.no_grad():
        expected = model(input_ids=windows, labels=windows).loss
    assert held_out_loss(model, windows)[0] == pytest.approx(float(expected), rel=1e-5)


def test_a_held_out_loss_that_is_not_finite_is_refused_at_once(windows):
    model, batches = pruned("opt"), []
    model.lm_head.weight.data.fill_(math.inf)
    with pytest.raises(ValueError, match="held-out loss is nan after 2 of 6 examples: the model overflows"):
        held_out_loss(model, windows, batch_size=2, progress=lambda done, total: batches.append(done))
    assert batches == []


def test_a_lost_peer_is_told_with_what_torch_said():
    with pytest.raises(RankLostError, match=r"not answer \(Closed by peer \[::1\]:7\); see its output"), explained():
        raise RuntimeError("[gloo/pair.cc:12] Closed by peer [::1]:7. This is typical.\nat tcp.cc:12")
    with pytest.raises(RuntimeError, match="sizes differ"), explained():
        raise RuntimeError("sizes differ")


def test_a_schedule_can_be_left_early_and_gone_on_with(kind, windows, tmp_path):
    asked = {"steps": 12, "learning_rate": 1e-3, "seed": 3, "save_every": 3}
    whole, early, late = pruned(kind), pruned(kind), pruned(kind)
    losses = finetune(whole, PEFT, windows, **asked).losses
    assert finetune(early, PEFT, windows, stop=5, folder=tmp_path, **asked).losses == losses[:5]
    report = finetune(late, PEFT, windows, stop=12, folder=tmp_path, **asked)
    assert (report.resumed_at, report.losses) == (5, losses)
    assert all(torch.equal(a, b) for a, b in zip(bits(whole), bits(late), strict=True))
    again = pruned(kind)
    assert (
        finetune(again, PEFT, windows, stop=5, folder=tmp_path, **asked).resumed_at == 0
    )  # kept: what is after step 12
    assert all(torch.equal(a, b) for a, b in zip(bits(early), bits(again), strict=True))
    assert finetune(pruned(kind), PEFT, windows, folder=tmp_path, **asked).resumed_at == 12


def test_of_two_runs_of_one_schedule_the_state_of_the_longer_stays(windows, tmp_path):
    asked = {"steps": 12, "learning_rate": 1e-3, "folder": tmp_path, "save_every": 3}
    longer: list[int] = []

    def overtaken(step: int, loss: float, pace: float) -> None:
        if step == 4:
            longer.append(len(finetune(pruned("opt"), PEFT, windows, **asked).losses))

    finetune(pruned("opt"), PEFT, windows, stop=8, watch=overtaken, **asked)
    assert longer == [12]
    assert finetune(pruned("opt"), PEFT, windows, **asked).resumed_at == 12


def test_processes_of_equal_ids_on_two_hosts_do_not_share_a_temporary_file(tmp_path, monkeypatch):
    names, save_file = set(), safetensors.torch.save_file
    monkeypatch.setattr(
        safetensors.torch, "save_file", lambda tensors, path, **how: names.add(path) or save_file(tensors, path, **how)
    )
    for _ in range(2):
        state.save(tmp_path / "retrain.safetensors", {"a": torch.ones(1)}, {"step": 1})
    assert len(names) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["retrain.safetensors"]


@pytest.mark.parametrize("stop", [0, -1, 3])
def test_a_stop_outside_the_schedule_is_refused(windows, stop):
    with pytest.raises(ValueError, match=f"stops after 1 to 2 of them; got stop={stop}"):
        finetune(pruned("opt"), PEFT, windows, steps=2, stop=stop, learning_rate=1e-3)
