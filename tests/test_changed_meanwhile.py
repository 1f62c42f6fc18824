"""What is replaced while cells run: no record is of one text or one code and says that it is of another."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import small_table as small
from own_work import METHOD, SHORT, needs_model, prune

import eval as evaluation
import pruners
from experiments import cells, cli, papers, rates
from experiments.__main__ import main
from experiments.batch import Outcome, run_table
from experiments.rates import RateGrid, Tuning
from experiments.recovery import Documents, Retraining
from experiments.settings import Settings
from experiments.spec import MaskPatterns, Run, Windows, ZeroShot
from experiments.store import code, modules, own_files, records
from pruners.retrain import Trainable
from slurm.__main__ import main as slurm

C4 = "c4/c4_en_train_docs_0000-0799.jsonl"
PIQA = [{"goal": f"Goal {n}", "sol1": f"one {n}", "sol2": f"two {n}", "label": n % 2} for n in range(4)]
TABLES = """
from experiments.spec import Perplexity, Run, Table, Windows
import pruners

def cell(method, model):
    return Run(model, method, Windows("c4/train", 2, 32), (Perplexity("ptb/test", 64, 4),))

first = Table("first", "First", (pruners.Magnitude(sparsity=0.5),), (({model!r},),), cell)
second = Table("second", "Second", (pruners.METHODS["ria"](sparsity=0.5),), (({model!r},),), cell)
"""
pytestmark = needs_model


@pytest.fixture
def data(tmp_path) -> Path:
    return small.data(tmp_path / "data")


def run(tmp_path: Path, data: Path, method, measures=(small.PPL,)) -> Outcome:
    made = cells.cells(small.table((method,), measures=measures).runs())
    return run_table("tiny", made, Settings(tmp_path / "results", data_dir=data))


def meanwhile(monkeypatch, method, path: Path, text: str) -> None:
    """The file has this text once the method scores its first matrix."""
    score = method.score

    def replacing(*arguments):
        beside = path.with_name("beside")
        beside.write_text(text)
        os.replace(beside, path)
        return score(*arguments)

    monkeypatch.setattr(method, "score", replacing)


def test_a_text_that_is_replaced_while_a_cell_runs_leaves_no_record(tmp_path, data, monkeypatch):
    with monkeypatch.context() as patch:
        meanwhile(patch, pruners.Wanda, data / C4, "".join(reversed((data / C4).read_text().splitlines(True))))
        assert run(tmp_path, data, pruners.Wanda(sparsity=0.5)).failed == ["Wanda 50 %"]
    assert not records.load(tmp_path / "results", "tiny")
    (failure,) = records.load_failures(tmp_path / "results", "tiny").values()
    assert failure.message == "c4/train changed while the cell ran; run again, so that the record is of one text."
    assert len(run(tmp_path, data, pruners.Wanda(sparsity=0.5)).done) == 1


def test_documents_that_are_replaced_while_they_are_evaluated_leave_no_record(tmp_path, data, monkeypatch):
    from eval import zero_shot

    documents, work = data / "tasks/piqa_validation.jsonl", zero_shot.zero_shot
    documents.parent.mkdir()
    documents.write_text("".join(json.dumps(row) + "\n" for row in PIQA))

    def evaluated(*arguments, **options):
        found = work(*arguments, **options)
        documents.write_text("".join(json.dumps({**row, "label": 0}) + "\n" for row in PIQA))
        return found

    measures = (ZeroShot(None, (("piqa", "acc"),)),)
    with monkeypatch.context() as patch:
        patch.setattr(zero_shot, "zero_shot", evaluated)
        assert run(tmp_path, data, None, measures).failed == ["Dense"]
    (failure,) = records.load_failures(tmp_path / "results", "tiny").values()
    assert failure.message.startswith("The documents of piqa changed while they were evaluated; run again")
    assert run(tmp_path, data, None, measures).done == ["Dense"]


def test_a_method_that_is_edited_while_an_earlier_table_runs_is_recorded_as_it_was(
    ria, tmp_path, data, monkeypatch, capsys
):
    monkeypatch.setattr(papers, "TABLES", dict(papers.TABLES))
    tables = tmp_path / "two.py"
    tables.write_text(TABLES.replace("{model!r}", repr(str(small.MODEL))))
    meanwhile(monkeypatch, pruners.Magnitude, ria, METHOD.replace("* x.norm", "* -x.norm"))
    words = ["--plugin", str(ria), "--results", str(tmp_path / "r"), "--data-dir", str(data), "--device", "cpu"]
    assert main(["run", f"{tables}:first", f"{tables}:second", *words]) == 0
    (record,) = records.load(tmp_path / "r", "second").values()
    assert record.code["file"] == {"ria.py": hashlib.sha256(METHOD.encode()).hexdigest()}


def test_our_own_code_is_read_and_imported_before_the_first_cell(monkeypatch):
    monkeypatch.setattr(evaluation, "patterns", importlib.import_module("eval.patterns"))
    monkeypatch.delitem(sys.modules, "eval.patterns")
    asked = Run("m", pruners.Magnitude(sparsity=0.5), None, (MaskPatterns(),))
    code.load([asked])
    assert "eval.patterns" in sys.modules
    before = code.of(asked)
    edited_on_disk(monkeypatch)
    assert code.of(asked) == before


def edited_on_disk(monkeypatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *arguments, **how: "edited = 1\n")
    monkeypatch.setattr(Path, "read_bytes", lambda *arguments: b"edited = 1\n")


def forget_sources(monkeypatch) -> None:
    """As a new process, which has read nothing yet."""
    for name in ("_text", "source", "_imports"):
        monkeypatch.setattr(modules, name, cache(getattr(modules, name).__wrapped__))


RETRAINING = Retraining(Trainable(norms=True), Documents("c4/train", 4, 32), 2, 1e-3, batch_size=2)
PLAIN = Run("m", pruners.Magnitude(sparsity=0.5), None, (small.PPL,))
TUNING = Tuning(RateGrid((1e-3, 1e-2), Windows("c4/train", 2, 32)), PLAIN.method)
TUNED = Run("m", None, None, (small.PPL,), recovery=RETRAINING, tuning=TUNING)


@pytest.mark.parametrize(
    ("loaded", "asked"),
    [([TUNED], rates.choice(TUNED)), ([replace(PLAIN, quantised=True), PLAIN], replace(PLAIN, quantised=True))],
)
def test_all_that_a_run_needs_is_read_before_it(loaded, asked, monkeypatch):
    before = code.of(asked)
    forget_sources(monkeypatch)
    code.load(loaded)
    edited_on_disk(monkeypatch)
    assert code.of(asked) == before


def test_a_file_is_read_where_it_is_imported(ria, tmp_path):
    helper = tmp_path / "m_helper_of_ria.py"
    helper.write_text("power = 1\n")
    ria.write_text(f"import m_helper_of_ria\n{METHOD}")
    sys.path.insert(0, str(tmp_path))
    try:
        cli.resolve(argparse.Namespace(plugin=[ria]))
        before = {path: path.read_bytes() for path in (ria, helper)}
        for path in before:
            path.write_text("edited = 1\n")
        assert {path: own_files.bytes_of(path) for path in before} == before
    finally:
        sys.path.remove(str(tmp_path))


def edited_once_measured(monkeypatch, path: Path) -> None:
    """The file has another text once anything is measured, and was not read where it was imported."""
    from eval import perplexity

    work = perplexity.perplexity
    monkeypatch.setattr(own_files, "hold", lambda made: None)

    def measured(*arguments, **options):
        path.write_text(METHOD.replace("* x.norm", "* -x.norm"))
        return work(*arguments, **options)

    monkeypatch.setattr(perplexity, "perplexity", measured)


def test_a_method_that_is_edited_while_the_dense_model_is_measured_is_recorded_as_it_was(
    ria, tmp_path, data, monkeypatch
):
    edited_once_measured(monkeypatch, ria)
    words = f"--method ria --sparsity 0.5 --plugin {ria} {SHORT}"
    assert prune(words, ["--results", str(tmp_path / "r"), "--data-dir", str(data)]) == 0
    (record,) = (found for found in records.load(tmp_path / "r", "adhoc").values() if found.spec["method"])
    assert record.code["file"] == {"ria.py": hashlib.sha256(METHOD.encode()).hexdigest()}


def test_a_method_that_is_edited_while_a_job_runs_an_earlier_table_is_recorded_as_it_was(
    ria, tmp_path, data, monkeypatch
):
    monkeypatch.setattr(papers, "TABLES", dict(papers.TABLES))
    tables = tmp_path / "two.py"
    tables.write_text(TABLES.replace("{model!r}", repr(str(small.MODEL))))
    edited_once_measured(monkeypatch, ria)
    words = ["--plugin", str(ria), "--results", str(tmp_path / "r"), "--data-dir", str(data), "--executor", "debug"]
    assert slurm(["submit", f"{tables}:first", f"{tables}:second", *words]) == 0
    (record,) = records.load(tmp_path / "r", "second").values()
    assert record.code["file"] == {"ria.py": hashlib.sha256(METHOD.encode()).hexdigest()}
