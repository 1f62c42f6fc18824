"""Tables and figures from made-up records: what is missing or failed shows as such, protocols never mix."""

from __future__ import annotations

import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import small_table as small
from PIL import Image

import pruners
from analysis import compare, published, rows
from analysis.__main__ import main, parser
from analysis.figures import perplexity, style
from analysis.pages import comparisons
from analysis.tables import frames, markdown, notes
from experiments import cells, papers
from experiments.models.fingerprint import fingerprint
from experiments.recovery import Instructions, Retraining
from experiments.spec import Perplexity, Run, Table, Windows
from experiments.store import records
from pruners.retrain import Trainable

METHODS = (
    None,
    pruners.Magnitude(sparsity=0.5),
    pruners.Wanda(sparsity=0.5),
    pruners.GBLM(sparsity=0.5),
    pruners.GBLM(pattern="2:4", norm="l2"),
)
KEY = small.PPL.key


def table(measures=(small.PPL,), models=("smollm2-135m",)) -> Table:
    columns = tuple((model,) for model in models)
    return Table("tiny", "A tiny table", METHODS, columns, lambda m, model: Run(model, m, small.WINDOWS, measures))


def store(root: Path, run: Run, **measured) -> None:
    record = small.record(run)
    for key in record.measures:
        record.measures[key].update(measured)
    records.write(record, root)


@pytest.fixture
def made(tmp_path) -> list[rows.Row]:
    """Dense, magnitude and GBLM l1 are done, Wanda failed, GBLM l2 is missing."""
    dense, magnitude, wanda, gblm, _ = table().runs()
    for run, value in ((dense, 25.0), (magnitude, 1234.5), (gblm, 40.126)):
        store(tmp_path, run, perplexity=value)
    records.write_failure(small.failure(wanda, "Out of memory: try less_of & it."), tmp_path)
    return rows.rows(table(), tmp_path)


def test_several_results_folders_fill_one_table_the_first_goes_first(tmp_path, caplog):
    dense, magnitude, wanda, gblm, _ = table().runs()
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    store(ours, dense, perplexity=25.0)
    store(ours, magnitude, perplexity=50.0)
    records.write_failure(small.failure(gblm, "Out of memory."), ours)
    for run, value in ((dense, 25.0), (magnitude, 51.0), (wanda, 40.0), (gblm, 41.0)):
        store(theirs, run, perplexity=value)
    for places in ([ours, theirs], [theirs, ours]):
        made = rows.rows(table(), places)
        first, *_ = places
        assert [row.state for row in made] == ["done"] * 4 + ["missing"]
        assert [row.folder for row in made] == [first, first, theirs, theirs, None]
        assert made[1].measure(KEY)["perplexity"] == (50.0 if first == ours else 51.0)
        (told,) = [line.getMessage() for line in caplog.records if "differs between" in line.getMessage()]
        assert f"{first}, which is shown" in told
        caplog.clear()
    with pytest.raises(ValueError, match="No results folder was given"):
        rows.rows(table(), [])
    with pytest.raises(rows.NoRecordsError, match=r"ours.* or .*theirs.*--results \S+ours`"):
        rows.rows(table(models=("llama-7b",)), [ours, theirs])


