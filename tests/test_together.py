"""Processes that torchrun launches together: they retrain as one, and end together where one is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_table as small
from conftest import needs_shared
from torch.testing import assert_close

from experiments import records
from experiments.run import Settings

SCRIPT = Path(__file__).with_name("launched.py")
WORDS = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT)]
EPSILON = 1e-5  # sums over processes are rounded in another order


def run(
    root: Path, data: Path, *words: str, table: str = "retrained", launcher: list[str] | None = None
) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(SCRIPT.parents[1]), str(SCRIPT.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    start = ["-m", *launcher] if launcher else [str(SCRIPT)]
    command = [sys.executable, *start, "run", table, "--results", str(root), "--data-dir", str(data), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def found(root: Path) -> dict[str, records.Record]:
    return records.load(root, "retrained")


@needs_shared
def test_two_launched_processes_make_the_records_of_one(tmp_path):
    data = small.data(tmp_path / "data")
    alone, together = run(tmp_path / "1", data), run(tmp_path / "2", data, launcher=WORDS)
    assert (alone.returncode, together.returncode) == (0, 1)
    assert together.stderr.count("3 done now, 0 before, 1 failed") == 1  # process 0 alone speaks
    assert "A batch of 3 cannot be shared evenly by 2 processes" in together.stderr
    one, two = found(tmp_path / "1"), found(tmp_path / "2")
    assert len(two) == 3
    for id, record in two.items():
        perplexity = [made[id].measures[small.PPL.key]["perplexity"] for made in (one, two)]
        assert_close(*perplexity, rtol=EPSILON, atol=0)
        recovery = [made[id].achieved.get("recovery", {}) for made in (one, two)]
        assert [told.get("processes") for told in recovery] == ([1, 2] if record.spec.get("recovery") else [None, None])
        assert_close(*(told.get("losses", []) for told in recovery), rtol=EPSILON, atol=0)
    assert not list((tmp_path / "2").rglob("to_train*"))


@needs_shared
def test_a_process_that_is_lost_ends_all_with_its_sentence(tmp_path):
    told = run(tmp_path, small.data(tmp_path / "data"), "--lose", "1", "12", launcher=WORDS)
    assert told.returncode != 0
    assert "Process 1: Out of memory" in told.stderr
    assert "done now" not in told.stderr
    assert len(found(tmp_path)) == 1  # of the cell before; the one after is left to the next run


@needs_shared
def test_a_table_that_nobody_knows_is_one_sentence(tmp_path):
    told = run(tmp_path, tmp_path, table="embeded.demo", launcher=WORDS)
    assert told.returncode != 0
    assert told.stderr.count("Unknown table 'embeded.demo'") == 1


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
