"""The tidy table of all records: a row for each measured value, equal to the records."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

import analysis
import pruners
from analysis import tidy
from analysis.__main__ import main
from experiments import papers
from experiments.labels import seed_of
from experiments.spec import Run, Windows
from experiments.store import records

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
    assert set(tidy._labels("mine").values()) == {("Wanda", "50 %, 1 window"), ("Wanda", "50 %, 16 windows")}


def test_the_seed_is_that_of_what_is_drawn():
    retrained = {"recovery": {"seed": 5}}
    assert seed_of({"method": {"name": "random", "seed": 3}}) == 3
    assert seed_of({"method": {"name": "llm_pruner", "importance": "random", "seed": 3}, **retrained}) == 3
    assert seed_of({"method": {"name": "llm_pruner", "importance": "l2", "seed": 3}, **retrained}) == 5
    assert seed_of({"method": {"name": "magnitude"}, **retrained}) == 5


def test_two_folders_stand_side_by_side(made):
    both = analysis.frame(RESULTS, RESULTS)
    assert len(both) == 2 * len(made)


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
