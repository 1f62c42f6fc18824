"""What waits for what, who is stopped, how many hours are asked for: without a cluster."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import small_table as small
from conftest import needs_shared
from test_slurm import GPU, found, with_changes, work

from analysis.__main__ import main as analysis
from experiments import cells, models, papers, rates
from experiments.callbacks import Events
from experiments.spec import Run
from experiments.store import records
from experiments.store.described import digest
from slurm import choices, collect, estimate, jobs, launch, ledger, overview, pace, profile, queue, reasons, state
from slurm.__main__ import main

RUNNING = queue.Queued("RUNNING", "n1", "", "")


@pytest.fixture
def sent(monkeypatch) -> list[tuple[ledger.Entry, str]]:
    """Submissions to a Slurm that runs all of them for ever, with the dependency of each."""
    told: list[tuple[ledger.Entry, str]] = []

    def send(entry, works, array, asked):
        ids = [f"{len(told) + 1}_{index}" for index, _ in enumerate(works)]
        told.append((entry.with_ids(ids), asked.options.get("dependency", "")))
        return ids

    monkeypatch.setattr(queue, "check", lambda: None)
    monkeypatch.setitem(launch.SENDERS, "slurm", send)
    ids = lambda: [job.id for entry, _ in told for job in entry.jobs]  # noqa: E731
    monkeypatch.setattr(queue, "jobs", lambda names: dict.fromkeys(ids(), RUNNING) if names else {})
    return told


def submit(tmp_path: Path, *words: str, **changes: object) -> int:
    asked = {"teraflops": 60, "gres": "gpu:1", "gpu_memory_gb": 80, "packed_hours": 0, **changes}
    (path := tmp_path / "p.toml").write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in asked.items()))
    return main(["submit", *words, "--profile", str(path), "--results", str(tmp_path / "results")])


def recorded(root: Path, run: Run, table: str, seconds: float = 2.0, device: str = "cpu") -> None:
    spec, made = run.spec(models.identity(run.model)), small.record(run)
    changes = {
        "id": digest(spec),
        "spec": spec,
        "table": table,
        "cost": records.Cost(seconds={"total": seconds}, peak_bytes=1),
    }
    records.write(
        made.model_copy(update={**changes, "made_by": made.made_by.model_copy(update={"device": device})}), root
    )


def tuned(count: int) -> list[cells.Cell]:
    """Cells of a table that need the same learning rate."""
    every = [cell for cell in cells.cells(papers.find("perp.magnitude").runs()) if cell.run.tuning]
    first = rates.choice(every[0].run)
    return [cell for cell in every if rates.choice(cell.run) == first][:count]


@pytest.mark.parametrize(
    "words",
    [
        ["flap.perplexity"],
        ["flap.perplexity", "--model", "llama-13b", "--dtype", "bfloat16", "--method", "flap", "--only", "seed=0"],
        ["gblm.zero_shot", "flap.zero_shot", "--limit", "10", "--tasks", "piqa", "--only", "model=llama-7b"],
    ],
)
def test_the_hint_after_a_submission_is_about_its_cells(tmp_path, sent, capsys, words):
    assert submit(tmp_path, *words) == 0
    hint = capsys.readouterr().err.strip().rpartition("python -m slurm ")[2]
    assert shlex.split(hint) == ["status", *words, "--results", str(tmp_path / "results")]
    assert main([*shlex.split(hint), "--json"]) == 0
    assert {cell["id"] for cell in json.loads(capsys.readouterr().out)} == {
        id for entry, _ in sent for id in entry.cells
    }


def test_jobs_that_need_a_rate_begin_after_the_one_that_chooses_it(tmp_path, sent):
    some = tuned(3)
    assert submit(tmp_path, "perp.magnitude", "--only", *(cell.id for cell in some[:2])) == 0
    (maker, nothing), (waits, dependency) = sent
    assert nothing == ""
    assert dependency == "afterany:1_0"
    assert [list(entry.cells) for entry in (maker, waits)] == [[cell.id] for cell in some[:2]]
    pending = state.Job(waits, 0, queue.Queued("PENDING", "", "", "Dependency"))
    (cell,) = state.cells(tmp_path / "results", "perp.magnitude", waits.cells, [pending])
    assert (cell.state, cell.note) == ("queued", "waits for the job that chooses its learning rate")
    (choice,) = maker.jobs[0].choices
    rate = next(cell for cell in cells.cells(papers.find("perp.rates").runs()) if cell.id == choice)
    assert submit(tmp_path, "perp.magnitude", "perp.rates", "--only", some[2].id, rate.id) == 0
    assert {dependency for _, dependency in sent[2:]} == {"afterany:1_0"}  # of a submission that is still at it
    assert len(sent) == 3


def test_a_rate_that_is_on_record_is_waited_for_by_nobody(tmp_path, sent):
    wanted = rates.choice(tuned(1)[0].run)
    assert submit(tmp_path, "perp.magnitude", "--only", tuned(1)[0].id) == 0
    (id,) = sent[0][0].jobs[0].choices
    assert choices.Choices(tmp_path, None, False, {}).needed(tuned(2)) == [id]
    recorded(tmp_path, wanted, "perp.rates")
    assert choices.Choices(tmp_path, None, False, {}).needed(tuned(2)) == []


def test_no_array_waits_for_one_that_comes_later(tmp_path):
    plan = work(tmp_path)
    every = [cell for name in ("perp.magnitude", "perp.rates") for cell in cells.cells(papers.find(name).runs())]
    named = {cell.id: cell for cell in every if cell.run.model == "opt-2.7b"}
    todo = launch.Todo(list(named.values()), {})
    planned = launch.planned(plan, todo, {"gpu": with_changes(packed_hours=0)})
    keys: set[str] = set()
    touching: dict[str, int] = {}
    for _, array in planned:
        assert set(array.after) <= keys
        keys |= {job.key for job in array.jobs}
        for job in array.jobs:
            for id in job.choices:
                touching[id] = touching.get(id, 0) + (not array.after)
    assert set(touching.values()) <= {0, 1}  # one job at most makes a choice without waiting
    assert sorted(cell.id for _, array in planned for job in array.jobs for cell in job.cells) == sorted(named)


def test_a_dependency_of_the_profile_is_kept():
    own = with_changes(options={"dependency": "singleton"})
    assert own.after(["3", "4_1"]).options["dependency"] == "singleton,afterany:3:4_1"
    assert own.after([]) == own


def test_a_job_that_another_table_wants_goes_on(tmp_path, sent, monkeypatch, capsys):
    both = {"perp.magnitude": None, "perp.cost": None}
    some = cells.cells([cell.run for cell in found()[:2]])
    entry = ledger.new(tmp_path, {some[0].id: list(both), some[1].id: ["perp.magnitude"]}, "slurm",
                       jobs.Array(tuple(jobs.Job((cell,)) for cell in some), estimate.request(some, GPU)))  # fmt: skip
    ledger.write(entry := entry.with_ids(["1_0", "1_1"]))
    sent.append((entry, ""))
    cancelled: list[str] = []
    monkeypatch.setattr(queue, "cancel", cancelled.extend)
    assert main(["cancel", "perp.magnitude", "--results", str(tmp_path)]) == 0
    assert cancelled == ["1_1"]
    said = "perp.magnitude: jobs cancelled: 1; finished cells are kept; 1 continue, as they have cells for"
    assert capsys.readouterr().err == f"{said} perp.cost; name all these tables to cancel them as well\n"
    recorded(tmp_path, some[0].run, "perp.cost")
    assert state.wanting(state.jobs(tmp_path)[0]) == {"perp.magnitude"}  # the other has its record
    cancelled.clear()
    assert main(["cancel", *both, "--results", str(tmp_path)]) == 0
    assert "1_0" in cancelled


def test_hours_are_asked_for_as_records_of_such_cells_on_that_card_tell(tmp_path):
    some = [
        cell for cell in cells.cells(papers.find("flap.perplexity").runs()) if cells.method_name(cell.run) == "flap"
    ]
    asked = with_changes(card="a100")
    for number, cell in enumerate(some[:5]):
        taken = (number + 1) / 10 * estimate.seconds([cell], asked)
        device = "NVIDIA A100-SXM4-80GB" if number < 3 else "NVIDIA H100"
        recorded(tmp_path, cell.run, "flap.perplexity", taken, device)
    told, (line,) = pace.measured(asked, tmp_path)
    assert line == "Time limit for flap, no tasks: 0.3 times the estimate, 1.5 x the median of 3 records on a100."
    assert estimate.needed_hours(some[:1], told) == pytest.approx(estimate.needed_hours(some[:1], asked) / 10)
    others = found()[:1]
    assert estimate.needed_hours(others, told) == estimate.needed_hours(others, asked)
    assert pace.measured(GPU, tmp_path) == (GPU, [])
    assert pace.measured(with_changes(card="v100"), tmp_path)[1] == []


def test_the_dry_run_says_by_what_hours_are_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pace, "measured", lambda asked, root: (asked.with_times({"dense, no tasks": 0.3}), ["By 3."]))
    assert submit(tmp_path, "flap.perplexity", "--dry-run", "--only", "Dense", "model=llama-7b") == 0
    assert f"{tmp_path / 'p.toml'}: By 3." in capsys.readouterr().err


def test_all_memory_of_a_node(tmp_path, capsys):
    words = ("flap.perplexity", "--dry-run", "--only", "Dense", "model=llama-7b")
    assert submit(tmp_path, *words, whole_memory=True) == 0
    told = capsys.readouterr().out
    assert "#SBATCH --mem=0\n" in told
    assert "in use, all memory of a node and" in told
    assert submit(tmp_path, *words, "--memory-gb", "8", whole_memory=True) == 2
    assert "requests all memory of a node (whole_memory); leave out --memory-gb." in capsys.readouterr().err
    (path := tmp_path / "q.toml").write_text('teraflops = 1\nwhole_memory = "yes"\n')
    with pytest.raises(profile.ProfileError, match="whole_memory: Input should be a valid boolean"):
        profile.load(str(path))


def test_a_job_that_had_all_memory_is_not_told_to_ask_for_more(tmp_path, sent):
    assert submit(tmp_path, "flap.perplexity", "--only", "Dense", "model=llama-7b", whole_memory=True) == 0
    (entry,) = ledger.load((tmp_path / "results").resolve())
    job = state.Job(entry, 0, replace(RUNNING, state="OUT_OF_MEMORY"))
    job.logs[1].parent.mkdir(parents=True, exist_ok=True)
    job.logs[1].write_text("slurmstepd: error: Detected 1 oom-kill event(s) in step 7.0\n")
    assert job.death.startswith("Probably out of memory, although all memory of a node was requested")


def test_no_job_is_warned_before_it_begins(tmp_path, sent):
    assert submit(tmp_path, "embedded.demo", "--collect", "--only", "Dense", warning_seconds=7200) == 0
    assert [entry.asks.rpartition(", ")[2] for entry, _ in sent] == ["4 h", "4 h"]


def test_a_results_folder_whose_logs_would_lie_elsewhere_is_refused(tmp_path, capsys):
    words = ["submit", "embedded.demo", "--dry-run", "--results", str(tmp_path / "of %j")]
    assert main(words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("replaces % in the names of logs; use a results folder without % in its path.")


def test_a_key_that_the_site_checks_is_an_option(tmp_path, capsys):
    assert submit(tmp_path, "embedded.demo", "--dry-run", "--only", "Dense") == 0
    assert "wckey" not in capsys.readouterr().out
    with (tmp_path / "p.toml").open("a") as file:
        file.write('\n[options]\nwckey = "lab"\n')
    words = ["submit", "embedded.demo", "--dry-run", "--only", "Dense", "--results", str(tmp_path)]
    assert main([*words, "--profile", str(tmp_path / "p.toml")]) == 0
    assert "#SBATCH --wckey=lab\n" in capsys.readouterr().out


def test_the_array_limit_of_the_site_parts_the_dry_run_as_well(tmp_path, monkeypatch, capsys):
    (scontrol := tmp_path / "scontrol").write_text("#!/bin/sh\necho 'MaxArraySize            = 3'\n")
    scontrol.chmod(0o755)
    monkeypatch.setattr(queue, "check", lambda: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert submit(tmp_path, "flap.perplexity", "--dry-run", "--only", "model=llama-7b") == 0
    told = capsys.readouterr().out
    assert queue.largest_array(1000) == 2
    assert "#SBATCH --array=0-1%2" in told
    assert "#SBATCH --array=0-2" not in told


@pytest.fixture
def waiting(sent, monkeypatch) -> Callable[[], list[str]]:
    """The ids of the jobs in the queue of a Slurm that starts none of them."""
    gone: list[str] = []
    pending = queue.Queued("PENDING", "", "", "PartitionConfig")
    monkeypatch.setattr(queue, "cancel", gone.extend)
    ids = lambda: [job.id for entry, _ in sent for job in entry.jobs if job.id not in gone]  # noqa: E731
    monkeypatch.setattr(queue, "jobs", lambda names: dict.fromkeys(ids(), pending) if names else {})
    return ids


def test_a_table_has_one_waiting_job_that_collects_and_cancel_stops_it(tmp_path, sent, waiting, capsys):
    words = ("embedded.demo", "--collect", "--only", "Dense")
    assert submit(tmp_path, *words) == submit(tmp_path, *words) == 0
    assert waiting() == ["1_0", "2_0"]
    assert "2_0: tables, figures, claims and report, submitted before\n" in capsys.readouterr().out
    assert submit(tmp_path, *words, "Wanda 50 %") == 0  # one more job, which it must wait for
    assert waiting() == ["1_0", "3_0", "4_0"]
    assert "4_0: tables, figures, claims and report, replacing 2_0\n" in capsys.readouterr().out
    assert set(sent[-1][1].split(":")) == {"afterany", "1_0", "3_0"}
    assert submit(tmp_path, "flap.perplexity", "--collect", "--only", "Dense", "model=llama-7b") == 0
    assert waiting() == ["1_0", "3_0", "4_0", "5_0", "6_0"]
    capsys.readouterr()
    assert main(["cancel", "embedded.demo", "--results", str(tmp_path / "results")]) == 0
    assert waiting() == ["5_0", "6_0"]
    assert capsys.readouterr().err.splitlines()[1].startswith("4_0: also cancelled, as it would have collected")
    assert main(["cancel", "--all", "--results", str(tmp_path / "results")]) == 0
    assert waiting() == []


def test_status_tells_every_collecting_job_and_fails_with_one_that_died(tmp_path, sent, monkeypatch, capsys):
    monkeypatch.setattr(launch, "missing", lambda *_, **__: launch.Todo([], {}))  # as after its jobs
    collect_one = lambda *words: submit(tmp_path, *words, "--collect", "--only", "Dense")  # noqa: E731
    assert collect_one("embedded.demo") == collect_one("embedded.demo", "--model", "llama-7b") == 0
    collectors = [entry for entry, _ in sent]
    root, over = tmp_path / "results", queue.Queued("FAILED", "", "", "NonZeroExitCode")
    queued = {entry.jobs[0].id: RUNNING for entry in collectors}
    monkeypatch.setattr(queue, "jobs", lambda names: queued)
    status = lambda: (main(["status", "--results", str(root)]), capsys.readouterr().out)  # noqa: E731
    capsys.readouterr()
    ended, told = status()
    assert ended == 0
    assert told.count("of embedded.demo: being written.") == 1
    assert told.count("of embedded.demo on llama-7b: being written.") == 1
    Events(collectors[0].events(0)).write("job finished", status=0, message="written, except figures of a (too few)")
    Events(collectors[1].events(0)).write("job started")
    queued |= {entry.jobs[0].id: over for entry in collectors}
    ended, told = status()
    assert ended == 1
    assert "of embedded.demo: written, except figures of a (too few).\n" in told
    assert "of embedded.demo on llama-7b: The job ended early (FAILED); see `logs` for its output.\n" in told
    assert collect_one("embedded.demo", "--model", "llama-7b") == 0  # in its place
    Events(sent[-1][0].events(0)).write("job finished", status=0, message="")
    monkeypatch.setattr(ledger, "load", lambda *_: entries[::-1])  # as of one second, by names
    entries = [replace(entry, at="2026-11-27T03:00:00") for entry, _ in sent]
    ended, told = status()
    assert ended == 0
    assert "of embedded.demo on llama-7b: written.\n" in told
    assert "ended early" not in told


def test_a_job_that_collects_two_tables_is_cancelled_with_the_last_of_them(tmp_path, sent, waiting):
    two = ("embedded.demo", "flap.perplexity")
    assert submit(tmp_path, *two, "--collect", "--only", "Dense") == 0
    collects = sent[-1][0].jobs[0].id
    for table, left in zip(two, (True, False), strict=True):
        assert main(["cancel", table, "--results", str(tmp_path / "results")]) == 0
        assert (collects in waiting()) is left


def test_cancel_stops_the_jobs_of_one_model(tmp_path, sent, waiting):
    for model in ("llama-7b", "llama-13b"):
        assert submit(tmp_path, "embedded.demo", "--only", "Dense", "--model", model, "--collect") == 0
    assert waiting() == ["1_0", "2_0", "3_0", "4_0"]
    words = ["cancel", "embedded.demo", "--results", str(tmp_path / "results"), "--model"]
    assert main([*words, "llama-30b"]) == 0
    assert waiting() == ["1_0", "2_0", "3_0", "4_0"]
    assert sent[-1][1] == "afterany:3_0"  # not for jobs of the other model
    assert main([*words, "llama-13b"]) == 0
    assert waiting() == ["1_0", "2_0"]


def test_status_says_what_a_reason_of_slurm_means(tmp_path, sent, waiting, monkeypatch, capsys):
    assert submit(tmp_path, "embedded.demo", "--only", "Dense", "--collect") == 0
    capsys.readouterr()
    assert main(["status", "--results", str(tmp_path / "results")]) == 0
    told = capsys.readouterr().out
    asked = sent[0][0].asks
    assert asked.startswith("8 CPUs, ")
    said = "requests more than the nodes of its partition have or allow"
    assert f"{said}: {asked}; see the profile, and sinfo for the nodes (PartitionConfig)" in told
    assert f"report: waits ({said}: {sent[1][0].asks}; see" in told
    depends = queue.Queued("PENDING", "", "", "Dependency")
    monkeypatch.setattr(queue, "jobs", lambda names: dict.fromkeys(waiting(), depends) if names else {})
    monkeypatch.setattr(overview, "SECONDS_BETWEEN", -1)  # an error, which ends the watch
    assert main(["status", "--watch", "--results", str(tmp_path / "results")]) == 1
    assert "report: waits (for the jobs that make its cells).\n\n1 queued\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("PartitionNodeLimit", "requests more than the nodes of its partition have or allow: 8 CPUs;"),
        ("PartitionTimeLimit", "requests more hours than its partition allows: 8 CPUs; lower hours"),
        ("ReqNodeNotAvail, UnavailableNodes:n1", "are down, drained or reserved"),
        ("QOSMaxCpuPerUserLimit", "a limit of its account or QOS is reached: 8 CPUs;"),
        ("AssocGrpGRES", "a limit of its account or QOS is reached: 8 CPUs;"),
        ("QOSNotAllowed", "may not be used there"),
        ("launch failed requeued held", "is held"),
        ("DependencyNeverSatisfied", "cancel it and submit again"),
    ],
)
def test_reasons_in_words_end_with_that_of_slurm(reason, said):
    told = reasons.meaning(reason, "8 CPUs")
    assert said in told
    assert told.endswith(f" ({reason})")


def test_common_reasons_stay_words_of_slurm():
    assert [reasons.meaning(reason) for reason in ("Priority", "Resources", "Dependency")] == [
        "Priority", "Resources", "Dependency",
    ]  # fmt: skip


OWN = """
import sys
sys.path.insert(0, {tests!r})
import small_table as small

