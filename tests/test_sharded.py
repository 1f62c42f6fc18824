"""Ranks that share weights, gradients and moments of a retraining train what one process trains."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sharded
import torch
from conftest import needs_shared
from torch.testing import assert_close

from pruners.weights import storage

SCRIPT = Path(sharded.__file__)
WHICH = [(2, name) for name in sharded.JOBS] + [(4, "all weights"), (4, "MaskLoRA, norms and head")]
EPSILON = 1e-5  # sums over ranks are rounded in another order
BFLOAT16 = 2.0**-7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("sharded")
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    told = subprocess.run([sys.executable, SCRIPT, place], env=environment, capture_output=True, text=True, timeout=300)
    assert told.stderr == ""
    return place


@pytest.fixture(scope="module")
def answers(folder) -> dict[int, list[dict[str, Any]]]:
    """By number of ranks, of each."""
    names = {2: "two", 4: "four"}
    return {n: [torch.load(folder / f"{name}.{rank}.pt") for rank in range(n)] for n, name in names.items()}


@pytest.fixture(scope="module")
def alone() -> Any:
    """What one process makes of a job."""
    made: dict[str, Any] = {}
    return lambda name: made.get(name) or made.setdefault(name, sharded.told(*sharded.JOBS[name].run()))


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], epsilon: float = EPSILON) -> None:
    """Biases of keys move by rounding alone, which AdamW makes steps of: they add the same to all of a row's scores."""
    assert found.keys() == expected.keys()
    for name in expected:
        if not name.endswith("k_proj.bias"):
            assert_close(found[name], expected[name], rtol=epsilon, atol=epsilon, msg=lambda said: f"{name}: {said}")  # noqa: B023


@pytest.mark.parametrize(("count", "name"), WHICH)
def test_ranks_train_what_one_process_trains(count, name, answers, alone):
    one, *_ = all_told = [told[name] for told in answers[count]]
    expected = alone(name)
    assert_close(one["losses"], expected["losses"], rtol=EPSILON, atol=0)
    assert_same(one["state"], expected["state"], BFLOAT16 if name == "bfloat16" else EPSILON)
    for about in ("merging", "lost_by_merging"):
        assert_close(one[about], expected[about], rtol=EPSILON, atol=0)
    assert one["kept_step"] == expected["kept_step"]
    assert [step for step, _ in one["checked"]] == [step for step, _ in expected["checked"]]
    losses = ([loss for _, loss in told["checked"]] for told in (one, expected))
    assert_close(*losses, rtol=EPSILON, atol=0)
    assert (one["untied"], one["kind"], one["sparsity"]) == (expected["untied"], expected["kind"], expected["sparsity"])
    assert one["plain"]
    for told in all_told:
        assert all(torch.equal(tensor, told["state"][key]) for key, tensor in one["state"].items())


@pytest.mark.parametrize(("count", "name"), [which for which in WHICH if "stays" not in which[1]])
def test_what_was_pruned_stays_zero(count, name, answers):
    model = sharded.JOBS[name].model()
    pruned = {key: p == 0 for key, p in model.named_parameters() if p.ndim > 1 and "embed" not in key}
    assert sum(int(gone.sum()) for gone in pruned.values()) > 1000
    state = answers[count][0][name]["state"]
    assert not any(state[key][gone].any() for key, gone in pruned.items() if "lm_head" not in key)


@pytest.mark.parametrize("count", [2, 4])
def test_a_rank_keeps_its_rows_of_every_parameter_and_no_more(count, answers):
    for name in ("all weights", "MaskLoRA, norms and head"):
        told = [answer["sizes"][name] for answer in answers[count]]
        for key, size in told[0]["whole"].items():
            kept, length = [one["trained"][key] for one in told], told[0]["lengths"][key]
            assert sum(kept) == size
            assert max(kept) == math.ceil(length / count) * size // length
        assert sum(one["held"] for one in told) == told[0]["all"]
        assert max(one["held"] for one in told) < 1.03 * told[0]["all"] / count
        assert all(one["left"] == 4 * one["count"] for one in told)  # one number of each in the model itself
    masked = [sum(answer["sizes"]["all weights"]["masks"] for answer in answers[n]) for n in (2, 4)]
    assert masked[0] == masked[1]


