"""A colleague's records are checked before they are believed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from experiments.__main__ import main
from experiments.store import audit, records

RESULTS = Path(__file__).resolve().parents[1] / "results"
TABLE = "embedded.flap"


@pytest.fixture
def root(tmp_path) -> Path:
    shutil.copytree(RESULTS / "runs" / TABLE, tmp_path / "runs" / TABLE)
    return tmp_path


def test_the_committed_records_are_believed_and_fill_their_tables(capsys):
    assert main(["check-records", str(RESULTS)]) == 0
    assert ", 0 faults." in capsys.readouterr().out
    found = audit.audit(RESULTS)
    filled, count = found.filled[TABLE]
    assert filled == count > 0


def test_a_file_that_was_edited_is_told(root, capsys):
    path = next((root / "runs" / TABLE).glob("*.json"))
    content = json.loads(path.read_text())
    content["achieved"]["sparsity"] = 0.99
    path.write_text(json.dumps(content))
    assert main(["check-records", str(root)]) == 1
    assert f"{TABLE}/{path.name}: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"perplexity": 0.5}, "a perplexity of 0.5; it is 1 or more"),
        ({"perplexity": 40.0, "nll_per_window": [1.0, 1.0]}, "but its own windows give 2.7183"),
        ({"score": 1.5}, "an accuracy of 1.5, which is not between 0 and 1"),
    ],
)
def test_values_that_cannot_be_are_told(root, change, said):
    record = next(iter(records.load(root, TABLE).values()))
    key = next(iter(record.measures))
    changed = record.model_copy(update={"measures": {key: change}})
    assert [said in fault for fault in audit.faults(changed)] == [True]


def test_a_table_of_somebody_else_s_and_an_empty_folder(root, tmp_path, capsys):
    (root / "runs" / TABLE).rename(root / "runs/theirs")
    assert main(["check-records", str(root)]) == 1  # their ids are those of another table
    assert "theirs" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    assert main(["check-records", str(tmp_path / "empty")]) == 1
    assert "has no records" in capsys.readouterr().err
