"""What cells read is fetched while there is a network, and runs without one; what cannot be had is said."""

from __future__ import annotations

import fnmatch
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import small_table as small
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError
from test_hub import NAME, ONE, PULL, REPOSITORY, needs_model
from transformers import safetensors_conversion

from experiments import papers
from experiments.__main__ import main
from experiments.data import eval_tasks, sources
from experiments.data.corpora import _read
from experiments.measures import zero_shot
from experiments.models import hub
from experiments.models.catalogue import CATALOGUE, Model
from experiments.spec import Run, ZeroShot
from experiments.store import records

TEXTS = "made-up/texts"
pytestmark = needs_model


class Hub:
    """Serves folders by repository and name of a revision, as the client's cache keeps what it downloads."""

    def __init__(self, cache: Path, served: dict[tuple[str, str], tuple[str, Path]]) -> None:
        self.cache, self.served, self.gated = cache, served, False
        self.downloads: list[str] = []

    def _kept(self, repository: str, revision: str, kind: str, files: list[str]) -> Path:
        if self.gated:
            raise GatedRepoError("You must accept the licence.", response=SimpleNamespace(headers={}, request=None))
        commit, folder = self.served[repository, revision]
        place = self.cache / f"{kind}s--{repository.replace('/', '--')}"
        for file in files:
            (target := place / "snapshots" / commit / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file, target)
            self.downloads.append(file)
        (ref := place / "refs" / revision).parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        return place / "snapshots" / commit

    def hf_hub_download(self, repository, file, repo_type="model", revision="main"):
        if not self.gated and not (self.served[repository, revision][1] / file).is_file():
            raise EntryNotFoundError(f"no {file}")
        return str(self._kept(repository, revision, repo_type, [file]) / file)

    def snapshot_download(self, repository, revision, allow_patterns):
        every = [path.name for path in self.served[repository, revision][1].iterdir()]
        wanted = [name for name in every if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns)]
        return str(self._kept(repository, revision, "model", wanted))


@pytest.fixture
def served(tmp_path, monkeypatch) -> Hub:
    """An empty cache and a Hub of one model, whose weights are a conversion, and of one corpus."""
    data = small.data(tmp_path / "data")
    (pickled := tmp_path / "pickled").mkdir()
    shutil.copyfile(small.MODEL / "config.json", pickled / "config.json")
    (texts := tmp_path / "texts").mkdir()
    shutil.copyfile(data / "ptb/ptb_test.jsonl", texts / "test.jsonl")
    answers = {(REPOSITORY, "main"): (ONE, pickled), (REPOSITORY, "refs/pr/7"): (PULL, small.MODEL)}
    made = Hub(tmp_path / "cache", {**answers, (TEXTS, "main"): (ONE, texts)})
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("PRUNING_DATA_DIR", raising=False)
    monkeypatch.setattr(eval_tasks, "hub_reachable", lambda: True)
    monkeypatch.setattr(hub, "reachable", lambda: not constants.HF_HUB_OFFLINE)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", made.hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.snapshot_download)
    request = SimpleNamespace(author=hub.CONVERTER, git_reference="refs/pr/7")
    monkeypatch.setattr(safetensors_conversion, "previous_pr", lambda *_, **__: request)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(
        model_info=lambda repository, revision, timeout: SimpleNamespace(
            sha=made.served[repository, revision][0], siblings=[SimpleNamespace(rfilename="pytorch_model.bin")]
        ),
        dataset_info=lambda repository, revision, timeout: SimpleNamespace(sha=made.served[repository, revision][0]),
    ))  # fmt: skip
    source = replace(sources.SOURCES["ptb/test"], hub=(TEXTS, "main", ("test.jsonl",)))
    monkeypatch.setitem(sources.SOURCES, "ptb/test", source)
    monkeypatch.setitem(CATALOGUE, NAME, Model(NAME, REPOSITORY, dtype="float32"))
    table = replace(small.table((None,)), columns=((NAME,),), run=lambda m, model: Run(model, m, None, (small.PPL,)))
    monkeypatch.setitem(papers.TABLES, "tiny", table)
    for remembered in (hub._asked_weights, hub._asked_data, _read):
        remembered.cache_clear()
    yield made
    for remembered in (hub._asked_weights, hub._asked_data, _read):
        remembered.cache_clear()


