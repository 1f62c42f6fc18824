"""Processes that torchrun launches together: they make what one makes, and end together where one is lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import launched
import pytest
import small_table as small
from conftest import needs_shared
from torch.testing import assert_close

from experiments import batch, cells
from experiments.batch import run_table
from experiments.settings import Settings
from experiments.store import records
from pruners.retrain import Reconstruction, Trainable
from pruners.run import ranks

SCRIPT = Path(__file__).with_name("launched.py")
EPSILON = 1e-5  # sums over processes are rounded in another order


def environment() -> dict[str, str]:
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def launch(count: int, *words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count), SCRIPT]
    asked = [*map(str, [*command, *words])]
    return subprocess.run(asked, env=environment(), capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small.data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, Any]:
    return launched.found(tmp_path_factory.mktemp("alone"), launched.WORKS)


@pytest.fixture(scope="module")
def two(tmp_path_factory, data) -> tuple[Path, str]:
    """The folder and what was said, of two ranks that have measured and then run the table; nobody launched them."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    words = [SCRIPT, folder, "run", "retrained", "--results", folder, "--data-dir", data, "--device", "cpu"]
    started = [subprocess.Popen([sys.executable, *map(str, words)], env=environment() | meeting | {"RANK": rank},
                                stderr=subprocess.PIPE, text=True) for rank in "01"]  # fmt: skip
    told = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [1, 0], told  # rank 0 tells of a cell that failed
    assert told[1] == ""
    return folder, told[0]


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    told = launch(3, folder)
    assert told.returncode == 0, told.stderr
    return folder


@needs_shared
@pytest.mark.parametrize(
    ("name", "count"), [*((name, 2) for name in launched.WORKS), *((name, 3) for name in sorted(launched.FEWER))]
)
def test_every_rank_finds_exactly_what_one_process_finds(name, count, alone, request):
    folder = request.getfixturevalue("two")[0] if count == 2 else request.getfixturevalue("three")
    for rank in range(count):
        found = json.loads((folder / f"{rank}.json").read_text())[name]
        if name == "told":
            assert (found, alone[name]) == (2, 2)
        else:
            assert found == alone[name]


def table_records(root: Path, table: str = "retrained") -> dict[str, records.Record]:
    return records.load(root, table)


@needs_shared
def test_two_ranks_make_the_records_of_one_process(two, data, tmp_path):
    folder, said = two
    asked = cells.cells(launched.table().runs())
    assert len(run_table("retrained", asked, Settings(tmp_path, device="cpu", data_dir=data)).failed) == 1
    assert said.count("4 done now, 0 before, 1 failed") == 1  # rank 0 alone speaks
    assert "Rank 1000 is larger than" in said
    one, both = table_records(tmp_path), table_records(folder)
    assert one.keys() == both.keys()
    assert len(both) == 4
    for id in both:
        before, after = one[id].measures, both[id].measures
        retrained = "recovery" in both[id].achieved
        if not retrained:
            assert before == after
        assert_close(*(made[small.PPL.key]["perplexity"] for made in (before, after)), rtol=EPSILON, atol=0)
        recoveries = [made.achieved.get("recovery", {}) for made in (one[id], both[id])]
        assert [done.get("processes") for done in recoveries] == ([1, 2] if retrained else [None, None])
        assert_close(*(done.get("losses", []) for done in recoveries), rtol=EPSILON, atol=0)
    chosen = [made.measures[launched.GRID.key]["learning_rate"] for root in (tmp_path, folder)
              for made in table_records(root, "retrained.rates").values()]  # fmt: skip
    assert len(chosen) == 2
    assert chosen[0] == chosen[1]


@needs_shared
def test_a_rank_that_is_lost_ends_all_with_its_sentence_and_fewer_go_on(data, tmp_path):
    asked = cells.cells(launched.table().runs())[1:2]
    words = ["run", "retrained", "--only", asked[0].id, "--results", tmp_path, "--data-dir", data, "--device", "cpu"]
    told = launch(2, tmp_path, *words, "--lose", 1, 4)
    assert told.returncode != 0
    assert "Process 1: Out of memory" in told.stderr
    assert "done now" not in told.stderr
    assert not table_records(tmp_path)
    outcome = run_table("retrained", asked, Settings(tmp_path, device="cpu", data_dir=data))
    assert outcome.done == [asked[0].label]


@needs_shared
def test_what_ranks_cannot_share_is_refused_before_any_work(monkeypatch, tmp_path):
    asked = cells.cells(launched.table().runs())
    with pytest.raises(
        ValueError, match=r"3 processes cannot share a batch of 4 evenly, which .* and 2 more cells would"
    ):
        batch.refuse_unshared(asked, 3)
    batch.refuse_unshared(asked, 4)
    batch.refuse_unshared(asked, 8)
    rebuilding = Reconstruction(Trainable(norms=True), steps=2)
    (cell,) = cells.cells([replace(asked[0].run, recovery=rebuilding)])
    with pytest.raises(
        ValueError, match=r"Block-wise reconstruction runs in one process, and 2 were launched for .*; run these cells"
    ):
        batch.refuse_unshared([cell], 2)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 but RANK, MASTER_ADDR, MASTER_PORT are not set; start all of them with"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc', not a number from 1 on; start all of them with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "x", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "cannot connect .* unset"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1', not a number from 0 on"),
    ],
)
def test_an_environment_that_is_left_over_is_one_sentence(environment, says, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    asked = ranks.here if "WORLD_SIZE" in environment else ranks.local_rank
    with pytest.raises((ValueError, ConnectionError), match=says):
        asked()


def test_a_port_that_is_taken_is_one_sentence(monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        meeting = {
            "WORLD_SIZE": "2",
            "RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(taken.getsockname()[1]),
        }
        for name, value in meeting.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            ConnectionError, match=r"The 2 processes of WORLD_SIZE cannot connect to each other .*; start all of them"
        ):
            ranks.here()


def test_each_process_takes_its_own_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Settings().place == Settings(device="cuda").place == "cuda:1"
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match=r"no device 'cuda:2' here; .* Launch at most one process per GPU"):
        _ = Settings().place
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes cannot share cuda:0; leave --device out"):
        Settings(device="cuda:0")
