"""Cells that differ in measures alone share the model that they measure: it is made once and each has its record."""

from __future__ import annotations

from dataclasses import replace

import pytest

import pruners
from experiments import cells, papers, run
from experiments import estimate as hours
from experiments.__main__ import main
from experiments.batch import run_table
from experiments.measures.asked import Costs
from experiments.models import kept
from experiments.recovery import Retraining
from experiments.settings import Settings
from experiments.spec import Perplexity, Run, Table, Windows
from experiments.store import records
from pruners.retrain import Trainable
from slurm import estimate, jobs
from slurm.profile import Profile
from tests import small_table as small

pytestmark = pytest.mark.skipif(not small.MODEL.exists(), reason="../shared/data is absent")
OTHER = Perplexity("ptb/test", window=32, limit=4)
METHODS = (None, pruners.Wanda(sparsity=0.5), pruners.Flap(ratio=0.25))
RECOVERY = Retraining(Trainable(norms=True), small.WINDOWS, steps=2, learning_rate=1e-3)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small.data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def pruned(monkeypatch):
    """The methods that prune while a test runs."""
    found, prune = [], pruners.prune
    told = lambda model, method, *args, **options: (found.append(method), prune(model, method, *args, **options))[1]  # noqa: E731
    monkeypatch.setattr(pruners, "prune", told)
    return found


def table(*measures, methods=METHODS, recovery=None) -> Table:
    plain = small.table(methods)
    make = lambda method, model, what: replace(plain.run(method, model), measures=what, recovery=method and recovery)  # noqa: E731
    return replace(plain, columns=tuple((str(small.MODEL), what) for what in measures), run=make)


def told_of(record) -> tuple:
    achieved = {key: value for key, value in record.achieved.items() if key != "recovery"}
    after = {k: v for k, v in record.achieved.get("recovery", {}).items() if "seconds" not in k and "peak" not in k}
    return record.spec, record.measures, achieved, after, record.dense_gate, record.data


@pytest.mark.parametrize("recovery", [None, RECOVERY])
def test_one_model_is_made_and_each_record_is_that_of_its_cell_alone(tmp_path, data, pruned, recovery):
    chosen = cells.cells(table((small.PPL,), (OTHER,), (small.PPL, OTHER), recovery=recovery).runs())
    assert not run_table("tiny", chosen, Settings(tmp_path / "together", data_dir=data)).failed
    assert len(pruned) == 2
    for cell in chosen:
        assert not run_table("tiny", [cell], Settings(tmp_path / "alone", data_dir=data)).failed
    assert len(pruned) >= 4  # nothing is left of a table that is done, but for masks on the disk
    together, alone = (records.load(tmp_path / name, "tiny") for name in ("together", "alone"))
    assert [told_of(together[cell.id]) for cell in chosen] == [told_of(alone[cell.id]) for cell in chosen]
    for cell in chosen:
        assert set(together[cell.id].cost.seconds) >= {"load", "measure", "total"} | (
            {"prune"} if cell.run.method else set()
        )
        assert together[cell.id].cost.seconds["total"] >= together[cell.id].cost.seconds.get("prune", 0)


def test_the_next_table_within_a_command_goes_on_with_it(tmp_path, data, pruned):
    first, second = (cells.cells(table((what,), methods=METHODS[1:2]).runs()) for what in (small.PPL, OTHER))
    with kept.lasting():
        for name, chosen in (("one", first), ("two", second)):
            assert not run_table(name, chosen, Settings(tmp_path, data_dir=data)).failed
    assert len(pruned) == 1
    assert not run_table("three", first, Settings(tmp_path / "later", data_dir=data)).failed
    assert len(pruned) == 2


def test_tables_of_one_command_make_a_model_that_several_measure_once(tmp_path, data, pruned, monkeypatch, capsys):
    monkeypatch.setattr(papers, "TABLES", dict(papers.TABLES))
    papers.TABLES["first"] = replace(table((small.PPL,), methods=METHODS[:2]), name="first")
    papers.TABLES["second"] = replace(table((OTHER,), (small.PPL, OTHER), methods=METHODS), name="second")
    papers.TABLES["third"] = replace(table((small.PPL, OTHER), methods=METHODS[1:2]), name="third")
    words = ["--data-dir", str(data), "--device", "cpu"]
    assert main(["run", "first", "second", "third", "--results", str(tmp_path / "all"), *words]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "done now" in line]
    assert [line.partition(";")[0] for line in told] == [
        "first: 2 done now, 0 before, 0 failed", "second: 6 done now, 0 before, 0 failed",
        "third: 0 done now, 1 before, 0 failed",
    ]  # fmt: skip
    assert len(pruned) == 2
    for name in ("first", "second", "third"):
        assert main(["run", name, "--results", str(tmp_path / "each"), *words]) == 0
        both = [records.load(tmp_path / folder, name) for folder in ("all", "each")]
        assert {id: told_of(record) for id, record in both[0].items()} == {
            id: told_of(record) for id, record in both[1].items()
        }