def test_losing_a_rank_is_one_sentence_on_the_others(answers):
    *others, lost = answers[4]
    assert "lost" not in lost
    for told in others:
        assert told["lost"].startswith("RankLostError: Another process of this launch has ended or does not answer (")
        assert told["lost"].endswith("The same command resumes from the last saved state.")


def test_a_rank_that_does_not_come_is_waited_for_as_long_as_said(folder):
    told = torch.load(folder / "hung.0.pt")["hung"]
    assert told.startswith("RankLostError: Another process of this launch has ended or does not answer (Timed out wait")


@needs_shared
def test_every_rank_of_a_table_that_waits_for_one_in_vain_says_so_and_fails(folder):
    first, hung, last = (torch.load(folder / f"hung_table.{rank}.pt") for rank in range(3))
    assert (first["status"], last["status"]) == (1, 1)
    sentence = "Another process of this launch has ended or does not answer ("
    for told, start in ((first, sentence), (last, f"Process 2: {sentence}")):
        (said,) = [line for line in told["said"] if sentence in line]
        assert said.startswith(start)
        assert said.endswith("; see its output in the.log. The same command resumes from the last saved state.")
    assert any("Timed out" in line for told in (first, last) for line in told["said"])
    assert hung["status"] == 1
    assert [path.name for path in (folder / "results/runs/tiny").glob("*.error.json")] == []
    assert len(list((folder / "results/runs/tiny").glob("*.json"))) == 1  # of the dense model


def test_ranks_that_stream_their_weights_share_batches(answers):
    expected = sharded.told(*sharded.STREAMED.run())
    for told in answers[2]:
        assert_close(told["streamed"]["losses"], expected["losses"], rtol=EPSILON, atol=0)
        assert_same(told["streamed"]["state"], expected["state"])


def test_any_number_of_ranks_goes_on_from_the_state_of_any(folder, answers, tmp_path):
    whole = sharded.told(*sharded.RESUMED.run())
    early = sharded.told(*sharded.RESUMED.run(stop=15))
    for begun in ("of four", "of one"):
        for told in answers[2]:
            assert_close(told[begun]["losses"], early["losses"], rtol=EPSILON, atol=0)
            assert_same(told[begun]["state"], early["state"])
    for begun, step in (("as four left it", 10), ("of four", 15)):
        shutil.copytree(folder / begun, tmp_path / begun)
        assert storage.read_about(tmp_path / begun / "retrain.safetensors")["step"] == step
        model, report = sharded.RESUMED.run(folder=tmp_path / begun)
        assert (report.resumed_at, len(report.losses)) == (step, sharded.STEPS)
        assert_close(report.losses, whole["losses"], rtol=EPSILON, atol=0)
        assert_same(model.state_dict(), whole["state"])
        assert [path.name for path in (tmp_path / begun).iterdir()] == ["retrain.safetensors"]


def test_rows_that_are_damaged_are_begun_anew_by_all(answers):
    expected = sharded.told(*sharded.RESUMED.run(stop=5))
    for told in answers[2]:
        assert_close(told["damaged"]["losses"], expected["losses"], rtol=EPSILON, atol=0)
        assert_same(told["damaged"]["state"], expected["state"])


def test_divergence_is_the_sentence_of_one_process_on_every_rank(answers):
    assert [told["diverged"] for told in answers[2]] == [sharded.diverged()] * 2 != [""] * 2


def test_ranks_choose_the_rate_that_one_process_chooses(answers):
    choice, state = sharded.chosen()
    for told in answers[2]:
        found, left = told["chosen"]
        assert found["chosen"] == choice["chosen"]
        assert_close(found["losses"], choice["losses"], rtol=EPSILON, atol=0)
        assert all(torch.equal(left[key], tensor) for key, tensor in state.items())


def test_what_ranks_cannot_share_or_do_not_agree_on_is_refused(answers):
    for told in answers[2]:
        assert told["uneven"].startswith("ValueError: A batch of 3 cannot be split evenly among 2 processes; use a ")
        assert "retrain.safetensors belongs to another run" in told["foreign"]
        assert told["other"].startswith(
            "ValueError: The 2 processes do not run the same work: model, examples, settings or"
        )
