"""Several tables in one command: which cells are meant, which are left as too large, and that none is made twice."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import small_table as small

import pruners
from experiments import __main__ as experiments
from experiments import callbacks, cells, papers
from experiments.selection import terms
from experiments.spec import Run, Table, Windows
from experiments.store import elsewhere, records
from pruners.retrain import Trainable
from slurm import __main__ as slurm
from slurm import jobs, launch, ledger, queue, state
from slurm.profile import Profile

CARD = Profile(gres="gpu:1", gpu_memory_gb=24, teraflops=40)
LARGE = Profile(gres="gpu:1", gpu_memory_gb=80, teraflops=60)
PROCESSORS = Profile(teraflops=0.1)


def seeded(name: str = "seeded") -> Table:
    """Two models, three seeds."""
    columns = tuple((model, seed) for model in ("llama-7b", "llama-13b") for seed in (0, 1, 2))
    return Table(
        name, "Seeds", (None, pruners.Wanda(sparsity=0.5), pruners.Wanda(pattern="2:4")), columns,
        lambda method, model, seed: Run(model, method, Windows("c4/train", 128, 2048, seed), (small.PPL,), "float16"),
    )  # fmt: skip


def chosen(*only: str, methods: tuple[str, ...] = ()) -> list[str]:
    table = seeded()
    found = terms.choose({"seeded": cells.cells(table.runs())}, methods, only)
    return [cell.label for cell in found["seeded"]]


@pytest.mark.parametrize("table", papers.TABLES.values(), ids=papers.TABLES)
def test_no_two_cells_of_a_table_are_called_the_same(table):
    labels = [cell.label for cell in cells.cells(table.runs(), table)]
    assert len(set(labels)) == len(labels)


def test_cells_are_chosen_by_model_seed_and_setting():
    assert chosen("model=llama-7b", "seed=1", "Wanda 50 %") == ["Wanda 50 %, llama-7b, seed 1"]
    assert chosen("seed=0", "seed=2", "model=LLaMA-13b", "2:4") == [
        "Wanda 2:4, llama-13b, seed 0", "Wanda 2:4, llama-13b, seed 2",
    ]  # fmt: skip
    assert chosen("setting=0.5", "model=llama-7b") == chosen("setting=50%", "model=llama-7b")
    assert chosen("setting=50%", "model=llama-7b") == [f"Wanda 50 %, llama-7b, seed {seed}" for seed in (0, 1, 2)]
    assert chosen("Dense", "wanda 2:4, llama-7b, seed 1") == [
        "Dense, llama-7b", "Dense, llama-13b", "Wanda 2:4, llama-7b, seed 1",
    ]  # fmt: skip
    assert chosen("model=llama-13b", methods=("dense",)) == ["Dense, llama-13b"]


@pytest.mark.parametrize(
    ("only", "said"),
    [
        (["model=llama-8b"], "Unknown model of this table 'llama-8b'. Did you mean llama-7b"),
        (["seed=3"], "Unknown seed of this table '3'"),
        (["setting=60 %"], "Unknown setting"),
        (["Wanda 60 %"], "Did you mean wanda 50 %"),
        (["Dense", "seed=1"], "No cell matches dense and seed=1"),
    ],
)
def test_a_term_that_no_cell_answers_is_one_sentence(only, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        chosen(*only)


def all_weights(model: str) -> Run:
    """What no home of the weights but the device allows."""
    run = small.retrained().runs()[0]
    return replace(run, model=model, dtype="float16", recovery=replace(run.recovery, trainable=Trainable.full()))


@pytest.fixture
def two(monkeypatch, tmp_path) -> list[str]:
    """Words for two tables that share two of their cells, and the others are each its own."""
    if not small.MODEL.is_dir():
        pytest.skip(f"{small.MODEL} is absent")
    dense, magnitude, wanda, *_ = small.METHODS
    monkeypatch.setitem(papers.TABLES, "one", small.table((dense, magnitude), "one"))
    monkeypatch.setitem(papers.TABLES, "two", small.table((dense, magnitude, wanda), "two"))
    data = small.data(tmp_path / "data")
    return ["one", "two", "--results", str(tmp_path), "--data-dir", str(data)]


def ids(root, table: str) -> set[str]:
    return set(records.load(root, table))


def test_a_cell_of_two_tables_is_made_once(two, tmp_path, capsys):
    assert experiments.main(["run", *two]) == 0
    said = capsys.readouterr().err
    assert "Reused from other tables: 2 of 3 cells." in said
    assert "one: 2 done now, 0 before, 0 failed" in said
    assert "two: 1 done now, 2 before, 0 failed" in said
    assert ids(tmp_path, "one") < ids(tmp_path, "two")
    assert experiments.main(["check-records", str(tmp_path)]) == 0


def test_a_record_of_other_code_or_texts_is_not_taken_over(two, tmp_path):
    assert experiments.main(["run", "one", *two[2:], "--only", "dense"]) == 0
    (record,) = records.load(tmp_path, "one").values()
    (cell,) = (c for c in cells.cells(papers.TABLES["two"].runs()) if c.id == record.id)
    assert elsewhere.known(tmp_path, "two", cell, tmp_path / "data") is not None
    records.write(record.model_copy(update={"code": {**record.code, "measures": {}}}), tmp_path)
    assert elsewhere.known(tmp_path, "two", cell, tmp_path / "data") is None
    records.write(record, tmp_path)
    ptb = tmp_path / "data/ptb/ptb_test.jsonl"
    ptb.write_text("".join(reversed(ptb.read_text().splitlines(keepends=True))))
    assert elsewhere.known(tmp_path, "two", cell, tmp_path / "data") is None


def test_answers_go_along_with_a_record_and_one_without_them_is_not_taken(two, tmp_path):
    assert experiments.main(["run", "one", *two[2:], "--only", "dense"]) == 0
    (record,) = records.load(tmp_path, "one").values()
    (cell,) = (c for c in cells.cells(papers.TABLES["two"].runs()) if c.id == record.id)
    kept = {"file": f"{record.id}.answers.jsonl.gz", "sha256": "0" * 64}
    measured = {key: {**value, "samples": kept} for key, value in record.measures.items()}
    records.write(record.model_copy(update={"measures": measured}), tmp_path)
    assert elsewhere.adopt(tmp_path, "two", cell, tmp_path / "data") is None
    (tmp_path / "runs/one" / kept["file"]).write_bytes(b"answers")
    assert elsewhere.adopt(tmp_path, "two", cell, tmp_path / "data") is None  # other answers than the record's
    kept["sha256"] = hashlib.sha256(b"answers").hexdigest()
    records.write(record.model_copy(update={"measures": measured}), tmp_path)
    taken = elsewhere.adopt(tmp_path, "two", cell, tmp_path / "data")
    assert taken.table == "two"
    assert (tmp_path / "runs/two" / kept["file"]).read_bytes() == b"answers"


def test_what_a_card_cannot_take_is_listed_and_left_and_the_rest_goes(two, tmp_path, monkeypatch, capsys):
    large, dense = all_weights("llama-65b"), small.table((None,)).runs()[0]
    both = replace(
        papers.TABLES["one"], name="both", rows=(None, "large"),
        run=lambda row, _: large if row else dense,
    )  # fmt: skip
    monkeypatch.setitem(papers.TABLES, "both", both)
    words = ["run", "both", *two[2:], "--card", "24"]
    assert experiments.main(words) == 0
    said = capsys.readouterr().err
    assert "both: left out: Wanda + all weights 50 %: llama-65b needs about" in said
    assert "training all weights needs all weights on the device" in said
    assert "both: 1 done now, 0 before, 0 failed, 1 left out" in said
    assert experiments.main([*words, "--strict"]) == 1


def test_one_submission_of_two_tables_sends_every_cell_once_and_all_have_their_records(two, tmp_path, capsys):
    assert slurm.main(["submit", *two, "--executor", "debug"]) == 0
    told = capsys.readouterr()
    assert told.out == "debug: Dense, Magnitude 50 %, Wanda 50 %\n"
    assert "2 tables: cells submitted: 5, done or queued already: 0" in told.err
    (entry,) = ledger.load(tmp_path)
    assert entry.table == "one+1"
    assert ids(tmp_path, "one") == set(entry.of("one"))
    assert ids(tmp_path, "two") == set(entry.of("two")) == set(entry.cells)
    assert slurm.main(["status", "--results", str(tmp_path)]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["one", "2", "2"] in shown
    assert ["two", "3", "3"] in shown
    assert ["5", "done"] in shown
    assert slurm.main(["status", "one", "--json", "--results", str(tmp_path)]) == 0
    assert {(one["table"], one["state"]) for one in json.loads(capsys.readouterr().out)} == {("one", "done")}


def test_a_cell_that_failed_for_one_table_is_not_tried_for_the_next(two, tmp_path, monkeypatch, capsys):
    methods = (pruners.Wanda(pattern="3:7"),)
    for name in ("one", "two"):
        monkeypatch.setitem(papers.TABLES, name, small.table(methods, name))
    assert slurm.main(["submit", *two, "--executor", "debug"]) == 0
    assert capsys.readouterr().err.count("failed: ") == 1
    for name in ("one", "two"):
        (failure,) = records.load_failures(tmp_path, name).values()
        assert "multiple of 7" in failure.message
    assert slurm.main(["status", "--results", str(tmp_path)]) == 1
    assert "two: failed: Wanda 3:7: " in capsys.readouterr().out


def test_every_cell_goes_to_the_smallest_card_that_holds_it_or_else_takes_it():
    runs = [
        seeded().runs()[0],
        replace(seeded().runs()[0], model="llama-30b"),
        replace(seeded().runs()[0], model="llama-65b"),
        all_weights("opt-2.7b"),
        all_weights("llama-65b"),
    ]
    found = cells.cells(runs)

    def sent(**profiles: Profile) -> tuple[dict[str, list[int]], list[int]]:
        by, left = jobs.assigned(found, profiles)
        places = {name: [found.index(cell) for cell in some] for name, some in by.items()}
        return places, [index for index, cell in enumerate(found) if cell.id in left]

    assert sent(large=LARGE, small=CARD) == ({"small": [0, 2], "large": [1, 3]}, [4])
    assert sent(small=CARD) == ({"small": [0, 1, 2]}, [3, 4])
    assert sent(processors=PROCESSORS, small=CARD) == ({"processors": [3, 4], "small": [0, 1, 2]}, [])
    _, left = jobs.assigned(found, {"small": CARD})
    assert "opt-2.7b needs about" in left[found[3].id]


def test_what_is_cheap_to_share_is_parted_and_what_is_dear_stays_together():
    table = papers.find("llm_pruner.tuned_modules")
    tuned = [cell for cell in cells.cells(table.runs(), table) if cell.run.recovery]
    (array,) = jobs.arrays(tuned, LARGE)
    assert [len(job.cells) for job in array.jobs] == [1, 1, 1]
    table = papers.find("llm_pruner.tuning_steps")  # each goes on from the steps of the one before
    tuned = [cell for cell in cells.cells(table.runs(), table) if cell.run.recovery]
    (array,) = jobs.arrays(tuned, LARGE)
    assert len(array.jobs) == 1


def test_waiting_tasks_that_were_cancelled_are_called_so(tmp_path, monkeypatch):
    sent = (ledger.Sent("7_0", {"aa": "A"}), ledger.Sent("7_1", {"bb": "B"}))
    entry = ledger.Entry("t-1", "t", "slurm", str(tmp_path), sent, 4, "2026-01-01T00:00:00+00:00", True)
    ledger.write(entry)
    rest = queue.Queued("CANCELLED", "", "", "None")
    for told in ({"7": rest}, {}):  # the queue forgets after some minutes
        monkeypatch.setattr(queue, "jobs", lambda names, told=told: told)
        assert [cell.state for cell in state.cells(tmp_path, "t", {"aa": "A", "bb": "B"})] == ["cancelled"] * 2


def test_when_a_running_cell_will_be_done_is_said_by_its_own_pace(tmp_path, monkeypatch):
    sent = ledger.Sent("7", {"aa": "A", "bb": "B"})
    entry = ledger.Entry("t-1", "t", "slurm", str(tmp_path), (sent,), 4, "2026-01-01T00:00:00+00:00", True)
    ledger.write(entry)
    monkeypatch.setattr(queue, "jobs", lambda names: {"7": queue.Queued("RUNNING", "n1", "", "")})
    log = callbacks.Events(entry.events(0))
    log.cell = "aa"
    log.write("started", label="A", resumed=0)
    log.stage("pruning")
    log.pace(0.25, 3600)
    (line,) = [event for event in callbacks.read(entry.events(0)) if event["event"] == "progress"]
    running, waiting = state.cells(tmp_path, "t", {"aa": "A", "bb": "B"})
    assert (running.state, running.stage, running.share) == ("running", "pruning", 0.25)
    assert datetime.fromisoformat(running.end) > datetime.fromisoformat(line["at"]) + timedelta(minutes=58)
    assert (waiting.state, waiting.note) == ("queued", "after other cells of its job")
    assert slurm.main(["status", "--results", str(tmp_path)]) == 0


def test_a_cell_that_a_job_has_is_for_a_later_submission_too(two, tmp_path, monkeypatch, capsys):
    """A Slurm whose jobs are in the queue until the test runs them."""
    sent, names = [], two[:2]
    monkeypatch.setattr(queue, "check", lambda: None)
    monkeypatch.setattr(queue, "cancel", lambda ids: pytest.fail("somebody wants it") if ids else None)
    monkeypatch.setattr(queue, "jobs", lambda names: {f"{n}_0": queue.Queued("RUNNING", "n", "", "") for n in range(9)})
    send = lambda entry, works, *_: (sent.extend(works), [f"{len(sent)}_{n}" for n, _ in enumerate(works)])[1]  # noqa: E731
    monkeypatch.setitem(launch.SENDERS, "slurm", send)
    for name in names:
        assert slurm.main(["submit", name, *two[2:]]) == 0
    assert "two: cells submitted: 1, done or queued already: 2" in capsys.readouterr().err
    first, second = ledger.load(tmp_path)
    assert [len(entry.cells) for entry in (first, second)] == [2, 1]
    assert set(first.of("two")) == set(first.of("one")) == set(first.cells)
    assert slurm.main(["cancel", "one", *two[2:]]) == 0
    assert "1 continue, as they have cells for two" in capsys.readouterr().err
    sent[0]()
    assert ids(tmp_path, "one") == ids(tmp_path, "two") == set(first.cells)
    assert slurm.main(["status", "--json", "--results", str(tmp_path)]) == 0
    told = [(one["table"], one["state"]) for one in json.loads(capsys.readouterr().out)]
    assert sorted(told) == [("one", "done")] * 2 + [("two", "done")] * 2 + [("two", "queued")]


def test_cancel_leaves_jobs_of_its_submission_that_have_no_cell_of_its_table(two, tmp_path, monkeypatch, capsys):
    dense, *others = cells.cells(small.table(small.METHODS[:3], "two").runs())
    entry = ledger.Entry(
        "one+1-x", "one+1", "slurm", str(tmp_path), tuple(ledger.Sent(f"1_{n}", {cell.id: cell.label})
        for n, cell in enumerate((dense, others[-1]))), 2.0, records.now(), True,
        tables={dense.id: ["one"], others[-1].id: ["two"]},
    )  # fmt: skip
    ledger.write(entry)
    stopped: list[str] = []
    monkeypatch.setattr(queue, "cancel", stopped.extend)
    monkeypatch.setattr(queue, "jobs", lambda _: {f"1_{n}": queue.Queued("RUNNING", "n", "", "") for n in range(2)})
    assert slurm.main(["cancel", "one", *two[2:]]) == 0
    assert stopped == ["1_0"]
    assert "one: jobs cancelled: 1; finished cells are kept\n" in capsys.readouterr().err