def test_commands_take_several_results_folders(tmp_path):
    kept = papers.find("embedded.gblm")
    for name, half in (("a", 0), ("b", 1)):
        for run in kept.runs()[half::2]:
            records.write(small.record(run, table=kept.name), tmp_path / name)
    with_both = ["embedded.gblm", "--results", str(tmp_path / "a"), str(tmp_path / "b")]
    assert main(["table", *with_both]) == 0
    assert main(["claims", "--results", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert sorted(path.name for path in (tmp_path / "a").glob("*.*")) == [
        "claims.csv", "embedded.gblm.csv", "embedded.gblm.md", "embedded.gblm.tex", "embedded.gblm.verdicts.csv",
    ]  # fmt: skip
    assert not list((tmp_path / "b").glob("*.*"))


def test_a_table_that_was_never_run_shows_what_the_paper_prints(tmp_path, capsys):
    where = ["--results", str(tmp_path)]
    assert main(["table", "flap.perplexity", "--model", "llama-13b", *where]) == 0
    shown = capsys.readouterr()
    paper = {cell.value for cell in published.of("flap: table 1") if cell.model == "llama-13b" and cell.value}
    assert len(paper) > 5
    assert all(f"— / {value:.2f} |" in shown.out for value in paper)
    assert "No record of flap.perplexity for llama-13b" in shown.err
    assert "The paper's values stand alone." in shown.err
    for nothing_printed in (["perp.mixtral"], ["embedded.demo"], ["flap.perplexity", "--model", "opt-125m"]):
        assert main(["table", *nothing_printed, *where]) != 0
        assert "stand alone" not in capsys.readouterr().err
    assert main(["everything", "flap.perplexity", *where, "--unwritten", str(tmp_path / "unwritten.json")]) == 0
    assert "table of flap.perplexity" in json.loads((tmp_path / "unwritten.json").read_text())


@pytest.mark.parametrize("words", ["table flap.perplexity --model llama-13b", "claims", "spread embedded.gblm"])
def test_what_is_shown_is_written_first_and_shown_where_nothing_may_be_written(words, tmp_path, capsys, monkeypatch):
    shutil.copytree(Path(__file__).resolve().parents[1] / "results/runs/embedded.gblm", tmp_path / "runs/embedded.gblm")
    command = [*words.split(), "--results", str(tmp_path)]

    def refuse(*_, file=None, **__):
        if file is None:
            raise BrokenPipeError

    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", refuse)
        asked = parser().parse_args(command)
        with pytest.raises(BrokenPipeError):
            asked.command(asked)
    assert [path for path in tmp_path.iterdir() if path.is_file()]
    with small.full_disk():
        assert main(command) == 1
    shown = capsys.readouterr()
    assert shown.out.count("|") > 50
    assert "choose another folder with --results" in shown.err


def test_numbers_are_unrounded_and_gaps_are_empty(made):
    frame = pd.read_csv(io.StringIO(frames.numbers(made).to_csv(index=False)))
    assert list(frame.state) == ["done", "done", "failed", "done", "missing"]
    assert list(frame[f"perplexity {KEY}"][[0, 1, 3]]) == [25.0, 1234.5, 40.126]
    assert math.isnan(frame[f"perplexity {KEY}"][2])
    assert math.isnan(frame[f"perplexity {KEY}"][4])
    assert frame.failure[2] == "Out of memory: try less_of & it."


def test_markdown_shows_protocol_spread_gaps_and_failures(made):
    text = markdown.markdown(table(), made)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert lines[0] == ["Method", "Setting", "Sparsity", f"perplexity {KEY}"]
    assert lines[2:] == [
        ["Dense", "", "0.00 %", "25.00 ± 1.50"],
        ["Magnitude", "50 %", "50.00 %", "1,234 ± 2"],
        ["Wanda", "50 %", "—", "failed"],
        ["GBLM l1", "50 %", "50.00 %", "40.13 ± 1.50"],
        ["GBLM l2", "2:4", "—", "—"],
    ]
    assert "Wanda 50 % failed: Out of memory: try less_of & it." in text
    assert "1 of 5 cells are missing" in text
    assert f"{KEY}: 4 windows, 256 tokens; ± one standard error over windows; tokens abababababab." in text
    assert "Calibration: 4 x 32 tokens of c4/train (documents, seed 0)." in text


def test_one_calibration_note_tells_all_draws_and_orders_of_a_text(tmp_path):
    other = replace(small.WINDOWS, corpus="ptb/train")
    drawn = (
        *(small.WINDOWS, replace(small.WINDOWS, seed=2), replace(small.WINDOWS, seed=2, order=1)),
        *(replace(other, order=4), replace(other, sampling="first"), replace(other, sampling="first", order=0)),
    )
    found = [
        replace(table().runs()[1], windows=windows, method=pruners.Wanda((i + 1) / 10))
        for i, windows in enumerate(drawn)
    ]
    varied = Table("tiny", "", tuple(found), (("smollm2-135m",),), lambda run, model: replace(run, model=model))
    for run in varied.runs():
        records.write(small.record(run, achieved={"asked": 0.5, "sparsity": 0.5}), tmp_path)
    told = notes.notes(varied, rows.rows(varied, tmp_path))
    assert [note for note in told if note.startswith("Calibration")] == [
        "Calibration: 4 x 32 tokens of c4/train (documents, seeds 0, 2; seed 2 in order 1).",
        "Calibration: 4 x 32 tokens of ptb/train (documents; seed 0 in order 4).",
        "Calibration: 4 x 32 tokens of ptb/train (first; seed 0 in order 0).",
    ]


def test_notes_tell_the_order_of_windows_and_which_step_is_kept(tmp_path):
    last = Retraining(Trainable(norms=True), small.WINDOWS, steps=800, learning_rate=1e-3)
    best = replace(last, keep="best", held_out=Windows("ptb/test", 16, 32, sampling="first"))
    records_held_out = replace(best, text=Instructions("alpaca/train"), held_out=None, check_every=50)
    found = [
        replace(table().runs()[1], windows=replace(small.WINDOWS, order=order), method=pruners.Wanda(share),
                recovery=recovery)
        for share, order, recovery in (
            (0.1, None, last), (0.2, 0, best), (0.3, 3, best), (0.4, 3, records_held_out), (0.5, 3, best),
        )
    ]  # fmt: skip
    varied = Table("tiny", "", tuple(found), (("smollm2-135m",),), lambda run, model: replace(run, model=model))
    for run, step in zip(varied.runs(), (None, 600, 200, 50, 200), strict=True):
        recovered = {} if step is None else {"checked": [[step, 1.0]], "kept_step": step}
        records.write(small.record(run, achieved={"asked": 0.5, "sparsity": 0.5, "recovery": recovered}), tmp_path)
    told = notes.notes(varied, rows.rows(varied, tmp_path))
    assert [note for note in told if note.startswith("Calibration")] == [
        "Calibration: 4 x 32 tokens of c4/train (documents, seed 0; seed 0 in orders 0, 3)."
    ]
    start = "Retraining: 800 steps of 2 x"
    assert [note for note in told if note.startswith("Retraining")] == [
        f"{start} 32 tokens of c4/train, learning rate 0.001.",
        f"{start} 32 tokens of c4/train, learning rate 0.001, best of every 200 steps by the loss on 16 x 32 tokens "
        "of ptb/test.",
        f"{start} 256 tokens of alpaca/train, learning rate 0.001, best of every 50 steps by the loss on 2,000 "
        "held-out records of alpaca/train.",
    ]
    (kept,) = [note for note in told if note.startswith("Steps kept")]
    assert [part.partition(" for ")[0] for part in kept.removeprefix("Steps kept: ").split("; ")] == [
        "50",
        "200",
        "600",
    ]
    assert [share in kept for share in ("10 %", "20 %", "30 %", "40 %", "50 %")] == [False, True, True, True, True]
    named = kept.partition("200 for ")[2].partition(";")[0]
    assert [share in named for share in ("20 %", "30 %", "40 %", "50 %")] == [False, True, False, True]


def test_latex_is_booktabs_with_everything_escaped(made):
    text = markdown.tex(table(), made)
    assert all(rule in text for rule in (r"\toprule", r"\midrule", r"\bottomrule"))
    assert r"Magnitude & 50 \% & 50.00 \% & 1,234 $\pm$ 2 \\" in text
    assert r"less\_of \& it" in text


def test_a_single_window_has_no_spread(tmp_path):
    store(tmp_path, table().runs()[0], perplexity=7.0, standard_error=None)
    made = rows.rows(table(), tmp_path)
    assert frames.text(made)[f"perplexity {KEY}"][0] == "7.00"
    assert "standard error" not in markdown.markdown(table(), made)


def test_all_wrong_is_not_said_to_be_certain(tmp_path):
    for score, error, told in ((0.0, 0.0, "0.0"), (1.0, 0.0, "100.0"), (0.5, 0.1, "50.0 ± 10.0")):
        row = rows.Row("m", "s", table().runs()[0], small.record(table().runs()[0], measures={KEY: {
            "score": score, "standard_error": error}}), None)  # fmt: skip
        assert frames.text([row])[f"{KEY}, %"][0] == told


def test_other_protocols_have_their_own_column(tmp_path):
    both = table(measures=(small.PPL, Perplexity("ptb/test", window=128)))
    for run in both.runs():
        store(tmp_path, run)
    assert list(frames.text(rows.rows(both, tmp_path)).columns[3:]) == [f"perplexity {KEY}", "perplexity ptb/test@128"]


def test_the_same_key_on_other_tokens_is_refused(tmp_path):
    dense, magnitude, *_ = table().runs()
    store(tmp_path, dense, token_sha256="a" * 64)
    store(tmp_path, magnitude, token_sha256="b" * 64)
    with pytest.raises(
        ValueError,
        match=r"Magnitude 50 % and the rows above it were measured on different tokens .* \(bbbbbbbbbbbb and aaaa",
    ):
        frames.columns(rows.rows(table(), tmp_path))


def test_records_of_another_protocol_are_named_and_not_shown(tmp_path):
    store(tmp_path, table(measures=(Perplexity("ptb/test", window=128),)).runs()[0])
    with pytest.raises(LookupError, match=r"at ptb/test@64\[:4\] .*Records there are of .*float32 at ptb/test@128\."):
        rows.rows(table(), tmp_path)


def test_a_tampered_record_is_missing_from_the_table(made, tmp_path, caplog):
    small.edit(next(tmp_path.glob(f"runs/tiny/{made[3].record.id}.json")), "40.126", "30.126")
    again = rows.rows(table(), tmp_path)
    assert [row.state for row in again] == ["done", "done", "failed", "missing", "missing"]
    assert "checksum" in caplog.text


def test_a_record_stands_whatever_folder_the_model_lies_in(tmp_path):
    here, there = (table(models=(f"/{place}/model",)) for place in ("here", "there"))
    store(tmp_path, here.runs()[0])
    assert rows.rows(there, tmp_path)[0].state == "done"


def test_folders_of_one_name_are_told_apart_by_what_is_in_them(tmp_path):
    made = []
    for place in ("here", "there"):
        folder = tmp_path / place / "model"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(place)
        run = table(models=(str(folder),)).runs()[0]
        made.append(run)
        identity = {"fingerprint": fingerprint(folder)}
        records.write(small.record(run, id=run.id(identity), spec=run.spec(identity)), tmp_path)
    for run in made:
        (row, *_) = rows.rows(table(models=(run.model,)), tmp_path)
        assert row.record.spec["model"]["fingerprint"] == fingerprint(Path(run.model))
    with pytest.raises(ValueError, match="are of 2 different models named model; choose one by its folder"):
        rows.rows(table(models=("/elsewhere/model",)), tmp_path)


def test_seeds_that_nothing_draws_by_make_one_cell():
    columns = tuple((model, seed) for model in ("smollm2-135m",) for seed in (0, 1))
    run = lambda method, model, seed: Run(model, method, Windows("c4/train", 4, 32, seed), (small.PPL,))  # noqa: E731
    made = rows.declared(Table("tiny", "A tiny table", METHODS[:3], columns, run), Path("none"),
                         Table("tiny", "", METHODS[:3], columns, run).runs())  # fmt: skip
    assert [row.method for row in made] == ["Dense", "Magnitude", "Wanda", "Wanda"]


def test_sweeps_over_weights_away_from_the_device_are_noted(tmp_path):
    dense, pruned = (
        next(run for run in table().runs() if type(run.method) is kind) for kind in (type(None), pruners.Wanda)
    )
    for run, sweeps in ((dense, 1), (pruned, 3)):
        away = {"home": "disk", "reason": "asked for", "sweeps": sweeps, "bytes_read": sweeps * 13_000_000_000}
        made = small.record(run)
        records.write(made.model_copy(update={"made_by": made.made_by.model_copy(update={"weights": away})}), tmp_path)
    read = "Dense 1 sweep, 13.0 GB read; Wanda 50 % 3 sweeps, 39.0 GB read"
    told = f"Weights on the disk, a block at a time on the device: {read}."
    assert told in notes.notes(table(), rows.rows(table(), tmp_path))


def test_partial_data_is_noted(tmp_path):
    run = table().runs()[0]
    records.write(small.record(run, data={"ptb/test": {"complete": False}}), tmp_path)
    assert "Only a part of ptb/test was available." in markdown.markdown(table(), rows.rows(table(), tmp_path))


def test_all_files_are_written(made, tmp_path):
    paths = markdown.write(table(), made, tmp_path / "tiny") + style.save(
        perplexity.perplexity(table(), made), tmp_path / "tiny"
    )
    assert [path.name for path in paths] == ["tiny.md", "tiny.csv", "tiny.tex", "tiny.svg", "tiny.png"]
    assert Image.open(paths[-1]).size[0] > 1000
    assert not list(tmp_path.glob("*.tmp"))


def test_the_figure_draws_every_measured_cell_and_its_error(made):
    (axes,) = perplexity.perplexity(table(), made).axes
    points = {container.get_label(): container[0].get_xdata().tolist() for container in axes.containers}
    assert points == {"50 %": [1234.5, 40.126]}
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["Magnitude", "GBLM l1"]
    assert axes.lines[0].get_xdata() == [25.0, 25.0]


def test_a_figure_of_several_protocols_asks_which(tmp_path):
    both = table(measures=(small.PPL, Perplexity("ptb/test", window=128)))
    store(tmp_path, both.runs()[1])
    made = rows.rows(both, tmp_path)
    with pytest.raises(ValueError, match=r"choose with --measure one of: ptb/test@64\[:4\], ptb/test@128"):
        perplexity.perplexity(both, made)
    assert perplexity.perplexity(both, made, "ptb/test@128").axes
    with pytest.raises(LookupError, match="Did you mean"):
        perplexity.perplexity(both, made, "ptb/test@1280")


def test_every_model_has_its_panel(tmp_path):
    two = table(models=("smollm2-135m", "opt-125m"))
    for run in two.runs():
        store(tmp_path, run)
    assert len(perplexity.perplexity(two, rows.rows(two, tmp_path)).axes) == 2


def _declared(*runs: Run) -> Table:
    return Table("mine", "Mine", runs, (("",),), lambda run, _: run)


DRAWN = Run("smollm2-135m", pruners.Wanda(sparsity=0.5), small.WINDOWS, (small.PPL,))
NORMS = Retraining(Trainable(norms=True), small.WINDOWS, steps=3, learning_rate=1e-3)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"windows": replace(small.WINDOWS, count=1)}, ("Wanda 50 %, 4 windows", "Wanda 50 %, 1 window")),
        ({"windows": replace(small.WINDOWS, length=16)}, ("Wanda 50 %, 32 tokens", "Wanda 50 %, 16 tokens")),
        ({"windows": replace(small.WINDOWS, corpus="ptb/train")}, ("Wanda 50 %, c4/train", "Wanda 50 %, ptb/train")),
        ({"windows": replace(small.WINDOWS, order=1)}, ("Wanda 50 %", "Wanda 50 %, windows reordered")),
        ({"dtype": "bfloat16"}, ("Wanda 50 %, float32", "Wanda 50 %, bfloat16")),
        ({"measures": (replace(small.PPL, limit=2),)}, (f"Wanda 50 %, {KEY}", "Wanda 50 %, ptb/test@64[:2]")),
        ({"method": pruners.Wanda(sparsity=0.5000001)},
         ("Wanda 50 %, sparsity 0.5", "Wanda 50 %, sparsity 0.5000001")),
        ({"model": "smollm2-135m=/elsewhere"}, ("Wanda 50 %, smollm2-135m", "Wanda 50 %, smollm2-135m=/elsewhere")),
    ],
)  # fmt: skip
def test_only_draws_are_averaged_and_other_experiments_have_names_of_their_own(tmp_path, changes, names):
    table = _declared(DRAWN, replace(DRAWN, windows=replace(small.WINDOWS, seed=1)), replace(DRAWN, **changes))
    made = rows.declared(table, tmp_path, table.runs())
    assert [row.label for row in made] == [names[0], names[0], names[1]]
    assert [len(group) for group in rows.repeats(made)] == [2, 1]
    assert [len(cell.rows) for cell in compare.cells(table, made)] == [2, 1]
    if "model" not in changes:  # that folder is not here
        assert [cell.label for cell in cells.cells(table.runs(), table)] == [
            f"{names[0]}, seed 0", f"{names[0]}, seed 1", names[1],
        ]  # fmt: skip


