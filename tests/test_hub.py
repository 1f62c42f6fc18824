"""A Hub model is the commit that is loaded: found in the local cache, or asked of the Hub once."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_table as small
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import safetensors_conversion

import pruners
from experiments import cells, models
from experiments.batch import run_table
from experiments.models import hub
from experiments.models.catalogue import CATALOGUE, Model
from experiments.settings import Settings
from experiments.spec import Run
from experiments.store import records

needs_model = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")
NAME, REPOSITORY = "tiny-on-the-hub", "made-up/tiny"
ONE, TWO, PULL = "1" * 40, "2" * 40, "3" * 40


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch) -> Path:
    """The folder of the repository in an empty cache, without a network; the model is in the catalogue."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setitem(CATALOGUE, NAME, Model(NAME, REPOSITORY, dtype="float32"))
    hub._asked_weights.cache_clear()
    yield tmp_path / "cache/models--made-up--tiny"
    hub._asked_weights.cache_clear()


def snapshot(place: Path, commit: str, scale: float = 1.0) -> None:
    folder = place / "snapshots" / commit
    shutil.copytree(small.MODEL, folder, copy_function=shutil.copyfile)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file({**weights, name: scale * weights[name]}, folder / "model.safetensors", metadata={"format": "pt"})


def point(place: Path, commit: str, ref: str = "main") -> None:
    (place / "refs" / ref).parent.mkdir(parents=True, exist_ok=True)
    (place / "refs" / ref).write_text(commit)


def query() -> torch.Tensor:
    return models.load(NAME)[0].model.layers[0].self_attn.q_proj.weight


@needs_model
def test_the_commit_that_main_stands_for_is_the_identity_and_is_loaded(offline):
    snapshot(offline, ONE)
    snapshot(offline, TWO, scale=2.0)
    point(offline, ONE)
    assert models.identity(NAME) == {"hub": REPOSITORY, "revision": ONE}
    first = query()
    point(offline, TWO)
    assert models.identity(NAME) == {"hub": REPOSITORY, "revision": TWO}
    assert models.commit(NAME) == TWO
    assert torch.equal(query(), 2 * first)


@needs_model
def test_weights_that_moved_get_their_own_records(offline, tmp_path):
    data = small.data(tmp_path / "data")
    snapshot(offline, ONE)
    snapshot(offline, TWO, scale=2.0)

    def run() -> list[str]:
        runs = [Run(NAME, method, small.WINDOWS, (small.PPL,)) for method in (None, pruners.Wanda(sparsity=0.5))]
        return run_table("tiny", cells.cells(runs), Settings(tmp_path / "r", data_dir=data)).done

    point(offline, ONE)
    assert (len(run()), len(run())) == (2, 0)
    point(offline, TWO)
    assert (len(run()), len(run())) == (2, 0)
    made = records.load(tmp_path / "r", "tiny").values()
    assert sorted(r.spec["model"]["revision"] for r in made) == [ONE, ONE, TWO, TWO]
    assert all(r.made_by.model_commit == r.spec["model"]["revision"] for r in made)
    assert len({r.measures[small.PPL.key]["perplexity"] for r in made}) == 4


def test_a_model_of_no_known_commit_is_refused_in_one_sentence(tmp_path):
    assert models.identity(NAME) == {"hub": REPOSITORY, "revision": "main"}
    assert models.commit(NAME) is None
    with pytest.raises(OSError, match=r"^tiny-on-the-hub means made-up/tiny at main, and its commit is unknown"):
        models.load(NAME)


@pytest.mark.parametrize("text", ["", "main", "1" * 39, "../../etc"])
def test_a_damaged_ref_is_no_commit(offline, text):
    point(offline, text)
    assert models.commit(NAME) is None


@needs_model
def test_a_conversion_that_is_here_stands_for_pickled_weights(offline):
    snapshot(offline, PULL)
    (offline / "snapshots" / ONE).mkdir()
    point(offline, ONE)
    point(offline, PULL, "refs/pr/7")
    assert models.commit(NAME) == PULL
    assert models.load(NAME)[0].num_parameters() == 260_032


def test_a_pinned_commit_is_never_asked_for():
    assert models.identity("llama-2-7b")["revision"] == CATALOGUE["llama-2-7b"].revision


class Api:
    """A Hub of one repository with a conversion waiting in its request 7."""

    files: tuple[str, ...] = ()
    asked: int = 0

    def model_info(self, repository, revision, timeout):
        Api.asked += 1
        shown = [SimpleNamespace(rfilename=name) for name in self.files]
        return SimpleNamespace(sha={"main": ONE, "refs/pr/7": PULL}[revision], siblings=shown)


@pytest.mark.parametrize(
    ("files", "author", "expected"),
    [
        (("model.safetensors",), None, ONE),
        (("pytorch_model.bin",), "SFconvertbot", PULL),
        (("pytorch_model.bin",), "somebody", ONE),
        (("pytorch_model.bin",), None, ONE),
    ],
)
def test_the_hub_is_asked_once_for_what_was_never_downloaded(monkeypatch, files, author, expected):
    request = SimpleNamespace(author=author, git_reference="refs/pr/7") if author else None
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr(Api, "files", files)
    monkeypatch.setattr(Api, "asked", 0)
    monkeypatch.setattr(safetensors_conversion, "previous_pr", lambda *_, **__: request)
    assert models.identity(NAME)["revision"] == expected
    before = Api.asked
    assert models.commit(NAME) == expected
    assert Api.asked == before


@pytest.mark.parametrize("refusal", [ConnectionError, *HfHubHTTPError.__bases__])
def test_a_hub_that_refuses_leaves_the_commit_unknown(monkeypatch, refusal):
    """Also by an error of the HTTP client that huggingface_hub uses, whichever that is."""

    def refuse(*_, **__):
        raise refusal("no route")

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", refuse)
    hub._asked_data.cache_clear()
    assert models.commit(NAME) is None
    assert hub.data_commit("made-up/texts", "main") is None
    hub._asked_data.cache_clear()


def test_the_commit_of_a_data_set_comes_from_the_cache(offline):
    point(offline.with_name("datasets--made-up--texts"), ONE, "refs/convert/parquet")
    assert hub.data_commit("made-up/texts", "refs/convert/parquet") == ONE
    assert hub.data_commit("made-up/texts", "main") is None
    assert hub.data_commit("made-up/texts", TWO) == TWO


@pytest.mark.parametrize("damage", ["{", "{}", "null", "1" * 5000, "[" * 200_000])
def test_an_index_that_is_damaged_is_named(tmp_path, damage):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(damage)
    with pytest.raises(ValueError, match=f"{index} does not say which file holds which weight; remove it"):
        hub._shards(index)
