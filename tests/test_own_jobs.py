"""Jobs of tables of one's own: a limit by table, models to be saved, and what changed since the submission."""

from __future__ import annotations

import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest
import small_table as small
from own_work import TABLE, needs_model

from experiments import batch, cells
from experiments.__main__ import main
from experiments.own import saved
from experiments.store import records
from slurm import launch
from slurm.__main__ import main as slurm
from slurm.__main__ import parser
from slurm.work import Work

CHANGED = "The model or the table was changed after this cell was submitted; submit it again."

TWO = """
from experiments import protocols
from experiments.spec import Perplexity, Run, Table

one = Table("one", "One", (None,), (({model!r},),), lambda m, model: Run(model, m, None, (Perplexity("ptb/test", 64),)))
two = Table("two", "Two", (None,), (({model!r},),), lambda m, model: Run(model, m, None, (protocols.named(("rte",)),)))
"""
HERE = ["--executor", "debug"]


def in_reverse(folder: Path) -> None:
    text = folder / "ptb/ptb_test.jsonl"
    text.write_text("".join(reversed(text.read_text().splitlines(keepends=True))))


@needs_model
def test_a_limit_is_for_the_tables_that_have_tasks(where, tmp_path, monkeypatch):
    path = tmp_path / "two.py"
    path.write_text(TWO.replace("{model!r}", repr(str(small.MODEL))))
    seen = {}
    monkeypatch.setattr(batch, "run_table", lambda table, cells, *_: seen.update({table: cells}) or batch.Outcome())
    words = [f"{path}:one", f"{path}:two", "--limit", "2", *where, *HERE]
    assert slurm(["submit", *words]) == 0
    assert {table: [getattr(cell.run.measures[0], "limit", 0) for cell in cells] for table, cells in seen.items()} == {
        "one": [None],
        "two": [2],
    }


@needs_model
def test_what_collects_tables_without_tasks_is_told_no_limit(where, tmp_path):
    from experiments import cli, selection
    from slurm.__main__ import _plan

    path = tmp_path / "two.py"
    path.write_text(TWO.replace("{model!r}", repr(str(small.MODEL))))
    asked = parser().parse_args(["submit", f"{path}:one", f"{path}:two", "--limit", "2", *where])
    cli.resolve(asked)
    chosen = selection.chosen(asked)
    assert _plan(asked, chosen[:1]).arguments["limit"] is None
    assert _plan(asked, chosen).arguments["limit"] == 2


@needs_model
@pytest.mark.parametrize("command", [main, slurm])
def test_models_are_saved_of_cells_that_have_a_record(command, mine, where, tmp_path, capsys):
    words = [str(mine), *where, "--method", "magnitude"]
    assert main(["run", *words]) == 0
    also = ["--save-models", str(tmp_path / "kept")]
    again = ["run", *words, *also] if command is main else ["submit", *words, *also, *HERE]
    assert command(again) == 0
    assert len(list((tmp_path / "kept/mine").glob("*/config.json"))) == 2
    capsys.readouterr()
    assert command(again) == 0
    assert ("0 done now, 2 before" if command is main else "cells submitted: 0") in capsys.readouterr().err


@needs_model
def test_models_of_cells_with_long_names_have_folders_with_room_for_more(tmp_path):
    table = replace(small.table(), label=lambda run: ("a long name " * 30, repr(run.method)))
    found = cells.cells(table.runs(), table)
    names = {place.name for place in saved.places(found, tmp_path, "tiny").values()}
    assert len(names) == len(found) - 1
    assert max(map(len, names)) < 140
    (tmp_path / "tiny" / f"as-it-was-called-{found[1].id}").mkdir(parents=True)
    assert saved.places(found, tmp_path, "tiny")[found[1].id].name == f"as-it-was-called-{found[1].id}"


@needs_model
def test_a_model_of_another_record_counts_for_none_and_is_not_written_over(mine, where, tmp_path, capsys, monkeypatch):
    seconds = count(10)
    monkeypatch.setattr(records, "now", lambda: f"2030-01-01T00:00:{next(seconds)}+00:00")
    words = ["run", str(mine), *where, "--only", "Magnitude 50 %"]
    kept = ["--save-models", str(tmp_path / "kept")]
    assert main([*words, *kept]) == 0
    (folder,) = (tmp_path / "kept/mine").iterdir()
    card = (folder / "README.md").read_text()
    in_reverse(tmp_path / "data")
    assert main(words) == 0
    capsys.readouterr()
    assert main([*words, *kept]) == 1
    assert f"{folder} already holds a model, of the record" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == card
    assert main([*words, "--save-models", str(tmp_path / "other")]) == 0
    assert main([*words, "--save-models", str(tmp_path / "other")]) == 0


@needs_model
@pytest.mark.parametrize("command", [main, slurm])
def test_a_model_whose_card_is_its_user_s_is_the_cell_s_all_the_same(command, mine, where, tmp_path, capsys):
    kept = ["--save-models", str(tmp_path / "kept"), "--only", "Magnitude 50 %"]
    words = ["run", str(mine), *where, *kept] if command is main else ["submit", str(mine), *where, *kept, *HERE]
    assert command(words) == 0
    (folder,) = (tmp_path / "kept/mine").iterdir()
    (folder / "README.md").write_text("My own model.")
    capsys.readouterr()
    assert command(words) == 0
    assert ("0 done now, 1 before" if command is main else "cells submitted: 0") in capsys.readouterr().err
    (folder / "record.json").unlink()
    command(words)
    assert not records.load_failures(tmp_path / "results", "mine")  # whose record stands
    assert len(records.load(tmp_path / "results", "mine")) == 1


def test_a_cell_that_failed_beside_its_record_leaves_no_failure_to_share(tmp_path):
    Work({"results": str(tmp_path)})._share_failures("other", ["id"], {"id": "first"})
    assert not records.load_failures(tmp_path, "other")


@needs_model
def test_a_job_whose_model_changed_since_its_submission_says_so(where, tmp_path, monkeypatch, capsys):
    model, path = tmp_path / "model", tmp_path / "mine.py"
    shutil.copytree(small.MODEL, model)
    path.write_text(TABLE.replace("{model!r}", repr(str(model))))

    def changed(*_: object) -> list[str]:
        small.edit(model / "config.json", '"model_type"', '"note": 1, "model_type"')
        return ["debug"]

    monkeypatch.setitem(launch.SENDERS, "debug", changed)
    assert slurm(["submit", str(path), *where, *HERE, "--only", "Magnitude 50 %"]) == 0
    (failure,) = records.load_failures(tmp_path / "results", "mine").values()
    assert failure.message == CHANGED
    capsys.readouterr()
    assert slurm(["status", str(path), *where, "--only", "Magnitude 50 %"]) == 1
    assert CHANGED in capsys.readouterr().out
    monkeypatch.setitem(launch.SENDERS, "debug", lambda *_: ["debug"])
    assert slurm(["submit", str(path), *where, *HERE, "--only", "Magnitude 50 %"]) == 0
    assert len(records.load(tmp_path / "results", "mine")) == 1
    assert not records.load_failures(tmp_path / "results", "mine")