mine = small.table(name="mine")
"""


@needs_shared
def test_what_collects_a_table_of_a_file_on_another_model_reports_it_and_status_says_what_is_lacking(
    tmp_path, monkeypatch, capsys
):
    """The command runs in this process instead of one of its own."""
    ended = lambda words, check: subprocess.CompletedProcess(words, analysis(words[3:]))  # noqa: E731
    monkeypatch.setattr("analysis.claims.statements.frame", lambda *_, **__: {}["claims"])
    monkeypatch.setattr("experiments.cli.ending.forget", lambda: None)
    monkeypatch.setattr(collect, "subprocess", SimpleNamespace(run=ended))
    (file := tmp_path / "mine.py").write_text(OWN.format(tests=str(Path(__file__).parent)))
    root = tmp_path / "my results"
    root.mkdir()
    words = ["submit", str(file), "--model", "llama-7b", "--executor", "debug", "--only", "Dense", "--collect"]
    monkeypatch.setattr(launch, "missing", lambda *_, **__: launch.Todo([], {}))  # as after its job
    (run, *_) = papers.runs(small.table(name="mine"), "llama-7b")
    recorded(root, run, "mine")
    assert main([*words, "--results", str(root)]) == 0
    page = (root / "report.html").read_text()
    assert "A tiny table: llama-7b" in page
    assert f"python -m experiments run {file} --model llama-7b" in page
    capsys.readouterr()
    main(["status", str(file), "--results", str(root)])
    assert (
        "Tables, figures, claims and report: written, except claims (claims: KeyError: claims"
        in capsys.readouterr().out
    )
    (root / "runs/mine").rename(root / "gone")
    assert main([*words, "--results", str(root)]) == 0
    capsys.readouterr()
    main(["status", "--results", str(root)])
    told = capsys.readouterr().out
    said = "written, except table of mine, figures of mine, claims and report (report: No record of any table under"
    assert said in told
    assert f"`python -m slurm logs collect --results '{root}'` shows the whole log" in told
