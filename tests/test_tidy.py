"""The tidy table of all records: a row for each measured value, equal to the records."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import made_up
import pandas as pd
import pytest
import small_table as small

import analysis
import pruners
from analysis import tidy
from analysis.__main__ import main
from experiments import papers
from experiments.labels import labels, seed_of
from experiments.spec import Run, Windows
from experiments.store import code, records
from pruners.weights.storage import StorageError

RESULTS = Path(__file__).resolve().parents[1] / "results"


@pytest.fixture(scope="module")
def made() -> pd.DataFrame:
    return analysis.frame(RESULTS)


def test_every_perplexity_of_every_record_is_a_row(made):
    tables = [folder.name for folder in (RESULTS / "runs").iterdir()]
    expected = {
        (record.table, record.id, key): (value["perplexity"], value["standard_error"])
        for table in tables
        for record in records.load(RESULTS, table).values()
        for key, value in record.measures.items()
        if "perplexity" in value
    }
    rows = made[made.metric == "perplexity"]
    assert {(r.table, r.id, r.measure): (r.value, r.standard_error) for r in rows.itertuples()} == expected
    assert len(rows) == len(expected) > 100


def test_rows_carry_the_papers_words_hyperparameters_seed_and_cost(made):
    row = made[(made.table == "embedded.gblm") & (made.label == "Wanda") & (made.setting == "2:4") & (made.seed == 1)]
    row = row[row.metric == "perplexity"].squeeze()
    assert (row.model, row.method, row["method.pattern"], row["windows.count"]) == ("smollm2-135m", "wanda", "2:4", 32)
    assert 0.49 < row.sparsity < 0.51
    assert row.seconds > 0
    assert row.commit


def test_every_declared_cell_has_its_words(made):
    assert (made.label != "").all()


def test_experiments_of_one_name_are_told_apart(monkeypatch):
    windows = [Windows("c4/train", count, 64) for count in (1, 16)]
    runs = [Run("llama-7b", pruners.Wanda(0.5), some, ()) for some in windows]
    monkeypatch.setitem(papers.TABLES, "mine", SimpleNamespace(runs=lambda: runs, label=None))
    told = [set(words) for words in tidy._declared("mine").values() if len(words) == 1]
    assert set().union(*told) == {("Wanda", "50 %, 1 window"), ("Wanda", "50 %, 16 windows")}


@pytest.mark.parametrize(("name", "model", "dtype"), [("gblm", "opt-125m", None), ("flap", "opt-125m", "float32")])
def test_cells_on_another_model_or_in_another_dtype_have_the_papers_words(name, model, dtype, tmp_path):
    table = papers.find(f"embedded.{name}")
    asked = papers.runs(table, model, dtype)
    made_up.fill(table, tmp_path, runs=asked)
    found = analysis.frame(tmp_path)
    assert set(zip(found.label, found.setting, strict=True)) == set(labels(asked, table.label))


def test_a_cell_that_no_table_declares_is_named_by_its_method(tmp_path):
    runs = [Run("opt-125m", pruners.GBLM(0.5, norm=norm), small.WINDOWS, (small.PPL,)) for norm in ("l1", "l2")]
    for run in runs:
        records.write(small.record(run), tmp_path)
    assert len(set(analysis.frame(tmp_path).label)) == 2


def test_every_value_says_by_which_code_it_was_made(tmp_path):
    table = papers.find("embedded.gblm")
    runs = table.runs()[1:4]
    for run, change in zip(runs, ({}, {"method": "other"}, None), strict=True):
        recorded = {} if change is None else {**code.of(run), **change}
        records.write(small.record(run, table=table.name, code=recorded), tmp_path)
    found = analysis.frame(tmp_path).drop_duplicates("id").set_index("id").code
    assert [found[small.record(run).id] for run in runs] == ["same", "other", "unknown"]


def test_the_seed_is_that_of_what_is_drawn():
    retrained = {"recovery": {"seed": 5}}
    assert seed_of({"method": {"name": "random", "seed": 3}}) == 3
    assert seed_of({"method": {"name": "llm_pruner", "importance": "random", "seed": 3}, **retrained}) == 3
    assert seed_of({"method": {"name": "llm_pruner", "importance": "l2", "seed": 3}, **retrained}) == 5
    assert seed_of({"method": {"name": "magnitude"}, **retrained}) == 5


def test_a_record_of_two_folders_is_read_from_the_first(made, tmp_path, caplog):
    (tmp_path / "runs").mkdir()
    shutil.copytree(RESULTS / "runs" / "embedded.gblm", tmp_path / "runs" / "embedded.gblm")
    assert len(analysis.frame(tmp_path, RESULTS)) == len(made)
    assert "differs between" not in caplog.text
    record = next(iter(records.load(tmp_path, "embedded.gblm").values()))
    changed = {key: {**told, "perplexity": 3.0} for key, told in record.measures.items()}
    records.write(record.model_copy(update={"measures": changed}), tmp_path)
    both = analysis.frame(RESULTS, tmp_path)
    assert len(both) == len(made)
    assert 3.0 not in set(both[both.id == record.id].value)
    assert f"{record.id} differs between {RESULTS}, which is shown, and {tmp_path}." in caplog.text


def of_csv(path: Path) -> list[float]:
    """To the last bit, which older versions of pandas round."""
    with path.open(newline="") as file:
        return [float(line["value"]) for line in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("name", "read"), [("all.csv", of_csv), ("all.parquet", lambda path: pd.read_parquet(path)["value"].tolist())]
)
def test_it_is_written_and_reads_back(made, tmp_path, name, read):
    assert main(["frame", "--results", str(RESULTS), "--out", str(tmp_path / name)]) == 0
    assert read(tmp_path / name) == made["value"].tolist()


def test_another_ending_and_an_empty_folder_are_refused(made, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"\.csv or \.parquet"):
        tidy.write(made, tmp_path / "all.xlsx")
    assert main(["frame", "--results", str(tmp_path)]) != 0
    assert "has no records" in capsys.readouterr().err


def test_the_notebook_runs_and_shows_what_it_says():
    told = json.loads((RESULTS.parent / "analysis/example.ipynb").read_text(encoding="utf-8"))
    names: dict = {}
    for cell in (cell for cell in told["cells"] if cell["cell_type"] == "code"):
        assert cell["outputs"] == []  # numbers come from the records, not from a stored run
        exec("".join(cell["source"]), names)
    assert (names["over_seeds"].loc["embedded.gblm"].loc["Wanda", "50 %"]["count"]) == 3
    assert names["axes"].get_legend() is not None
    names["plt"].close(names["figure"])


@pytest.mark.parametrize("name", ["all.csv", "all.parquet"])
def test_a_full_disk_is_told_in_a_sentence_and_leaves_the_file_as_it_was(name, tmp_path):
    whole = pd.DataFrame({"number": range(5_000)})
    tidy.write(whole.head(3), tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with small.full_disk(), pytest.raises(StorageError, match=r"Cannot write .*; .*or name another file\."):
        tidy.write(whole, tmp_path / name)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {name: before}
