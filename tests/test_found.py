"""A record of other texts is never taken for the run's own number; one of other code is told."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path

import pytest
import small_table as small

import pruners
from analysis.__main__ import main as analysis
from experiments import cells
from experiments.__main__ import main
from experiments.batch import run_table
from experiments.settings import Settings
from experiments.spec import ZeroShot
from experiments.store import code, found, records

pytestmark = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")
METHODS = (None, pruners.Magnitude(sparsity=0.5))
CALIBRATED = (pruners.Wanda(sparsity=0.5), pruners.GBLM(sparsity=0.5))
PTB, C4 = "ptb/ptb_test.jsonl", "c4/c4_en_train_docs_0000-0799.jsonl"


@pytest.fixture
def data(tmp_path) -> Path:
    return small.data(tmp_path / "data")


def turned(data: Path, name: str) -> Path:
    """Another data folder, where the lines of this file stand in reverse."""
    other = data.with_name("turned")
    shutil.copytree(data, other)
    (other / name).write_text("".join(reversed((data / name).read_text().splitlines(keepends=True))))
    return other


def values(root: Path) -> dict[str, float]:
    """By method."""
    found = records.load(root, "tiny").values()
    return {str(r.spec["method"] and r.spec["method"]["name"]): r.measures[small.PPL.key]["perplexity"] for r in found}


@pytest.mark.parametrize(("methods", "name"), [(METHODS, PTB), (CALIBRATED, PTB), (CALIBRATED, C4)])
def test_other_texts_give_their_own_numbers(tmp_path, data, methods, name, capsys):
    root, other = tmp_path / "r", turned(data, name)
    assert len(small.run(root, data, methods).done) == len(methods)
    first = values(root)
    capsys.readouterr()
    again = small.run(root, other, methods)
    assert (len(again.done), again.found) == (len(methods), [])
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "rerunning" in line]
    assert line.startswith(
        f"{'ptb/test' if name == PTB else 'c4/train'} ({name}) differs from the text that the record of "
    )
    small.run(tmp_path / "fresh", other, methods)
    assert values(root) == values(tmp_path / "fresh")
    assert all(first[method] != value for method, value in values(root).items())
    assert small.run(root, other, methods).done == []


def test_a_file_that_is_replaced_in_its_folder_is_read_anew_by_the_same_process(tmp_path, data):
    root, other = tmp_path / "r", turned(data, PTB)
    small.run(root, data, METHODS)
    first = values(root)
    shutil.copy(other / PTB, data / PTB)
    assert len(small.run(root, data, METHODS).done) == 2
    small.run(tmp_path / "fresh", other, METHODS)
    assert first != values(root) == values(tmp_path / "fresh")


def test_only_what_reads_the_other_text_is_made_again(tmp_path, data):
    methods = (*METHODS, *CALIBRATED)
    small.run(tmp_path / "r", data, methods)
    outcome = small.run(tmp_path / "r", turned(data, C4), methods)
    assert (outcome.found, outcome.done) == (["Dense", "Magnitude 50 %"], ["Wanda 50 %", "GBLM 50 %"])


def test_equal_texts_in_another_place_are_the_same(tmp_path, data):
    small.run(tmp_path / "r", data, METHODS)
    shutil.copytree(data, tmp_path / "elsewhere")
    assert small.run(tmp_path / "r", tmp_path / "elsewhere", METHODS).done == []


def test_a_text_that_is_not_here_leaves_the_record_alone(tmp_path, data):
    small.run(tmp_path / "r", data, METHODS)
    (tmp_path / "empty").mkdir()
    assert small.run(tmp_path / "r", tmp_path / "empty", METHODS).found == ["Dense", "Magnitude 50 %"]


PIQA = [{"goal": f"Goal {n}", "sol1": f"one {n}", "sol2": f"two {n}", "label": n % 2} for n in range(8)]


def test_other_documents_of_a_task_count_as_other_texts(tmp_path, data, capsys):
    measures = (small.PPL, ZeroShot(None, (("piqa", "acc"),)))
    documents = data / "tasks/piqa_validation.jsonl"
    documents.parent.mkdir()
    documents.write_text("".join(json.dumps(row) + "\n" for row in PIQA))
    found_cells = cells.cells(small.table((None,), measures=measures).runs())

    def run() -> list[str]:
        return run_table("tiny", found_cells, Settings(tmp_path / "r", data_dir=data)).done

    assert run() == ["Dense"]
    (before,) = records.load(tmp_path / "r", "tiny").values()
    assert run() == []
    documents.write_text("".join(json.dumps({**row, "label": 0}) + "\n" for row in PIQA))
    capsys.readouterr()
    assert run() == ["Dense"]
    assert (
        "piqa (piqa_validation.jsonl) differs from the text that the record of Dense was made from"
        in capsys.readouterr().err
    )
    (after,) = records.load(tmp_path / "r", "tiny").values()
    assert before.measures["piqa.acc@0shot"]["documents_sha256"] != after.measures["piqa.acc@0shot"]["documents_sha256"]


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        ({"files": {"a": "1"}, "rows": 3}, {"files": {"b": "1"}}, True),
        ({"files": {"a": "1"}}, {"files": {"a": "2"}}, False),
        ({"version": "1", "files": {"a": "1"}}, {"version": "2", "files": {"a": "1"}}, True),
        ({"dataset": "d", "revision": "1", "files": ["a"]}, {"dataset": "d", "revision": "2", "files": ["a"]}, False),
        ({"dataset": "d", "revision": "1", "files": ["a"]}, {"files": {"a": "1"}}, False),
        ({"source": "hub"}, {"source": "hub"}, True),
        ({"source": "hub"}, {"source": "files", "sha256": {"a": "1"}}, False),
        ({"sha256": {"a": "1", "b": "2"}}, {"sha256": {"a": "2", "b": "1"}}, False),
    ],
)  # fmt: skip
def test_what_makes_two_origins_one(one, other, equal):
    assert found.same_text(one, other) is equal


@pytest.fixture
def tiny_table(monkeypatch):
    from experiments import papers

    monkeypatch.setitem(papers.TABLES, "tiny", small.table(METHODS))


def of_other_code(root: Path, table: str, change: dict) -> None:
    """The records as if other code had made them."""
    for record in records.load(root, table).values():
        records.write(record.model_copy(update=change), root)


def test_other_and_unknown_code_is_told_and_made_again_on_demand(tmp_path, data, capsys, tiny_table):
    words = ["run", "tiny", "--results", str(tmp_path), "--data-dir", str(data)]
    main(words)
    assert "made by" not in capsys.readouterr().err
    main(words)
    assert "Of the records found" not in capsys.readouterr().err
    (dense, magnitude) = sorted(records.load(tmp_path, "tiny").values(), key=lambda r: r.spec["method"] is not None)
    records.write(magnitude.model_copy(update={"code": {**magnitude.code, "method": "0" * 16}}), tmp_path)
    records.write(dense.model_copy(update={"code": {}}), tmp_path)
    main(words)
    said = capsys.readouterr().err
    assert "Of the records found, 1 made by a different version of their method's or measures' code and 1 made" in said
    assert "before records stored the version of this code: --again reruns them." in said
    assert "0 done now, 2 before" in said
    main([*words, "--again"])
    assert "2 done now, 0 before" in capsys.readouterr().err
    main([*words, "--again"])
    assert "0 done now, 2 before" in capsys.readouterr().err
    assert {code.made_by(r.code, c.run) for r, c in _pairs(tmp_path)} == {"same"}


def _pairs(root):
    made = records.load(root, "tiny")
    return [(made[cell.id], cell) for cell in cells.cells(small.table(METHODS).runs())]


def test_a_record_of_an_earlier_day_still_verifies():
    (path, *_) = sorted((Path(__file__).parents[1] / "results/runs").glob("*/*.json"))
    assert records.read(path).code == {} or "method" in records.read(path).code


def test_gzipped_texts_are_compared_as_files(tmp_path, data):
    small.run(tmp_path / "r", data, METHODS)
    zipped = data.with_name("zipped")
    shutil.copytree(data, zipped)
    (zipped / f"{PTB}.gz").write_bytes(gzip.compress((zipped / PTB).read_bytes()))
    (zipped / PTB).unlink()
    assert len(small.run(tmp_path / "r", zipped, METHODS).done) == 2


def shown(root: Path, capsys, *words: str) -> str:
    capsys.readouterr()
    assert analysis(["table", "tiny", "--results", str(root), *words]) == 0
    return capsys.readouterr().out


def test_a_table_marks_what_other_code_made(tmp_path, data, capsys, tiny_table):
    small.run(tmp_path, data, METHODS)
    assert "†" not in shown(tmp_path, capsys)
    (magnitude,) = [r for r in records.load(tmp_path, "tiny").values() if r.spec["method"]]
    records.write(magnitude.model_copy(update={"code": {**magnitude.code, "method": "0" * 16}}), tmp_path)
    text = shown(tmp_path, capsys)
    assert "Magnitude †" in text
    assert "Dense †" not in text
    assert (
        "† made by a different version of the method's or measures' code: Magnitude 50 %; python -m "
        "experiments run" in text
    )
    with (tmp_path / "tiny.csv").open() as file:
        assert [row["code"] for row in csv.DictReader(file)] == ["same", "other"]
    records.write(magnitude.model_copy(update={"code": {}}), tmp_path)
    text = shown(tmp_path, capsys)
    assert "Magnitude †" in text
    assert (
        "† made before records stored the version of the method's and measures' code: Magnitude 50 %; python -m "
        "experiments run" in text
    )


def test_a_table_withholds_numbers_of_other_texts_where_it_is_told_which(
    tmp_path, data, capsys, tiny_table, monkeypatch
):
    monkeypatch.delenv("PRUNING_DATA_DIR", raising=False)
    small.run(tmp_path, data, METHODS)
    number = f"{values(tmp_path)['magnitude']:.2f}"
    other = turned(data, PTB)
    assert number in shown(tmp_path, capsys)
    assert number in shown(tmp_path, capsys, "--data-dir", str(data))
    text = shown(tmp_path, capsys, "--data-dir", str(other))
    assert number not in text
    assert f"made from a different ptb/test ({PTB}) than the one in --data-dir: Dense, Magnitude 50 %." in text
    assert f"--data-dir {other}" in text.strip().splitlines()[-1]  # the command that makes them
    monkeypatch.setenv("PRUNING_DATA_DIR", str(other))
    assert number not in shown(tmp_path, capsys)
