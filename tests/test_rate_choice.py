"""Learning rates that are cells of their own: chosen once, shared, recorded, told below tables, asked by claims."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import small_table as small
from conftest import needs_shared

import analysis
import pruners
from analysis.claims.judge import Better, Claim, Ours, Place, on_ours
from analysis.rows import declared, rows
from analysis.tables.notes import notes
from experiments import cells, estimate, measures, papers, rates
from experiments.batch import run_table
from experiments.labels import seed
from experiments.measures.asked import Costs
from experiments.papers import headlines, perp
from experiments.placement.needs import needs_all_weights
from experiments.rates import RateGrid, Tuning, choice
from experiments.recovery import Retraining
from experiments.settings import Settings
from experiments.spec import Run, Table, Windows
from experiments.store import records
from pruners.retrain import Reconstruction, Trainable

NORMS = Trainable(norms=True)
GRID = RateGrid((1e-4, 1e-2, 1e-1), Windows("c4/train", 4, 32, seed=7))
TUNING = Tuning(GRID, pruners.Magnitude(sparsity=0.5), table="tiny.rates")
RETRAINING = Retraining(NORMS, small.WINDOWS, steps=6, learning_rate=5e-4)
REBUILDING = Reconstruction(NORMS, steps=6, learning_rate=5e-4)


def run(recovery, sparsity: float, **changes) -> Run:
    method = pruners.Magnitude(sparsity=sparsity)
    windows = small.WINDOWS if recovery is REBUILDING else None
    return Run(str(small.MODEL), method, windows, (small.PPL,), recovery=recovery, tuning=TUNING, **changes)


def test_the_rate_that_a_recovery_names_counts_for_nothing_and_the_grid_does():
    one = run(RETRAINING, 0.5)
    assert one.id() == replace(one, recovery=replace(RETRAINING, learning_rate=1.0)).id()
    others = [replace(one, tuning=None), replace(one, tuning=replace(TUNING, at=pruners.Magnitude(sparsity=0.6))),
              replace(one, tuning=replace(TUNING, grid=replace(GRID, rates=(1e-3, 1e-2))))]  # fmt: skip
    assert len({one.id(), *(other.id() for other in others)}) == 4
    assert "tuning" not in others[0].spec()
    assert one.id() == replace(one, tuning=replace(TUNING, table="elsewhere")).id()
    assert choice(one).id() == choice(run(RETRAINING, 0.4)).id() != choice(run(REBUILDING, 0.4)).id()


def test_what_is_no_grid_or_has_nothing_to_tune_is_refused():
    with pytest.raises(ValueError, match="none twice"):
        RateGrid((1e-3, 1e-3), GRID.text)
    with pytest.raises(TypeError, match="the Windows on which losses are taken"):
        RateGrid((1e-3,), "c4/validation")
    with pytest.raises(ValueError, match="there is none"):
        Run("smollm2-135m", pruners.Magnitude(sparsity=0.5), None, (), tuning=TUNING)


@needs_shared
@pytest.mark.parametrize("recovery", [RETRAINING, REBUILDING], ids=["retraining", "reconstruction"])
def test_a_rate_is_chosen_once_and_taken_by_all_that_share_it(recovery, tmp_path, monkeypatch):
    data_dir = small.data(tmp_path / "data")
    made = cells.cells([run(recovery, share) for share in (0.4, 0.5)])
    settings = Settings(tmp_path, data_dir=data_dir)
    assert not run_table("tiny", made, settings).failed
    chosen = records.load(tmp_path, "tiny.rates")
    (id,) = chosen
    about = chosen[id].measures[GRID.key]
    assert id == cells.cells([choice(made[0].run)])[0].id
    assert about["rates"] == list(GRID.rates)
    assert about["losses"].index(min(about["losses"])) == about["rates"].index(about["learning_rate"])
    for cell in made:
        record = records.find(tmp_path, "tiny", cell.id)
        assert record.achieved["rate_choice"]["record"] == id
        assert "learning_rate" not in record.spec["recovery"]
        by_hand = replace(cell.run, tuning=None, recovery=replace(recovery, learning_rate=about["learning_rate"]))
        (plain,) = cells.cells([by_hand])
        assert not run_table("tiny", [plain], settings).failed
        assert records.find(tmp_path, "tiny", plain.id).measures == record.measures
    assert not list((tmp_path / ".cache/unfinished").rglob("*.safetensors"))


@needs_shared
def test_a_choice_is_a_cell_that_can_be_run_first(tmp_path, monkeypatch):
    data_dir = small.data(tmp_path / "data")
    settings = Settings(tmp_path, data_dir=data_dir)
    asked = run(RETRAINING, 0.6)
    assert not run_table("tiny.rates", cells.cells([choice(asked)]), settings).failed
    before = records.load(tmp_path, "tiny.rates")
    monkeypatch.setattr("pruners.retrain.choose_rate", lambda *args, **how: pytest.fail("chosen again"))
    assert not run_table("tiny", cells.cells([asked]), settings).failed
    assert records.load(tmp_path, "tiny.rates") == before


@needs_shared
@pytest.mark.parametrize("first", ["choice", "cell"])
def test_a_choice_that_is_made_again_reaches_the_cells_that_took_it(first, tmp_path, capsys):
    data_dir = small.data(tmp_path / "data")
    grid = replace(GRID, rates=(1e-4, 1.0), text=Windows("ptb/validation", 4, 32, sampling="first"))
    text = data_dir / "ptb/ptb_valid.jsonl"
    text.write_text((data_dir / "ptb/ptb_test.jsonl").read_text())
    cell = replace(run(RETRAINING, 0.6), tuning=replace(TUNING, grid=grid))
    tables = {"tiny.rates": cells.cells([choice(cell)]), "tiny": cells.cells([cell])}
    settings = Settings(tmp_path, data_dir=data_dir)
    assert run_table("tiny", tables["tiny"], settings).done
    (record,) = records.load(tmp_path, "tiny").values()
    assert "ptb/validation" in record.data
    # as a record of an earlier day, whose text is told by its choice alone
    records.write(record.model_copy(update={"data": {"ptb/test": record.data["ptb/test"]}}), tmp_path)
    assert not run_table("tiny", tables["tiny"], settings).done
    (chosen,) = records.load(tmp_path, "tiny.rates").values()
    if first == "choice":  # as if it had been made again, with another outcome
        other = {**chosen.measures[grid.key], "learning_rate": 0.5}
        records.write(chosen.model_copy(update={"measures": {grid.key: other}}), tmp_path)
    else:
        text.write_text("".join(reversed(text.read_text().splitlines(keepends=True))))
    capsys.readouterr()
    assert run_table("tiny", tables["tiny"], settings).done
    said = {
        "choice": "is not the one that is chosen now",
        "cell": "was chosen on another text or by other code and is chosen again",
    }
    assert f"The learning rate of Magnitude + norms 60 % {said[first]}; rerunning." in capsys.readouterr().err
    (record,) = records.load(tmp_path, "tiny").values()
    (chosen,) = records.load(tmp_path, "tiny.rates").values()
    assert record.achieved["rate_choice"]["losses"] == chosen.measures[grid.key]["losses"]
    assert (record.achieved["rate_choice"]["learning_rate"] == 0.5) == (first == "choice")
    assert not run_table("tiny", tables["tiny"], settings).done


@needs_shared
def test_a_table_says_which_rate_each_row_took_and_which_lies_at_the_edge(tmp_path):
    table = Table("tiny", "", (0.4, 0.5), ((str(small.MODEL),),), lambda share, model: run(RETRAINING, share))
    data_dir = small.data(tmp_path / "data")
    assert not run_table("tiny", cells.cells(table.runs()), Settings(tmp_path, data_dir=data_dir)).failed
    told = [note for note in notes(table, declared(table, tmp_path, table.runs())) if "earning rate" in note]
    (record,) = records.load(tmp_path, "tiny.rates").values()
    rate = record.measures[GRID.key]["learning_rate"]
    assert f"from 0.0001, 0.01, 0.1 by the loss on 4 x 32 tokens of c4/train: {rate:g} for" in told[0]
    assert "Magnitude + norms 40 %" in told[0]


@needs_shared
def test_a_table_withholds_what_was_trained_at_another_rate_than_is_chosen_now(tmp_path, monkeypatch):
    dense = Run(str(small.MODEL), None, None, (small.PPL,))
    table = Table("tiny", "", (0.4, None), ((str(small.MODEL),),), lambda s, _: run(RETRAINING, s) if s else dense)
    monkeypatch.setitem(papers.TABLES, "tiny", table)
    data_dir = small.data(tmp_path / "data")
    assert not run_table("tiny", cells.cells(table.runs()), Settings(tmp_path, data_dir=data_dir)).failed
    assert [row.state for row in rows(table, tmp_path, data_dir=data_dir)] == ["done", "done"]
    (chosen,) = records.load(tmp_path, "tiny.rates").values()
    other = {**chosen.measures[GRID.key], "learning_rate": 0.5}
    records.write(chosen.model_copy(update={"measures": {GRID.key: other}}), tmp_path)
    assert [row.state for row in rows(table, tmp_path)] == ["done", "done"]
    made = rows(table, tmp_path, data_dir=data_dir)
    assert [row.state for row in made] == ["missing", "done"]
    told = "Not shown, as their learning rate is not the one that is chosen now: Magnitude + norms 40 %."
    assert told in notes(table, made)
    frame = analysis.frame(tmp_path, data_dir=data_dir)
    assert set(frame[frame.table == "tiny"].method) == {"dense"}
    assert len(analysis.frame(tmp_path)) > len(frame)


@needs_shared
def test_costs_are_those_of_the_cell(tmp_path):
    recovery = replace(RETRAINING, learning_rate=1e-3)
    plain = replace(run(recovery, 0.5), tuning=None, measures=(Costs(),))
    (cell,) = cells.cells([plain])
    assert not run_table("tiny", [cell], Settings(tmp_path, data_dir=small.data(tmp_path / "data"))).failed
    record = records.find(tmp_path, "tiny", cell.id)
    found, trained = record.measures["costs"], record.achieved["recovery"]
    assert found["training_tokens_per_second"] == pytest.approx(trained["tokens"] / trained["seconds"])
    assert found["pruning_s"] == record.cost.seconds["prune"]
    assert (found["trained"], found["share"]) == (trained["trained"], trained["share"])
    assert 0 < found["peak_bytes"] <= record.cost.peak_bytes


@needs_shared
def test_a_choice_costs_as_many_trainings_as_it_tries_and_wants_all_weights():
    tuned, chosen = (cells.cells([one])[0] for one in (run(RETRAINING, 0.5), choice(run(RETRAINING, 0.5))))
    training = tuned.work - cells.OVERHEAD_TOKENS - measures.work_tokens(small.PPL)
    assert chosen.work - cells.OVERHEAD_TOKENS == len(GRID.rates) * training
    assert needs_all_weights(choice(run(REBUILDING, 0.5))) is None
    assert any("c4/validation" in text for text in estimate.lacking(perp.magnitude.runs()[-1], small.SHARED))


@pytest.mark.parametrize("table", [name for name in papers.TABLES if name.startswith("perp.")])
def test_every_row_of_perp_that_trains_takes_a_chosen_rate(table):
    for one in papers.find(table).runs():
        if one.recovery and table != "perp.cost":  # which measures no quality
            assert (one.tuning is None) == (rates.grid(one) is not None)


def test_choices_are_shared_by_settings_of_a_model_and_a_group_of_sparsities():
    needed = {choice(one) for table in (perp.magnitude, perp.masks, perp.reconstruction, perp.llama, perp.zero_shot,
                                        perp.llama_reconstruction, perp.zero_shot_reconstruction)
              for one in table.runs() if one.tuning}  # fmt: skip
    assert needed == set(perp.rates.runs())
    of_one = [one for one in perp.magnitude.runs() if one.model == "opt-2.7b" and one.recovery]
    assert len({choice(one) for one in of_one}) == 2 * len(perp.SUBSETS)
    assert {choice(one).method for one in of_one} == {pruners.Magnitude(sparsity=share) for share in (0.5, 0.6)}


CLAIM = Claim("c", "PERP", "", (Better((perp.words(perp.magnitude.runs()[-6])[0], "50 %"), ("Magnitude", "50 %")),),
              (Place("perp.magnitude", ("opt-2.7b",), "wikitext2/test@2048"),), tuned=True)  # fmt: skip


@pytest.mark.parametrize(
    ("about", "verdict"),
    [({}, "undecided: not tuned (opt-2.7b Magnitude + MaskLoRA, norms, biases 50 %) on opt-2.7b"),
     ({"rate_choice": {"at_edge": True}}, "undecided: not tuned"),
     ({"rate_choice": {"at_edge": False}}, "fails (0 of 1")],
)  # fmt: skip
def test_a_claim_about_tuned_training_is_undecided_without_a_choice_within_its_grid(about, verdict, tmp_path):
    for one in perp.magnitude.runs():
        if one.model == "opt-2.7b" and one.method == pruners.Magnitude(sparsity=0.5):
            record = small.record(one).model_copy(update={"table": "perp.magnitude"})
            if one.recovery:
                record.achieved.update(about)
            records.write(record, tmp_path)
    assert str(on_ours(CLAIM, Ours(tmp_path))).startswith(verdict)
    assert str(on_ours(replace(CLAIM, tuned=False), Ours(tmp_path))).startswith("fails")


def test_the_embedded_table_says_how_its_rates_were_chosen():
    table = papers.find("embedded.perp")
    assert "best of six" in table.rates
    assert table.rates in " ".join(notes(table, []))


def test_the_grid_of_perps_tables_reaches_beyond_every_rate_that_was_best():
    taken = [*headlines.RATES.values(), headlines.RECONSTRUCTION.learning_rate]
    assert min(perp.RATES) < min(taken)
    assert max(taken) < max(perp.RATES)
    assert {*headlines.RATES.values(), headlines.RECONSTRUCTION.learning_rate} <= set(headlines.GRID.rates)
    chosen = {run.recovery for run in papers.find("embedded.rates").runs()}
    rows = papers.find("embedded.perp").runs()
    assert {run.recovery for run in rows if run.recovery and seed(run) == 0} == chosen


def test_the_rates_of_embedded_perp_are_those_that_were_chosen():
    table = papers.find("embedded.rates")
    made = declared(table, Path(__file__).resolve().parents[1] / "results", table.runs())
    told = {row.run.recovery: next(iter(row.record.measures.values())) for row in made}
    assert not any(measured["at_edge"] for measured in told.values())
    rebuilt = told.pop(headlines.RECONSTRUCTION)
    assert {recovery: measured["learning_rate"] for recovery, measured in told.items()} == {
        recovery: recovery.learning_rate for recovery in told
    }
    by_rate = dict(zip(rebuilt["rates"], rebuilt["losses"], strict=True))  # as the table's note says
    assert rebuilt["learning_rate"] == 5e-3
    assert headlines.RECONSTRUCTION.learning_rate == 1e-2
    assert round(by_rate[1e-2] - by_rate[5e-3], 2) == 0.06