def test_what_was_fetched_runs_without_a_network(served, tmp_path, monkeypatch, capsys):
    words = ["tiny", "--results", str(tmp_path / "results")]
    assert main(["show", *words]) == 0
    assert "Not on this machine: tiny-on-the-hub (made-up/tiny); ptb/test (made-up/texts)." in capsys.readouterr().out
    assert main(["prefetch", *words]) == 0
    told = capsys.readouterr()
    assert told.out == "Nothing is missing.\n"
    assert told.err == "Fetched tiny-on-the-hub.\nFetched ptb/test.\n"
    before = list(served.downloads)
    assert {"config.json", "model.safetensors", "tokenizer.json", "test.jsonl"} <= set(before)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for refused in ("HfApi", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, refused, None)
    for remembered in (hub._asked_weights, hub._asked_data, _read):
        remembered.cache_clear()
    assert main(["prefetch", *words]) == 0
    assert capsys.readouterr() == ("Nothing is missing.\n", "")
    assert hub.model_commit(REPOSITORY) == PULL
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", _cached(served))
    assert main(["run", *words, "--device", "cpu"]) == 0
    (record,) = records.load(tmp_path / "results", "tiny").values()
    assert record.spec["model"]["revision"] == PULL
    assert record.data["ptb/test"]["revision"] == ONE
    assert served.downloads == before


def _cached(served: Hub):
    """As the client finds files without a network."""

    def found(repository, file, repo_type="model", revision="main"):
        return str(served.cache / f"{repo_type}s--{repository.replace('/', '--')}" / "snapshots" / revision / file)

    return found


def test_what_is_here_in_part_is_fetched_again(served, tmp_path, capsys):
    words = ["tiny", "--results", str(tmp_path / "results")]
    assert main(["prefetch", *words]) == 0
    for name in ("model.safetensors", "tokenizer.json"):
        (served.cache / "models--made-up--tiny/snapshots" / PULL / name).unlink()
    assert hub.absent(REPOSITORY, PULL)[-1] == "weights"
    capsys.readouterr()
    assert main(["prefetch", *words]) == 0
    assert capsys.readouterr().err == "Fetched tiny-on-the-hub.\n"
    assert hub.absent(REPOSITORY, "main") == []


def test_a_shard_that_an_index_names_must_be_here(served):
    hub.fetch(REPOSITORY, "main")
    place = served.cache / "models--made-up--tiny/snapshots" / PULL
    (place / hub.WEIGHTS[1]).write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    assert hub.absent(REPOSITORY, "main") == ["weights"]


def test_what_cannot_be_had_is_lacking_with_its_reason(served, tmp_path, monkeypatch, capsys):
    words = ["prefetch", "tiny", "--results", str(tmp_path / "results")]
    served.gated = True
    assert main(words) == 1
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("Missing: tiny-on-the-hub (made-up/tiny): ")
    assert "You must accept the licence." in told[0]
    assert told[1].startswith("Missing: ptb/test (made-up/texts): ")
    assert len(told) == 2
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(words) == 1
    first = capsys.readouterr().out.splitlines()[0]
    assert first == "Missing: tiny-on-the-hub (made-up/tiny): the Hub does not answer, or HF_HUB_OFFLINE is set."


def test_files_of_a_data_folder_are_looked_for_and_no_others_fetched(served, tmp_path, capsys):
    words = ["prefetch", "tiny", "--results", str(tmp_path / "results"), "--data-dir"]
    assert main([*words, str(tmp_path / "data")]) == 0
    assert "test.jsonl" not in served.downloads
    (empty := tmp_path / "none").mkdir()
    capsys.readouterr()
    assert main([*words, str(empty)]) == 1
    assert capsys.readouterr().out == f"Missing: ptb/test (not in {empty}).\n"


def test_documents_are_read_as_a_measure_reads_them(served, tmp_path, monkeypatch, capsys):
    from eval import tasks

    what = ZeroShot(None, (("piqa", "acc"), ("boolq", "acc")))
    table = papers.TABLES["tiny"]
    monkeypatch.setitem(papers.TABLES, "tiny", replace(table, run=lambda m, model: Run(model, m, None, (what,))))
    asked = []
    monkeypatch.setattr(tasks, "load", lambda wanted, examples: asked.append((dict(wanted), examples)) or (
        {}, {"boolq": "its documents cannot be read: no route."}
    ))  # fmt: skip
    assert main(["prefetch", "tiny", "--results", str(tmp_path / "results")]) == 1
    assert asked == [({"piqa": {}, "boolq": {}}, 0)]
    told = capsys.readouterr()
    assert told.out == "Missing: documents of boolq: its documents cannot be read: no route.\n"
    assert told.err.splitlines()[-1] == "Task documents found: piqa."
    monkeypatch.setattr(eval_tasks, "hub_reachable", lambda: False)
    assert main(["prefetch", "tiny", "--results", str(tmp_path / "results")]) == 1
    assert capsys.readouterr().out == "Missing: documents of piqa, boolq (the Hub cannot be reached).\n"
    assert zero_shot.documents(["piqa"], None)[1]