def test_another_calibration_seed_and_a_measured_cost_are_made_anew(tmp_path, data, pruned):
    wanda = METHODS[1:2]
    costly = cells.cells(table((small.PPL,), (OTHER, Costs()), methods=wanda).runs())
    assert not run_table("tiny", costly, Settings(tmp_path, data_dir=data)).failed
    assert len(pruned) == 2
    alike = cells.cells(table((small.PPL,), methods=wanda).runs()), cells.cells(table((OTHER,), methods=wanda).runs())
    seeded = [replace(cell.run, windows=replace(small.WINDOWS, seed=1)) for cell in alike[1]]
    with kept.lasting():
        for chosen in (alike[0], cells.cells(seeded)):
            assert not run_table("tiny", chosen, Settings(tmp_path / "seeds", data_dir=data)).failed
    assert len(pruned) == 4


def test_a_cell_that_fails_hands_nothing_over(tmp_path, data, pruned, monkeypatch):
    chosen = cells.cells(table((small.PPL,), (OTHER,), methods=METHODS[1:2]).runs())
    measure, once = run.measure, iter([True])

    def failing(*args):
        if next(once, False):
            raise ValueError("A measure failed.")
        return measure(*args)

    monkeypatch.setattr(run, "measure", failing)
    outcome = run_table("tiny", chosen, Settings(tmp_path, data_dir=data))
    assert (len(outcome.failed), len(outcome.done), len(pruned)) == (1, 1, 2)


def test_a_job_holds_such_cells_where_making_the_model_is_worth_it():
    profile = Profile(teraflops=5, hours=1000, packed_hours=0)
    long, short = Windows("c4/train", count=1280, length=2048), Windows("c4/train", count=1, length=2048)
    first, second = (Perplexity("wikitext2/test", window=window) for window in (2048, 1024))
    for windows, sizes in ((long, [2]), (short, [1, 1])):
        runs = [Run("llama-13b", pruners.Wanda(sparsity=0.5), windows, (what,), "float16") for what in (first, second)]
        found = cells.cells(runs)
        planned = [job for array in jobs.arrays(found, profile) for job in array.jobs]
        assert [len(job.cells) for job in planned] == sizes
        alone = sum(estimate.seconds([cell], profile) for cell in found)
        measuring = 2 * 13e9 * (found[1].work - found[1].making_work) / 5e12
        assert estimate.seconds(found, profile) - estimate.seconds(found[:1], profile) == pytest.approx(
            measuring, rel=0.05
        )
        assert estimate.seconds(found, profile) < alone


def test_hours_of_a_table_count_what_its_jobs_count(monkeypatch):
    """But for the card: here the profile's arithmetic and reading are as fast as those of the table's hours."""
    monkeypatch.setattr("slurm.estimate.READING_GB_PER_SECOND", hours.READ_BYTES_PER_SECOND / 1e9)
    profile = Profile(teraflops=hours.SUSTAINED_FLOPS / 1e12, hours=1000, packed_hours=10**6)
    methods = (None, pruners.Wanda(sparsity=0.5), pruners.GBLM(sparsity=0.5), pruners.GBLM(sparsity=0.6))
    text = Windows("c4/train", count=128, length=2048)
    measures = [(Perplexity("wikitext2/test", window=window),) for window in (2048, 1024)]
    found = cells.cells([Run("llama-7b", made, text, what, "float16") for what in measures for made in methods])
    (array,) = jobs.arrays(found, profile)
    assert hours.total_gpu_hours(found) == pytest.approx(sum(job.seconds for job in array.jobs) / 3600)
    assert hours.total_gpu_hours(found) < 0.6 * sum(map(hours.gpu_hours, found))
    assert hours.total_gpu_hours(found, found) < sum(hours.gpu_hours(cell, away=True) for cell in found)
