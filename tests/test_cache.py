"""Shared statistics are kept for other cells, verified when read and removed when room is needed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from small_table import full_disk
from torch.testing import assert_close

from experiments.measures import dense_gate
from experiments.store import cache, locks, room
from experiments.store.described import digest
from pruners.weights import storage
from pruners.weights.shards import Shards

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


def test_files_that_were_swapped_are_noticed(tmp_path, caplog):
    for name in "ab":
        cache.statistics(tmp_path, {"name": name}, lambda name=name: {"x": torch.full((3,), float(ord(name)))})
    one, two = sorted(cache.folder(tmp_path).glob("*.safetensors"))
    one.rename(tmp_path / "aside")
    two.rename(one)
    (tmp_path / "aside").rename(two)
    found = cache.statistics(tmp_path, {"name": "a"}, lambda: {"x": torch.zeros(3)})
    assert found["x"].equal(torch.zeros(3))
    assert "it was written for another file" in caplog.text


@pytest.mark.parametrize("damage", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:50], lambda b: b""])
def test_a_damaged_entry_is_reported_and_computed_again(tmp_path, caplog, damage):
    compute = Counted()
    cache.statistics(tmp_path, KEY, compute)
    entry(tmp_path).write_bytes(damage(entry(tmp_path).read_bytes()))
    assert_close(cache.statistics(tmp_path, KEY, compute), compute.tensors, rtol=0, atol=0)
    assert compute.calls == 2
    assert "Computing again" in caplog.text


@pytest.mark.parametrize("on_disk", [False, True])
def test_nobody_waits_for_another_that_computes_the_same_and_the_first_that_is_done_stores(tmp_path, on_disk):
    found = []

    def slow() -> Shards | dict[str, torch.Tensor]:
        """Another one asks, computes and stores meanwhile."""
        found.append(cache.statistics(tmp_path, KEY, lambda: made("quick"), on_disk))
        return made("slow")

    def made(name: str) -> Shards | dict[str, torch.Tensor]:
        return parts(tmp_path / name, "ab") if on_disk else Counted().tensors

    late = cache.statistics(tmp_path, KEY, slow, on_disk)
    assert_close(dict(late), dict(found[0]), rtol=0, atol=0)  # and the file is still the first one's
    assert len(list(cache.folder(tmp_path).rglob("*.safetensors"))) == (2 if on_disk else 1)
    assert cache.statistics(tmp_path, KEY, lambda: pytest.fail("it is there")).keys() == late.keys()


def test_what_another_process_is_storing_is_left_to_it(tmp_path):
    with locks.held(cache.folder(tmp_path) / f"{digest(KEY)}.lock"):
        assert cache.statistics(tmp_path, KEY, Counted()).keys() == {"a", "b"}
    assert not list(cache.folder(tmp_path).glob("*.safetensors"))


def test_a_dense_value_is_evaluated_by_two_that_ask_at_once(tmp_path):
    values = {"a@1": {"perplexity": 7.0}}
    quick = lambda: dense_gate.dense(tmp_path, KEY, lambda: values)  # noqa: E731
    assert dense_gate.dense(tmp_path, KEY, quick) == values
    assert dense_gate.dense(tmp_path, KEY, lambda: pytest.fail("it is kept")) == values
    (path,) = tmp_path.rglob("*.json")
    path.unlink()
    with locks.held(path.with_suffix(".lock")):
        assert dense_gate.dense(tmp_path, KEY, lambda: values) == values


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


def test_a_full_disk_is_one_sentence_leaves_nothing_and_costs_no_cell(tmp_path, caplog):
    compute = Counted()
    with full_disk():
        assert cache.statistics(tmp_path, KEY, compute)["a"].equal(compute.tensors["a"])
    assert "file too large" in caplog.text
    assert [path.suffix for path in cache.folder(tmp_path).iterdir()] == [".lock"]


def test_a_lock_that_cannot_be_made_costs_no_cell(tmp_path, caplog):
    (tmp_path / ".cache").write_text("a file where the folder should be")
    assert cache.statistics(tmp_path, KEY, Counted())
    assert "Statistics are not cached" in caplog.text


@pytest.mark.parametrize("name", [".tmpAbC123", ".{name}.abc.tmp", ".0123456789.safetensors.abc.tmp"])
@pytest.mark.parametrize("folder", [False, True])
def test_what_killed_writers_left_goes_with_the_next_writing(tmp_path, name, folder):
    cache.statistics(tmp_path, KEY, Counted())
    left = cache.folder(tmp_path) / name.format(name=entry(tmp_path).name)
    if folder and "safetensors" in name:
        left.mkdir()
        left = left / ".tmpAbC123"
    left.write_bytes(bytes(1000))
    cache.statistics(tmp_path, {"another": "key"}, Counted())
    assert not [path for path in cache.folder(tmp_path).iterdir() if "tmp" in path.name]


def test_what_another_process_writes_now_stays_and_counts(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.LIMIT_VARIABLE, str(10_000 / 1e9))
    cache.statistics(tmp_path, KEY, Counted())
    writing = cache.folder(tmp_path) / ".0123456789.safetensors.abc.tmp"
    writing.write_bytes(bytes(9_900))
    with locks.held(cache.folder(tmp_path) / "0123456789.lock"):
        cache.statistics(tmp_path, {"another": "key"}, Counted())
    assert writing.exists()
    assert len(list(cache.folder(tmp_path).glob("*.safetensors"))) == 1  # room was made for the new one


@pytest.mark.parametrize("held", [False, True])
def test_abandoned_cells_count_and_go_oldest_first_unless_somebody_is_at_them(tmp_path, monkeypatch, held):
    monkeypatch.setenv(cache.LIMIT_VARIABLE, str(10_000 / 1e9))
    for age, name in enumerate(("older", "newer")):
        left = tmp_path / ".cache/unfinished/tiny" / name / "origin" / "000.safetensors"
        left.parent.mkdir(parents=True)
        left.write_bytes(bytes(5000))
        os.utime(left, (0, age))
        os.utime(left.parent, (0, age))
        os.utime(left.parent.parent, (0, age))
    with locks.held(room.cell_lock(tmp_path, "tiny", "older")) if held else nullcontext():
        cache.statistics(tmp_path, KEY, Counted())
    left = sorted(path.name for path in (tmp_path / ".cache/unfinished/tiny").iterdir())
    assert left == (["older"] if held else ["newer"])


def _write_slowly(root: Path, started) -> None:
    started.set()
    cache.statistics(root, KEY, lambda: {"x": torch.zeros(50_000_000)})


def test_killed_while_it_wrote_the_next_one_writes_and_sweeps(tmp_path):
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        started = context.Event()
        writer = context.Process(target=_write_slowly, args=(tmp_path, started))
        writer.start()
        assert started.wait(60)
        while writer.is_alive() and not any(
            path.stat().st_size > 10**7 for path in tmp_path.rglob("*") if path.is_file()
        ):
            time.sleep(0.001)
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    found = cache.statistics(tmp_path, KEY, lambda: {"x": torch.zeros(50_000_000)})
    assert found["x"].shape == (50_000_000,)
    cache.statistics(tmp_path, {"another": "key"}, Counted())
    assert sorted(path.suffix for path in cache.folder(tmp_path).iterdir()) == [".lock", ".lock"] + [".safetensors"] * 2


@pytest.mark.parametrize("said", ["much", "-1", "inf", "nan", ""])
def test_a_limit_that_is_no_number_is_refused(tmp_path, monkeypatch, said):
    monkeypatch.setenv(cache.LIMIT_VARIABLE, said)
    with pytest.raises(ValueError, match=rf"PRUNING_CACHE_GB is '{said}'"):
        cache.statistics(tmp_path, KEY, Counted())


def parts(folder: Path, names: str) -> Shards:
    """Tensors as a model at home on the disk gathers them, a file for each block."""
    for number, name in enumerate(names):
        storage.write_tensors(folder / f"{name}.safetensors", {name: torch.full((100,), float(number))}, {})
    return Shards(sorted(folder.iterdir()))


def test_statistics_on_the_disk_are_shared_and_read_when_they_are_asked_for(tmp_path):
    first = cache.statistics(tmp_path, KEY, lambda: parts(tmp_path / "cell", "abc"))
    assert not list((tmp_path / "cell").iterdir())
    again = cache.statistics(tmp_path, KEY, lambda: pytest.fail("it is there"), on_disk=True)
    assert first.keys() == again.keys() == set("abc")
    assert isinstance(again, Shards)
    assert again.bytes_read == 0
    assert all(again[name].equal(first[name]) for name in "abc")
    whole = cache.statistics(tmp_path, KEY, lambda: pytest.fail("it is there"))
    assert isinstance(whole, dict)
    assert all(whole[name].equal(first[name]) for name in "abc")
    cache.statistics(tmp_path, {"in": "memory"}, Counted())
    away = cache.statistics(tmp_path, {"in": "memory"}, lambda: pytest.fail("it is there"), on_disk=True)
    assert isinstance(away, Shards)
    assert away["a"].equal(Counted().tensors["a"])


@pytest.mark.parametrize("harm", ["gone", "damaged", "swapped"])
def test_a_part_of_statistics_that_is_lost_has_all_computed_again(tmp_path, harm):
    cache.statistics(tmp_path, KEY, lambda: parts(tmp_path / "cell", "abc"))
    one, two, _ = sorted(cache.folder(tmp_path).rglob("*.safetensors"))
    if harm == "gone":
        two.unlink()
    elif harm == "damaged":
        two.write_bytes(two.read_bytes()[:-1] + b"\xff")
    else:
        two.write_bytes(one.read_bytes())
    found = cache.statistics(tmp_path, KEY, lambda: parts(tmp_path / "cell", "xyz"), on_disk=True)
    assert found.keys() == set("xyz")
    assert cache.statistics(tmp_path, KEY, lambda: pytest.fail("it is there")).keys() == set("xyz")


def test_statistics_in_parts_make_room(tmp_path, monkeypatch):
    cache.statistics(tmp_path, KEY, lambda: parts(tmp_path / "cell", "abc"))
    monkeypatch.setenv(cache.LIMIT_VARIABLE, "0.000003")
    room.make_room(tmp_path)
    assert len(list(cache.folder(tmp_path).rglob("*.safetensors"))) == 3
    cache.statistics(tmp_path, {"another": "key"}, lambda: {"x": torch.zeros(400)})
    assert len(list(cache.folder(tmp_path).rglob("*.safetensors"))) == 1
    found = cache.statistics(tmp_path, {"too": "large"}, lambda: parts(tmp_path / "cell", "abcdefghij"))
    assert found["j"].equal(torch.full((100,), 9.0))
    assert len(list((tmp_path / "cell").iterdir())) == 10
