"""Processes that torchrun launches together: they retrain as one, and end together where one is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import launched
import pytest
import small_table as small
from conftest import needs_shared
from torch.distributed import HashStore
from torch.testing import assert_close

from experiments import cells, records, together
from experiments.batch import run_table
from experiments.run import Settings
from experiments.together import Group
from pruners.retrain.peers import PeerLostError

SCRIPT = Path(__file__).with_name("launched.py")
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
EPSILON = 1e-5  # sums over processes are rounded in another order


def run(root: Path, data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCH, "run", "retrained", "--results", str(root), "--data-dir", str(data), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def found(root: Path) -> dict[str, records.Record]:
    return records.load(root, "retrained")


@needs_shared
def test_two_launched_processes_make_the_records_of_one(tmp_path):
    data = small.data(tmp_path / "data")
    alone = cells.cells(launched.table().runs())
    assert not run_table("retrained", alone, Settings(tmp_path / "1", device="cpu", data_dir=data)).failed
    told = run(tmp_path / "2", data)
    assert told.returncode != 0
    assert told.stderr.count("3 done now, 0 before, 1 failed") == 1  # process 0 alone speaks
    assert "A batch of 3 cannot be shared evenly by 2 processes" in told.stderr
    one, two = found(tmp_path / "1"), found(tmp_path / "2")
    assert len(two) == 3
    for id in two:
        perplexity = [made[id].measures[small.PPL.key]["perplexity"] for made in (one, two)]
        assert_close(*perplexity, rtol=EPSILON, atol=0)
        recoveries = [made[id].achieved.get("recovery", {}) for made in (one, two)]
        assert [done.get("processes") for done in recoveries] == ([1, 2] if recoveries[0] else [None, None])
        assert_close(*(done.get("losses", []) for done in recoveries), rtol=EPSILON, atol=0)
    assert not list((tmp_path / "2").rglob("to_train*"))


@needs_shared
def test_a_process_that_is_lost_ends_all_with_its_sentence(tmp_path):
    told = run(tmp_path, small.data(tmp_path / "data"), "--lose", "1", "12")
    assert told.returncode != 0
    assert "Process 1: Out of memory" in told.stderr
    assert "done now" not in told.stderr
    assert len(found(tmp_path)) == 1  # of the cell before; the one after is left to the next run


def test_the_others_are_let_go_without_a_word_whatever_ends_process_0():
    store = HashStore()
    Group(0, 2, store).end()
    Group(1, 2, store).follow(lambda: pytest.fail("there was nothing to train"), Settings(device="cpu"))


def test_an_error_that_all_meet_is_told_from_one_that_keeps_somebody_waiting(monkeypatch):
    monkeypatch.setattr(together, "PATIENCE_SECONDS", 0.0)
    store = HashStore()
    one, other = Group(0, 2, store, calls=1), Group(1, 2, store, calls=1)
    assert one._lost(ValueError())  # the other has met none yet
    assert not other._lost(ValueError())
    assert not one._lost(ValueError())
    assert one._lost(PeerLostError())


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Settings().device == Settings(device="cuda").device == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"no device 'cuda:2' here; .* Launch one process for each GPU at most"):
        Settings()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes cannot train together on cuda:0; leave --device out"):
        Settings(device="cuda:0")
