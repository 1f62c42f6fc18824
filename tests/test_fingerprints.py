"""A folder's fingerprint covers every byte of its weights; its digests are remembered and never believed blindly."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from conftest import CONFIGS, tiny
from safetensors.torch import load_file, save_file

from experiments import models
from experiments.models import digests
from experiments.models.fingerprint import fingerprint
from pruners import checkpoint

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def remembered(tmp_path, monkeypatch) -> Path:
    """Where digests are remembered in these tests; a file counts as settled at once."""
    monkeypatch.setattr(digests, "folder", lambda: tmp_path / "digests")
    monkeypatch.setattr(digests, "_known", {})
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    return tmp_path / "digests"


@pytest.fixture
def counted(monkeypatch) -> list[str]:
    """Names of the files that were really read."""
    read: list[str] = []
    compute = digests._computed
    monkeypatch.setattr(digests, "_computed", lambda path, state: (read.append(path.name), compute(path, state))[1])
    return read


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny("llama grouped-query").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(path: Path, name: str) -> None:
    """One number of that tensor, by one bit."""
    weights = load_file(path)
    weights[name].view(torch.int32).view(-1)[-1] ^= 1
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", CONFIGS)
def test_checkpoints_that_differ_in_one_tensor_have_two_fingerprints(kind, tmp_path):
    tiny(kind).save_pretrained(tmp_path / "0")
    names = list(load_file(tmp_path / "0" / WEIGHTS))
    for name in names:
        shutil.copytree(tmp_path / "0", tmp_path / name)
        change(tmp_path / name / WEIGHTS, name)
    assert len({fingerprint(tmp_path / name) for name in ("0", *names)}) == 1 + len(names)


def test_the_middle_of_a_large_file_counts(tmp_path):
    torch.manual_seed(0)
    weights = {f"{n}": torch.randn(256, 1024) for n in range(8)}  # 8 MiB
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    save_file(weights, tmp_path / "model" / WEIGHTS)
    before = fingerprint(tmp_path / "model")
    weights["4"][128, 512] += 1
    save_file(weights, tmp_path / "model" / WEIGHTS)
    assert fingerprint(tmp_path / "model") != before


def test_every_weight_file_and_every_small_file_counts(tmp_path, folder):
    sharded = tmp_path / "sharded"
    tiny("llama grouped-query").save_pretrained(sharded, max_shard_size="50KB")
    (sharded / "tokenizer.json").write_text("{}")
    files = sorted(sharded.iterdir())
    assert len([path for path in files if path.suffix == ".safetensors"]) > 2
    seen = {fingerprint(sharded)}
    for path in files:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        if path.name.endswith("index.json"):
            content = bytearray(path.read_bytes() + b"\n")
        path.write_bytes(content)
        seen.add(fingerprint(sharded))
    assert len(seen) == 1 + len(files)


def test_the_fingerprint_of_a_folder_is_that_of_names_and_digests(folder):
    digests_of = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    lines = [f"{name}\0{digest}\n" for name, digest in sorted(digests_of.items())]
    assert fingerprint(folder) == hashlib.sha256("".join(lines).encode()).hexdigest()


@pytest.fixture
def deep(tmp_path) -> Path:
    """A folder whose last file of weights lies in a subfolder, where its index says."""
    place = tmp_path / "deep"
    tiny("llama grouped-query").save_pretrained(place, max_shard_size="50KB")
    (place / "sub").mkdir()
    last = max(path.name for path in place.glob("*.safetensors"))
    (place / last).rename(place / "sub" / last)
    rename_shard(place, last, f"sub/{last}")
    return place


def rename_shard(folder: Path, old: str, new: object) -> None:
    index = folder / f"{WEIGHTS}.index.json"
    told = json.loads(index.read_text())
    told["weight_map"] = {name: new if file == old else file for name, file in told["weight_map"].items()}
    index.write_text(json.dumps(told))


def test_a_weight_file_in_a_subfolder_counts_where_the_index_names_it(deep):
    before = models.identity(deep)
    (path,) = (deep / "sub").iterdir()
    change(path, next(iter(load_file(path))))
    assert models.identity(deep) != before
    path.rename(deep / "sub/other.safetensors")
    with pytest.raises(FileNotFoundError, match=rf"lacks 1 of its \d+ weight files, e.g. sub/{path.name}"):
        models.identity(deep)


@pytest.mark.parametrize("name", ["../model/model.safetensors", "sub/../../model/model.safetensors", "/absolute", 5])
def test_an_index_that_names_no_file_within_the_folder_is_refused(deep, folder, name):
    index = deep / f"{WEIGHTS}.index.json"
    told = json.loads(index.read_text())
    index.write_text(json.dumps({**told, "weight_map": dict.fromkeys(told["weight_map"], name)}))
    with pytest.raises(ValueError, match=r"names .* as a file of weights, which is none within the folder"):
        models.identity(deep)


def test_a_fingerprint_is_of_the_content_wherever_it_lies(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "link").symlink_to(folder)
    assert fingerprint(folder) == fingerprint(tmp_path / "copy") == fingerprint(tmp_path / "link")


def test_a_file_is_read_once(folder, counted, monkeypatch):
    first = fingerprint(folder)
    assert WEIGHTS in counted
    counted.clear()
    monkeypatch.setattr(digests, "_known", {})  # as another process
    assert fingerprint(folder) == first
    assert counted == []


def test_a_rewrite_of_the_same_size_with_its_time_put_back_is_noticed(folder):
    path, before = folder / WEIGHTS, fingerprint(folder)
    held = path.stat()
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)  # in place: the inode stays
    os.utime(path, ns=(held.st_atime_ns, held.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns, path.stat().st_ino) == (
        held.st_size, held.st_mtime_ns, held.st_ino,
    )  # fmt: skip
    assert fingerprint(folder) != before


def test_a_file_that_has_just_changed_is_not_remembered(folder, remembered, monkeypatch, counted):
    monkeypatch.setattr(digests, "SETTLED_NS", 10**12)
    fingerprint(folder)
    assert not remembered.exists()
    counted.clear()
    fingerprint(folder)
    assert WEIGHTS in counted


@pytest.mark.parametrize("damage", [b"", b"{}", b"[" * 200_000, b"null", b"\xff\xfe"])
def test_a_damaged_memory_is_computed_again(folder, remembered, damage, monkeypatch):
    before = fingerprint(folder)
    for path in remembered.iterdir():
        path.write_bytes(damage)
    monkeypatch.setattr(digests, "_known", {})
    assert fingerprint(folder) == before


def test_every_flipped_byte_of_a_memory_is_noticed(folder, remembered, monkeypatch):
    before = digests.sha256(folder / WEIGHTS)
    (path,) = remembered.iterdir()
    whole = path.read_bytes()
    for at in range(len(whole)):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        monkeypatch.setattr(digests, "_known", {})
        assert digests.sha256(folder / WEIGHTS) == before


def test_writers_at_once_leave_a_memory_that_is_whole(folder, counted, monkeypatch):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(fingerprint(folder))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counted.clear()
    monkeypatch.setattr(digests, "_known", {})
    assert {*found, fingerprint(folder)} == {found[0]}
    assert counted == []


def test_without_a_place_to_remember_digests_are_computed(folder, monkeypatch):
    monkeypatch.setattr(digests, "folder", lambda: Path("/proc/nowhere"))
    first = fingerprint(folder)
    monkeypatch.setattr(digests, "_known", {})
    assert fingerprint(folder) == first


def test_an_old_file_beside_newer_shards_is_refused_everywhere(folder):
    tiny("llama grouped-query", seed=1).save_pretrained(folder, max_shard_size="50KB")
    assert (folder / WEIGHTS).is_file()  # transformers leaves both
    both = r"two sets of weights, model\.safetensors beside model-00001-of-0000\d\.safetensors and \d more"
    for opened in (models.load, models.find, models.identity, fingerprint, checkpoint.load):
        with pytest.raises(ValueError, match=both):
            opened(folder)
    (folder / WEIGHTS).unlink()
    fingerprint(folder)


def test_shards_of_an_older_save_beside_those_of_the_index_are_refused(tmp_path):
    tiny("llama grouped-query").save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "model-00001-of-00099.safetensors").write_bytes((next(tmp_path.glob("*.safetensors"))).read_bytes())
    for opened in (models.find, fingerprint, checkpoint.load):
        with pytest.raises(ValueError, match=r"two sets of weights, .* beside model-00001-of-00099\.safetensors"):
            opened(tmp_path)


def test_an_index_whose_shards_are_gone_leaves_the_one_file(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert checkpoint.load(folder)[0].num_parameters() > 0
    (folder / WEIGHTS).rename(folder / "model-00002-of-00002.safetensors")
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of its 1 weight files, e\.g\. model-00001-of-00002"):
        checkpoint.load(folder)


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": {}}}'])
def test_an_index_that_says_nothing_is_named(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json does not say which file holds which weight"):
        fingerprint(folder)