def test_recoveries_of_other_rates_and_steps_are_other_methods(tmp_path):
    others = (NORMS, replace(NORMS, learning_rate=1e-2), replace(NORMS, learning_rate=1e-2, steps=5))
    table = _declared(*(replace(DRAWN, recovery=recovery) for recovery in others))
    assert [row.method for row in rows.declared(table, tmp_path, table.runs())] == [
        f"Wanda + norms, steps {steps}, learning rate {rate}" for steps, rate in ((3, 0.001), (3, 0.01), (5, 0.01))
    ]


def test_what_is_drawn_by_a_method_or_a_recovery_is_averaged_too(tmp_path):
    for one in (
        [replace(DRAWN, windows=None, method=pruners.Random(sparsity=0.5, seed=seed)) for seed in range(3)],
        [replace(DRAWN, recovery=replace(NORMS, seed=seed)) for seed in range(3)],
    ):
        made = rows.declared(_declared(*one), tmp_path, one)
        assert len(rows.repeats(made)) == 1


def test_a_baseline_of_another_table_was_measured_on_the_same_text(tmp_path, monkeypatch):
    here, there = replace(table(), name="here", rows=METHODS[1:]), replace(table(), name="there", rows=METHODS[:1])
    monkeypatch.setattr(papers, "TABLES", {"here": here, "there": there})
    told = {**small.record(DRAWN).measures[KEY], "nll_per_window": [3.0, 3.5, 4.0, 3.2]}
    records.write(small.record(here.runs()[0], table="here", measures={KEY: told}), tmp_path)
    made = rows.rows(here, tmp_path)
    for sha, refused in (("ab" * 32, False), ("cd" * 32, True)):
        other = {**told, "nll_per_window": [2.0, 2.5, 3.0, 2.2], "token_sha256": sha}
        records.write(small.record(there.runs()[0], table="there", measures={KEY: other}), tmp_path)
        against = comparisons.baselines(here, made, [tmp_path])
        if not refused:
            assert "The dense smollm2-135m is taken from `there`" in comparisons.page(here, made, against)
            continue
        with pytest.raises(ValueError, match=r"^Dense of there, the baseline, was measured on other tokens than Magn"):
            comparisons.page(here, made, against)
