"""`experiments compare`, and windows that fit a model."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest
import small_table as small
from families import tiny
from own_work import SHORT, needs_model

import pruners
from experiments import models
from experiments.__main__ import main
from experiments.models import lengths
from experiments.spec import Perplexity, Run, Windows
from experiments.store import records
from pruners.interface.suggest import UsageError


@needs_model
def test_methods_are_compared_without_a_file(ria, where, tmp_path, capsys, monkeypatch):
    other = small.data(tmp_path / "other")
    texts = (other / "ptb/ptb_test.jsonl").read_text().splitlines(keepends=True)
    (other / "ptb/ptb_test.jsonl").write_text("".join(reversed(texts)))
    monkeypatch.setenv("PRUNING_DATA_DIR", str(other))  # whose texts are not those of --data-dir
    words = f"--methods magnitude ria flap --plugin {ria} --settings 0.3 2:4 --seeds 2 {SHORT} --name beside"
    assert main(["compare", str(small.MODEL), *shlex.split(words), *where]) == 0
    written = {path.name for path in (tmp_path / "results").glob("beside*")}
    assert {"beside.py", "beside.md", "beside.tex", "beside.csv", "beside.svg"} <= written
    assert len(records.load(tmp_path / "results", "beside")) == 9  # dense, 2 x magnitude, 2 x 2 x ria, 2 x flap
    text = (tmp_path / "results/beside.md").read_text()
    assert "| RIA " in text
    capsys.readouterr()
    assert main(["compare", str(small.MODEL), *shlex.split(words.replace("0.3", "0.4")), *where]) == 2
    assert "declares a different comparison" in capsys.readouterr().err


def test_a_comparison_of_nonsense_is_refused(tmp_path, capsys):
    where = ["--results", str(tmp_path)]
    assert main(["compare", "llama-7b", "--methods", "wanda", "--settings", "half", *where]) == 2
    assert "'half' is not a setting" in capsys.readouterr().err
    assert main(["compare", "llama-7b", "--methods", "wnda", "--settings", "0.5", *where]) == 2
    assert "Unknown method 'wnda'" in capsys.readouterr().err
    words = ["--methods", "magnitude", "random", "--settings", "0.5", "--nsamples", "3"]
    assert main(["compare", "llama-7b", *words, *where]) == 2
    assert "None of magnitude, random uses calibration text; leave out --nsamples." in capsys.readouterr().err


@needs_model
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("../evil", "The table '../evil' of --name needs a name that can be a folder"),
        ("n" * 101, "of --name needs a name that can be a folder: at most 100 letters"),
        ("flap.perplexity", "is called like one of the papers' tables"),
        ("bytes", "bytes.py is no file that compare wrote or can read; choose another --name"),
        ("folder", "folder.py is no file that compare wrote or can read; choose another --name"),
        ("n" * 300, "of --name needs a name that can be a folder: at most 100 letters"),
    ],
)
def test_a_comparison_whose_file_has_no_place_is_refused_and_writes_nothing(name, said, where, tmp_path, capsys):
    (tmp_path / "results/folder.py").mkdir(parents=True)
    (tmp_path / "results/bytes.py").write_bytes(b"\xff\xfe")
    before = sorted(tmp_path.rglob("*"))
    words = f"--methods magnitude --settings 0.5 --measure ptb/test@64[:4] --name {name}"
    assert main(["compare", str(small.MODEL), *shlex.split(words), *where]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert len(err.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@needs_model
@pytest.mark.parametrize("long", ["--seqlen 5000", "--measure ptb/test@99999"])
def test_a_comparison_whose_windows_are_too_long_for_a_model_is_refused_before_any_work(long, where, tmp_path, capsys):
    words = ["--methods", "magnitude", "wanda", "--settings", "0.5", *shlex.split(long)]
    assert main(["compare", str(small.MODEL), *words, *where]) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "the context length of hf is 512; use shorter windows." in told
    assert not (tmp_path / "results").exists()


@needs_model
def test_cells_whose_windows_are_too_long_fail_before_the_model_is_loaded_and_the_others_run(
    mine, where, tmp_path, capsys, monkeypatch
):
    small.edit(mine, '(Perplexity("ptb/test", 64, 4),)', '(Perplexity("ptb/test", 64 if sparsity < 0.4 else 513, 4),)')
    loaded: list[object] = []
    load = models.load
    monkeypatch.setattr(models, "load", lambda *a, **k: loaded.append(a) or load(*a, **k))
    assert main(["run", str(mine), *where, "--method", "magnitude"]) == 1
    assert "magnitude 50 %: failed: perplexity ptb/test@513[:4] takes 513 tokens" in capsys.readouterr().err.lower()
    assert len(loaded) == 1
    assert len(records.load(tmp_path / "results", "mine")) == 1


@pytest.mark.parametrize(
    ("family", "room", "calibrated"), [("bloom", 0, 0), ("llama", 64, 64), ("chatglm", 62, 64), ("mpt", 0, 64)]
)
def test_windows_fit_the_family_of_the_model(family, room, calibrated, tmp_path):
    tiny(family).save_pretrained(tmp_path / family)
    run = Run(str(tmp_path / family), pruners.Wanda(), Windows("c4/train", 1, 8), ())
    for limit, long in (
        (room, lambda length: replace(run, measures=(Perplexity("ptb/test", length),))),
        (calibrated, lambda length: replace(run, windows=Windows("c4/train", 1, length))),
    ):
        lengths.check(long(limit or 10**6))
        if limit:
            with pytest.raises(UsageError, match=f"context length of {family} is {limit};"):
                lengths.check(long(limit + 1))


def test_what_mpt_calls_its_context_counts_where_nothing_else_is_said(tmp_path):
    model = tiny("llama")
    model.config.max_seq_len = 32
    model.save_pretrained(tmp_path / "both")
    lengths.check(Run(str(tmp_path / "both"), pruners.Wanda(), Windows("c4/train", 1, 64), ()))
