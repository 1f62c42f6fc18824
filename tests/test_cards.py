"""One command for several cards: as many processes, one of which is heard."""

from __future__ import annotations

import os

import pytest
import small_table as small
import torch
from own_work import TABLE

from experiments import cards
from experiments.__main__ import main
from experiments.store import records


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No launch around the test, and none of what it starts stays in the environment."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for name in ("PYTHONPATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))


def test_so_many_cards_are_there_or_the_way_out_is_told(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert not cards.wanted(1, None)
    assert cards.wanted(2, "cpu")
    assert main(["run", "embedded.demo", "--cards", "2"]) == 2
    assert "--cards 2 was given and this machine has 1 GPU; use fewer" in capsys.readouterr().err
    assert main(["run", "embedded.demo", "--cards", "2", "--device", "cuda:1"]) == 2
    assert "--device cuda:1 names one; drop one" in capsys.readouterr().err


def test_cells_are_chosen_before_cards_are_looked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("no cell is chosen"))
    assert main(["run", "embedded.demo", "--cards", "2", "--only", "Nothing 50 %"]) == 2
    assert "Unknown cell of this table 'nothing 50 %'" in capsys.readouterr().err


def test_in_a_launch_no_other_is_begun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not cards.wanted(2, "cpu")
    with pytest.raises(ValueError, match="--cards 3 was given to one of 2 launched processes"):
        cards.wanted(3, "cpu")


def test_the_status_is_that_of_the_command():
    assert cards.run(2, ["show", "no.such.table"]) == 2


@pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")
def test_two_processes_make_the_records_of_one(tmp_path, monkeypatch):
    table = tmp_path / "mine.py"
    table.write_text(TABLE.replace("{model!r}", repr(str(small.MODEL))))
    data = small.data(tmp_path / "data")
    for place, more in (("one", []), ("two", ["--cards", "2"])):
        words = ["run", str(table), "--results", str(tmp_path / place), "--data-dir", str(data), "--device", "cpu"]
        assert main([*words, *more]) == 0
    one, two = (records.load(tmp_path / place, "mine") for place in ("one", "two"))
    assert len(one) == 5
    assert {id: r.measures for id, r in one.items()} == {id: r.measures for id, r in two.items()}
    assert {id: r.achieved for id, r in one.items()} == {id: r.achieved for id, r in two.items()}
