"""Shared statistics are computed once, verified when read and removed when room is needed."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from small_table import full_disk
from torch.testing import assert_close

from experiments import cache, files

KEY = {"model": "m", "statistics": "norms"}


class Counted:
    """Tensors, and how often they were computed."""

    def __init__(self, size: int = 10) -> None:
        self.calls = 0
        self.tensors = {"a": torch.arange(size).float(), "b": torch.ones(2, 3, dtype=torch.bfloat16)}

    def __call__(self) -> dict[str, torch.Tensor]:
        self.calls += 1
        return self.tensors


def entry(root: Path) -> Path:
    (path,) = cache.folder(root).glob("*.safetensors")
    return path


def test_what_was_stored_comes_back_equal_and_is_not_computed_again(tmp_path):
    compute = Counted()
    cache.statistics(tmp_path, KEY, compute)
    assert_close(cache.statistics(tmp_path, KEY, compute), compute.tensors, rtol=0, atol=0)
    assert compute.calls == 1


def test_another_key_is_another_entry(tmp_path):
    compute = Counted()
    cache.statistics(tmp_path, KEY, compute)
    cache.statistics(tmp_path, {**KEY, "dtype": "float16"}, compute)
    assert compute.calls == 2


@pytest.mark.parametrize("damage", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:50], lambda b: b""])
def test_a_damaged_entry_is_reported_and_computed_again(tmp_path, caplog, damage):
    compute = Counted()
    cache.statistics(tmp_path, KEY, compute)
    entry(tmp_path).write_bytes(damage(entry(tmp_path).read_bytes()))
    assert_close(cache.statistics(tmp_path, KEY, compute), compute.tensors, rtol=0, atol=0)
    assert compute.calls == 2
    assert "Computing again" in caplog.text


def test_two_that_want_the_same_compute_it_once(tmp_path):
    compute = Counted()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: cache.statistics(tmp_path, KEY, compute), range(4)))
    assert compute.calls == 1


def test_the_least_recently_used_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.LIMIT_VARIABLE, str(10_000 / 1e9))
    compute = Counted(size=1000)  # 4 kB, so that two fit
    for age, name in enumerate(("old", "used", "new")):
        cache.statistics(tmp_path, {"name": name}, compute)
        for path in cache.folder(tmp_path).glob("*.safetensors"):
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime - 100))
        if age == 1:
            cache.statistics(tmp_path, {"name": "old"}, compute)  # now "used" is the older one
    calls = compute.calls
    cache.statistics(tmp_path, {"name": "old"}, compute)
    assert compute.calls == calls
    cache.statistics(tmp_path, {"name": "used"}, compute)
    assert compute.calls == calls + 1


def test_what_is_larger_than_the_cache_is_used_but_not_kept(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(cache.LIMIT_VARIABLE, "0.000000001")
    assert cache.statistics(tmp_path, KEY, Counted())
    assert not list(cache.folder(tmp_path).glob("*.safetensors"))
    assert cache.LIMIT_VARIABLE in caplog.text


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    with full_disk(), pytest.raises(files.StorageError, match=r"Cannot write .*PRUNING_CACHE_GB=0"):
        cache.statistics(tmp_path, KEY, Counted())
    assert [path.suffix for path in cache.folder(tmp_path).iterdir()] == [".lock"]


def test_a_limit_that_is_no_number_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.LIMIT_VARIABLE, "much")
    with pytest.raises(ValueError, match=r"PRUNING_CACHE_GB is 'much'"):
        cache.statistics(tmp_path, KEY, Counted())
