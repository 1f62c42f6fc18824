"""Processes that torchrun launches together: they retrain as one, and end together where one is lost."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import launched
import pytest
import small_table as small
from conftest import needs_shared
from torch.distributed import HashStore
from torch.testing import assert_close

from experiments import cells, distributed, papers, processes
from experiments.__main__ import main
from experiments.batch import run_table
from experiments.distributed import Group
from experiments.settings import Settings
from experiments.store import records
from pruners.ranks import RankLostError

SCRIPT = Path(__file__).with_name("launched.py")
LAUNCH = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
EPSILON = 1e-5  # sums over processes are rounded in another order


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def run(root: Path, data: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *LAUNCH, "run", "retrained", "--results", str(root), "--data-dir", str(data), *words]
    return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)


def found(root: Path) -> dict[str, records.Record]:
    return records.load(root, "retrained")


@needs_shared
def test_two_launched_processes_make_the_records_of_one(tmp_path):
    data = small.data(tmp_path / "data")
    alone = cells.cells(launched.table().runs())
    assert len(run_table("retrained", alone, Settings(tmp_path / "1", device="cpu", data_dir=data)).failed) == 1
    told = run(tmp_path / "2", data)
    assert told.returncode != 0
    assert told.stderr.count("3 done now, 0 before, 1 failed") == 1  # rank 0 alone speaks
    assert "Rank 1000 is larger than" in told.stderr
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


@needs_shared
def test_batches_that_do_not_divide_are_refused_before_any_work(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(distributed, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(distributed, "joined", lambda: nullcontext(Group(0, 4, HashStore())))
    monkeypatch.setitem(papers.TABLES, "retrained", launched.table())
    assert main(["run", "retrained", "--results", str(tmp_path / "results"), "--device", "cpu"]) == 1
    assert "4 processes cannot share a batch of 2 evenly, as " in (told := capsys.readouterr().err)
    assert "and 1 more cells would need" in told
    assert told.count("\n") == 1
    assert not (tmp_path / "results").exists()


def test_process_0_waits_until_all_are_ready_and_is_told_why_one_is_not(monkeypatch):
    monkeypatch.setattr(distributed, "LOADING_SECONDS", 0.0)
    one, other = (Group(rank, 2, store, calls=1) for store in [HashStore()] for rank in (0, 1))
    with pytest.raises(RankLostError, match="Process 1 is not ready to train along after 0 s"):
        one._wait_until_loaded()
    monkeypatch.setattr(distributed, "PATIENCE_SECONDS", 0.0)
    other._lost(ValueError("No such file."))
    with pytest.raises(ConnectionError, match=r"Process 1 cannot train along\. No such file"):
        one._wait_until_loaded()
    other._reach("loaded/1")
    one._wait_until_loaded()


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK, MASTER_ADDR, MASTER_PORT is not set; start all of them with"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', not a number from 1 on; start all of them with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "do not meet .* unset"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', not a number from 0 on"),
    ],
)
def test_an_environment_that_is_left_over_is_one_sentence(environment, says, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises((ValueError, ConnectionError), match=says), distributed.joined():
        processes.local_rank()


@needs_shared
def test_without_a_launcher_the_process_that_keeps_the_store_leaves_last(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    data = small.data(tmp_path / "data")
    words = ["run", "retrained", "--only", "dense", "--results", str(tmp_path), "--data-dir", str(data)]
    ranks = [subprocess.Popen([sys.executable, SCRIPT, *words], env=environment() | meeting | {"RANK": rank},
                              stderr=subprocess.PIPE, text=True) for rank in "01"]  # fmt: skip
    told = [process.communicate(timeout=120)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], told


def test_the_others_are_let_go_without_a_word_whatever_ends_process_0(monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE_SECONDS", 0.0)
    store = HashStore()
    Group(0, 2, store).end()
    Group(1, 2, store).follow(lambda: pytest.fail("there was nothing to train"), Settings(device="cpu"))


def test_an_error_that_all_meet_is_told_from_one_that_keeps_somebody_waiting(monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE_SECONDS", 0.0)
    store = HashStore()
    one, other = Group(0, 2, store, calls=1), Group(1, 2, store, calls=1)
    assert one._lost(ValueError())  # the other has met none yet
    assert not other._lost(ValueError())
    assert not one._lost(ValueError())
    assert one._lost(RankLostError())


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
