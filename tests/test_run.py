"""Running a table: nothing is lost, nothing is done twice, one failure stops nothing else."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_table as small
import torch

import pruners
from experiments import cells, errors, labels, measures, models
from experiments.batch import run_table
from experiments.progress import Board, duration
from experiments.settings import Settings
from experiments.spec import Perplexity
from experiments.store import atomic, locks, records
from pruners.retrain.schedule import Diverged
from pruners.weights.storage import StorageError

needs_model = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small.data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    outcome = small.run(root, data)
    assert (outcome.found, outcome.failed, len(outcome.done)) == ([], [], 5)
    return root


@pytest.fixture(scope="module")
def processes():
    """Processes that have everything imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["small_table", "transformers.models.llama.modeling_llama"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # the server that preloads knows no other way
        yield context


def results(root: Path) -> dict[str, tuple]:
    """What must be equal bit for bit."""
    return {id: (r.spec, r.achieved, r.measures, r.data) for id, r in records.load(root, "tiny").items()}


def run_in(processes, root: Path, data: Path, kill_after: float | None = None) -> float | None:
    """Run the table in a process of its own: the seconds it took, or None if it was killed with -9."""
    started = time.monotonic()
    run = processes.Process(target=small.run, args=(root, data))
    run.start()
    run.join(kill_after)
    if run.is_alive():
        os.kill(run.pid, signal.SIGKILL)
        run.join()
    assert run.exitcode in (0, -signal.SIGKILL)
    return time.monotonic() - started if run.exitcode == 0 else None


@needs_model
def test_a_record_says_what_was_asked_achieved_measured_and_how_it_was_made(undisturbed):
    (wanda,) = [r for r in records.load(undisturbed, "tiny").values() if r.spec["method"] == {"name": "wanda", **HALF}]
    assert wanda.achieved["sparsity"] == pytest.approx(0.5, abs=0.01)
    assert len(wanda.achieved["projections"]) == 5 * 7
    assert wanda.measures["ptb/test@64[:4]"]["tokens"] == 4 * 64
    assert wanda.data["c4/train"]["complete"] is False
    assert {"load", "calibrate", "prune", "measure", "total"} <= set(wanda.cost.seconds)
    assert wanda.cost.peak_bytes > 10**7
    assert (wanda.made_by.packages["torch"], wanda.made_by.dtype, wanda.resumed) == (torch.__version__, "float32", 0)


HALF = {"sparsity": 0.5, "pattern": None, "group": "row"}


@needs_model
def test_a_second_run_finds_every_record_and_does_nothing(undisturbed, data):
    before = {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.json")}
    with small.full_disk():  # which is no hindrance to one that writes nothing
        outcome = small.run(undisturbed, data)
    assert (len(outcome.found), outcome.done, outcome.failed) == (5, [], [])
    assert {path: path.stat().st_mtime_ns for path in undisturbed.rglob("*.json")} == before


@needs_model
def test_a_missing_record_alone_is_made_again_with_the_same_bits(undisturbed, data):
    before = results(undisturbed)
    next((undisturbed / "runs" / "tiny").glob("*.json")).unlink()
    assert len(small.run(undisturbed, data).done) == 1
    assert results(undisturbed) == before


@needs_model
def test_killed_at_random_moments_and_run_again_gives_the_same_records(tmp_path, data, undisturbed, processes):
    kills, draw, root = int(os.environ.get("KILLS", 5)), random.Random(0), tmp_path / "results"
    seconds = [run_in(processes, tmp_path / f"timed {n}", data) for n in range(2)][-1]
    killed = 0
    while killed < kills:
        if len(results(root)) == 5:  # start over
            shutil.rmtree(root)
        took = run_in(processes, root, data, kill_after=draw.uniform(0, seconds))
        killed += took is None
        seconds = seconds if took is None else 0.8 * seconds  # done too soon: the machine has become faster
        assert all(results(undisturbed)[id] == result for id, result in results(root).items())
    small.run(root, data)
    assert results(root) == results(undisturbed)


@needs_model
def test_two_processes_share_a_table_and_do_no_cell_twice(tmp_path, data, undisturbed, processes):
    with processes.Pool(2) as pool:
        outcomes = pool.starmap(small.run, [(tmp_path, data), (tmp_path, data)])
    done = [label for outcome in outcomes for label in outcome.done]
    assert sorted(done) == sorted(cell.label for cell in cells.cells(small.table().runs()))
    assert results(tmp_path) == results(undisturbed)


@needs_model
def test_a_start_that_was_broken_off_is_counted(tmp_path, data, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(measures, "measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            small.run(tmp_path, data, methods=(None,))
    assert small.run(tmp_path, data, methods=(None,)).done == ["Dense"]
    (record,) = records.load(tmp_path, "tiny").values()
    assert record.resumed == 1


@needs_model
def test_one_failing_cell_is_recorded_and_does_not_stop_the_others(tmp_path, data, capsys):
    methods = (pruners.Wanda(pattern="3:7"), None)  # no row of 64 weights has groups of 7
    outcome = small.run(tmp_path, data, methods)
    assert (outcome.failed, outcome.done) == (["Wanda 3:7"], ["Dense"])
    (failure,) = records.load_failures(tmp_path, "tiny").values()
    assert "multiple of 7" in failure.message
    assert failure.traceback[-1].startswith("ValueError")
    assert "Wanda 3:7: failed" in capsys.readouterr().err


@needs_model
def test_a_disk_that_fills_ends_the_table_and_tells_what_was_measured(tmp_path, data, monkeypatch, capsys):
    def full(record, root):
        monkeypatch.setattr(atomic, "check_writable", refuse)
        raise StorageError("no space left on device; free some.")

    def refuse(folder):
        raise StorageError(f"{folder} is full.")

    monkeypatch.setattr(records, "write", full)
    methods = [pruners.Magnitude(sparsity=sparsity) for sparsity in (0.3, 0.4, 0.5)]
    with pytest.raises(StorageError, match=r"is full\. The other cells were not begun; the same command"):
        small.run(tmp_path, data, methods)
    shown = capsys.readouterr().err
    assert shown.count("Measured, and not kept: sparsity 0.3") == 1
    assert "Magnitude 40 %" not in shown
    monkeypatch.undo()
    assert len(small.run(tmp_path, data, methods).done) == 3


def test_what_this_project_declares_is_no_bug_of_it():
    with pytest.raises(Diverged) as raised:
        raise Diverged("Retraining diverged at step 3 of 3; use a lower learning rate")
    assert errors.sentence(raised.value) == "Retraining diverged at step 3 of 3; use a lower learning rate"
    assert not errors.is_fault(raised.value)


@needs_model
@pytest.mark.parametrize("flock", [True, False], ids=["flock", "lease"])
@pytest.mark.parametrize("gone", [".cache", "."])
def test_a_folder_that_is_removed_meanwhile_stops_no_cell(tmp_path, data, monkeypatch, gone, flock):
    root, score = tmp_path / "r", pruners.Magnitude.score

    def removing(self, *arguments):
        shutil.rmtree(root / gone, ignore_errors=True)
        return score(self, *arguments)

    monkeypatch.setattr(pruners.Magnitude, "score", removing)
    monkeypatch.setattr(locks, "_has_flock", lambda folder: flock)
    methods = [pruners.Magnitude(sparsity=sparsity) for sparsity in (0.3, 0.4, 0.5)]
    outcome = small.run(root, data, methods)
    assert (len(outcome.done), outcome.failed) == (3, [])


DAMAGE = {
    "a folder": lambda path: path.mkdir(parents=True),
    "no text": lambda path: (path.parent.mkdir(parents=True), path.write_bytes(b"\xff\xfe")),
    "a pipe": lambda path: (path.parent.mkdir(parents=True), os.mkfifo(path)),
}


@needs_model
@pytest.mark.parametrize(
    ("name", "damage", "failed"),
    [
        ("tiny/{id}", "a folder", 1),
        ("tiny/{id}", "no text", 0),
        ("tiny/{id}", "a pipe", 0),
        ("tiny/{id}.lock", "a folder", 1),
        ("{id}.lock", "a folder", 1),
    ],
)
def test_what_is_wrong_with_the_start_of_one_cell_stops_no_other(tmp_path, data, name, damage, failed):
    methods = small.METHODS[:3]
    first = cells.ordered(cells.cells(small.table(methods).runs()))[0]
    DAMAGE[damage](tmp_path / ".cache/started" / name.format(id=first.id))
    outcome = small.run(tmp_path, data, methods)
    assert (len(outcome.done), outcome.failed) == (3 - failed, [first.label] * failed)
    for failure in records.load_failures(tmp_path, "tiny").values():
        assert failure.message.startswith(
            f"Cannot write {tmp_path}/.cache/started/{name.format(id=first.id)}: is a dir"
        )


@needs_model
def test_a_failed_cell_is_tried_again(tmp_path, data, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(models, "load", lambda *_: (_ for _ in ()).throw(OSError("the disk is gone")))
        assert small.run(tmp_path, data, (None,)).failed == ["Dense"]
    assert small.run(tmp_path, data, (None,)).done == ["Dense"]
    assert records.load_failures(tmp_path, "tiny") == {}


@needs_model
@pytest.mark.parametrize(
    ("windows", "reason"),
    [(Perplexity("ptb/test", 64, 10**6), "needs 64,000,000 tokens"), (Perplexity("ptb/tset", 64), "ptb/test")],
)
def test_a_measure_that_cannot_be_taken_is_one_sentence(tmp_path, data, windows, reason):
    runs = small.table((None,), measures=(windows,)).runs()
    run_table("tiny", cells.cells(runs), Settings(tmp_path, data_dir=data))
    (failure,) = records.load_failures(tmp_path, "tiny").values()
    assert reason in failure.message


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nsecond line"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 10 bytes"),
    ],
)
def test_running_out_of_memory_names_the_knobs(error):
    sentence = errors.sentence(error)
    assert all(knob in sentence for knob in ("--batch-size", "--dtype", "--device", "windows"))
    assert "\n" not in sentence


def test_other_errors_keep_their_own_words():
    assert errors.sentence(ValueError("no such thing")) == "no such thing"
    assert errors.sentence(KeyError("weight")) == "KeyError: weight"
    assert errors.sentence(RuntimeError("bad\nworse")) == "RuntimeError: bad"


@needs_model
def test_cells_that_share_statistics_run_next_to_each_other():
    methods = (pruners.GBLM(sparsity=0.5), pruners.Wanda(sparsity=0.5), pruners.GBLM(pattern="2:4"))
    found = cells.ordered(cells.cells(small.table(methods).runs()))
    assert [cell.label for cell in found] == ["GBLM 50 %", "GBLM 2:4", "Wanda 50 %"]


def test_a_device_that_is_not_there_is_refused():
    assert Settings(device="cpu").device == "cpu"
    with pytest.raises(ValueError, match=r"There is no device 'cuda:99' here; found cpu"):
        Settings(device="cuda:99")


def test_labels_name_what_varies_or_departs_from_the_default():
    methods = (
        None, pruners.GBLM(sparsity=0.5), pruners.GBLM(pattern="2:4", norm="l2"), pruners.Wanda(sparsity=0.625),
        pruners.SparseGPT(sparsity=0.5, damping=0.1),
    )  # fmt: skip
    found = [labels.full(label) for label in labels.labels(small.table(methods).runs())]
    assert found == ["Dense", "GBLM l1 50 %", "GBLM l2 2:4", "Wanda 62.5 %", "SparseGPT damping=0.1 50 %"]


def test_the_time_left_follows_the_work_done(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    board = Board([10, 30], seconds_per_work=60)
    with board:
        assert board.left() == "about 40 min left"
        clock[0] += 20
        board.finish(10, "first")
        assert board.left() == "about 60 s left"
        board.stage("pruning", work=20)(1, 2)
        assert board.left() == "about 20 s left"


def test_durations_are_short():
    assert [duration(s) for s in (3.4, 120, 7200)] == ["3 s", "2 min", "2.0 h"]


@needs_model
def test_a_command_whose_reader_has_gone_stops_and_fails_no_cell(data, tmp_path):
    """As before `| head`."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import small_table as small\n"
        "from experiments import papers\n"
        "from experiments.__main__ import main\n"
        "papers.TABLES['tiny'] = small.table()\n"
        "sys.exit(main(['run', 'tiny', '--results', sys.argv[2], '--data-dir', sys.argv[3]]))\n"
    )
    words = [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path), str(data)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=Path(__file__).parents[1])
    process.stdout.close()
    assert process.wait() == 141
    assert list(tmp_path.rglob("*.error.json")) == []
