"""Every kept file notices every byte that is not its own, and a disk that refuses says so in one sentence."""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import small_table as small
import torch
from safetensors import SafetensorError
from small_table import full_disk

import pruners
from eval.answers import AnswerStore
from experiments.measures import dense_gate
from experiments.spec import Run
from experiments.store import atomic, cache, checksummed_json, records
from pruners.retrain import state
from pruners.weights import storage

TENSORS = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.bfloat16), "empty": torch.zeros(0, 4)}
KEY = {"model": "m"}
RUN = Run("smollm2-135m", pruners.Wanda(sparsity=0.5), small.WINDOWS, (small.PPL,))


class Recomputed(Exception):  # noqa: N818
    pass


def recompute(*_: object) -> None:
    raise Recomputed


def statistics(root: Path) -> tuple[Path, Callable[[], object]]:
    cache.statistics(root, KEY, lambda: TENSORS)
    (path,) = cache.folder(root).glob("*.safetensors")
    return path, lambda: cache.statistics(root, KEY, recompute)


def dense(root: Path) -> tuple[Path, Callable[[], object]]:
    dense_gate.dense(root, KEY, lambda: {"a@1": {"perplexity": 0.1 + 0.2}})
    (path,) = root.rglob("*.json")
    return path, lambda: dense_gate.dense(root, KEY, recompute)


def retraining(root: Path) -> tuple[Path, Callable[[], object]]:
    assert state.save(root / "retrain.safetensors", TENSORS, {"fingerprint": "f", "step": 3, "losses": [0.1]})
    return root / "retrain.safetensors", lambda: state.load(root / "retrain.safetensors", "f") or recompute()


def record(root: Path) -> tuple[Path, Callable[[], object]]:
    path = records.write(small.record(RUN, measures={small.PPL.key: {"perplexity": 0.1 + 0.2}}), root)
    return path, lambda: records.find(root, "tiny", path.stem) or recompute()


def answers(root: Path) -> tuple[Path, Callable[[], object]]:
    AnswerStore(root / "answers", "model").put("a", [(-1.25, True)])
    return root / "answers", lambda: AnswerStore(root / "answers", "model").get("a") or recompute()


KEPT = [statistics, dense, retraining, record, answers]


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.__name__)
def test_every_byte_that_changes_is_noticed(tmp_path, kept):
    path, read = kept(tmp_path)
    whole, draw = path.read_bytes(), random.Random(0)
    read()
    for place in range(len(whole)):
        change = draw.choice([0xFF, 1 << draw.randrange(8), draw.randrange(1, 256)])
        path.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
        with pytest.raises(Recomputed):
            read()
    path.write_bytes(whole)
    read()


@pytest.mark.parametrize("kept", KEPT, ids=lambda kept: kept.__name__)
@pytest.mark.parametrize("what", ["truncated", "longer", "deep", "pipe"])
def test_a_file_that_is_something_else_is_noticed(tmp_path, kept, what):
    path, read = kept(tmp_path)
    whole = path.read_bytes()
    changed = {"deep": b"[" * 200_000, "truncated": whole[: len(whole) // 2], "longer": whole * 2, "pipe": b""}[what]
    path.unlink()
    if what == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(changed)
    if kept is answers and what == "longer":  # the same answers twice
        read()
        return
    with pytest.raises(Recomputed):
        read()


def test_a_state_under_another_name_is_noticed(tmp_path, caplog):
    for name in ("block_000", "block_001"):
        assert state.save(tmp_path / f"{name}.safetensors", TENSORS, {"fingerprint": "f", "step": 1})
    (tmp_path / "block_000.safetensors").rename(tmp_path / "block_001.safetensors")
    assert state.load(tmp_path / "block_001.safetensors", "f") is None
    assert "it was written as block_000.safetensors" in caplog.text


def test_a_dense_value_in_another_place_is_noticed(tmp_path, caplog):
    path, _ = dense(tmp_path)
    other = {"model": "another"}
    dense_gate.dense(tmp_path, other, lambda: {"a@1": {"perplexity": 9.0}})
    (target,) = (found for found in path.parent.glob("*.json") if found != path)
    path.rename(target)
    with pytest.raises(Recomputed):
        dense_gate.dense(tmp_path, other, recompute)
    assert "was written for another file" in caplog.text


def test_a_record_of_another_table_is_not_trusted(tmp_path, caplog):
    path, _ = record(tmp_path)
    target = tmp_path / "runs" / "other" / path.name
    target.parent.mkdir()
    path.rename(target)
    assert records.load(tmp_path, "other") == {}
    assert "it is a record of the table tiny" in caplog.text


def test_a_full_disk_is_told_with_the_path_also_by_safetensors(tmp_path):
    with (
        full_disk(),
        pytest.raises(storage.StorageError, match=r"Cannot write .*x\.safetensors: file too large") as told,
    ):
        storage.write_tensors(tmp_path / "x.safetensors", {"x": torch.zeros(1000)}, {})
    assert told.value.errno == 27
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # of tokenizers
    ],
)
def test_no_space_is_one_sentence_whichever_library_says_it(error):
    with pytest.raises(atomic.StorageError) as told, atomic.explained(Path("/r/x")):
        raise error
    sentence = "no space left on device; free some space on that disk, or choose another folder with --results."
    assert str(told.value) == f"Cannot write /r/x: {sentence}"


def test_other_errors_pass():
    with pytest.raises(KeyError), atomic.explained(Path("/r/x")):
        raise KeyError("x")


def test_a_nul_in_a_path_is_one_sentence(tmp_path):
    with pytest.raises(atomic.StorageError, match=r"Cannot write .*a\\x00b': embedded null byte; check that path"):
        atomic.check_writable(tmp_path / "a\0b")


def test_whether_a_folder_takes_a_file_is_tried_with_bytes(tmp_path):
    atomic.check_writable(tmp_path)
    assert not list(tmp_path.iterdir())
    with full_disk(), pytest.raises(atomic.StorageError, match="file too large"):
        atomic.check_writable(tmp_path)


def test_files_keep_the_mode_of_the_umask_while_threads_write(tmp_path):
    threads = [threading.Thread(target=atomic.write, args=(tmp_path / str(n), "x")) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~storage.UMASK}


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_sealed_numbers_are_finite(number):
    content = json.loads(f'{{"a": {number}}}')
    text = json.dumps({**content, "sha256": checksummed_json.seal(content)}, indent=1) + "\n"
    with pytest.raises(ValueError, match=r"it holds -?(NaN|Infinity), which is not a valid value"):
        checksummed_json.loads(text)


def test_answers_that_a_disk_refuses_stay_in_memory(tmp_path, caplog):
    with full_disk():
        store = AnswerStore(tmp_path / "answers", "model")
        for batch in "abcdefghi":
            store.put(batch, [(-1.25, True)])
    assert store.get("i") == [(-1.25, True)]
    assert caplog.text.count("cannot be written") == 1
    assert 0 < len(AnswerStore(tmp_path / "answers", "model")) < 9
