"""What is sent to a cluster, and what is said where it cannot be; without one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small_table as small

import pruners
from experiments import callbacks, cells, cli, papers
from experiments.cells import Cell
from experiments.spec import Perplexity, Run, Windows
from experiments.store import checksummed_json, records
from experiments.store.described import digest
from slurm import estimate, jobs, launch, ledger, profile, queue, state
from slurm.__main__ import main
from slurm.profile import Profile
from slurm.work import Work

GPU = Profile(gres="gpu:1", gpu_memory_gb=80, teraflops=60, cpus=8, hours=24, python="python")
PPL = Perplexity("wikitext2/test", 2048)
WINDOWS = Windows("c4/train", 128, 2048)
METHODS = (None, pruners.Wanda(sparsity=0.5), pruners.GBLM(sparsity=0.5), pruners.GBLM(pattern="2:4"))


def found(model: str = "llama-7b", methods=METHODS, dtype: str = "float16") -> list[Cell]:
    runs = [Run(model, method, WINDOWS, (PPL,), dtype) for method in methods]
    return [Cell(run, digest(run.spec()), f"{model} {cells.method_name(run)} {i}") for i, run in enumerate(runs)]


def with_changes(**changes) -> Profile:
    return GPU.model_copy(update=changes)


def work(root: Path, **changes) -> Work:
    return Work({"table": "flap.perplexity", "results": str(root), "data_dir": None, **changes})


@pytest.fixture
def tiny(monkeypatch, tmp_path) -> list[str]:
    """Words that choose a table on a small real model and a results folder."""
    if not small.MODEL.is_dir():
        pytest.skip(f"{small.MODEL} is absent")
    monkeypatch.setitem(papers.TABLES, "tiny", small.table())
    data = small.data(tmp_path / "data")
    return ["tiny", "--results", str(tmp_path / "results"), "--data-dir", str(data)]


def status(tiny: list[str]) -> int:
    return main(["status", *tiny[:3]])


def test_cells_of_one_model_fill_a_job_and_shared_statistics_are_never_parted():
    (array,) = jobs.arrays(found(), with_changes(packed_hours=24))
    assert [len(job.cells) for job in array.jobs] == [4]
    (array,) = jobs.arrays(found(), with_changes(packed_hours=0))
    assert [[cells.method_name(cell.run) for cell in job.cells] for job in array.jobs] == [
        ["dense"], ["wanda"], ["gblm", "gblm"],
    ]  # fmt: skip


def test_every_model_is_an_array_of_its_own_that_asks_for_what_it_needs():
    seven, thirteen = jobs.arrays([*found("llama-7b"), *found("llama-13b")], with_changes(gpu_memory_gb=140))
    assert (seven.request.gpus, thirteen.request.gpus) == (1, 1)
    assert 1.5 < thirteen.request.memory_gb / seven.request.memory_gb < 2
    assert 1.5 < thirteen.request.gpu_memory_gb / seven.request.gpu_memory_gb < 2
    assert thirteen.request.needed_hours > 1.5 * seven.request.needed_hours


def test_shared_statistics_are_counted_once():
    both, (first, second) = found(methods=METHODS[2:]), found(methods=METHODS[2:])
    apart = estimate.seconds([first], GPU) + estimate.seconds([second], GPU)
    saved = 2 * 6_738_415_616 * 3 * 128 * 2048 / 60e12
    assert estimate.seconds(both, GPU) == pytest.approx(apart - saved)


def test_shared_steps_of_retraining_are_counted_once():
    runs = [cell.run for cell in cells.cells(papers.find("llm_pruner.tuning_steps").runs()) if cell.run.recovery]
    stopped = cells.cells(runs)
    statistics, trained = 6 * 3 * 10 * 64, 3 * 64 * 256 * sum(range(200, 1400, 200))
    apart = sum(estimate.seconds([cell], GPU) for cell in stopped)
    assert estimate.seconds(stopped, GPU) == pytest.approx(apart - 2 * 6_738_415_616 * (statistics + trained) / 60e12)


def test_a_job_that_takes_longer_than_allowed_asks_for_what_is_allowed():
    request = estimate.request(found("llama-65b"), with_changes(hours=1, gpu_memory_gb=1000))
    assert (request.hours, request.minutes) == (1, 60)
    assert request.needed_hours > 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gpu_memory_gb": 4}, "needs about .* GB on one GPU, but this profile's GPUs have 4"),
        ({"gpu_memory_gb": 24, "memory_gb": 4}, "allows 4"),
    ],
)
def test_a_model_that_is_too_large_is_refused_before_it_queues(changes, said):
    with pytest.raises(estimate.TooLargeError, match=said):
        jobs.arrays(found("llama-65b"), with_changes(**changes))


def test_a_model_larger_than_the_card_has_its_weights_in_memory_or_on_the_disk():
    request = estimate.request(found("llama-65b"), with_changes(gpu_memory_gb=80, memory_gb=480))
    assert 8 < request.gpu_memory_gb < 24
    assert 130 < request.memory_gb < 480
    poor = estimate.request(found("llama-65b"), with_changes(gpu_memory_gb=80, memory_gb=64))
    assert poor.gpu_memory_gb == request.gpu_memory_gb
    assert poor.memory_gb < 24
    near = estimate.request(found("llama-65b"), with_changes(gpu_memory_gb=1000, memory_gb=480))
    assert near.needed_hours < request.needed_hours < poor.needed_hours  # each sweep reads the weights again


def test_the_batch_script_is_the_stored_one(tmp_path):
    asked = with_changes(
        partition="gpu", account="lab", qos="high", constraint="a100", parallel=2, packed_hours=0, warning_seconds=90,
        setup=("module load cuda",), environment={"HF_HOME": "/scratch/hf cache"}, options={"mail-type": "FAIL"},
    )  # fmt: skip
    (array,) = jobs.arrays(found(), asked)
    script = launch.script(array, asked, "flap-1", Path("/results/flap-1"))
    assert script == (Path(__file__).parent / "batch_script.sh").read_text()


def test_no_secret_of_the_environment_is_written_anywhere(tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_verysecret")
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    assert main(["submit", *tiny, "--dry-run"]) == 0
    assert main(["submit", *tiny, "--executor", "local", "--method", "dense"]) == 0
    told = capsys.readouterr()
    texts = [told.out, told.err, *(p.read_text(errors="replace") for p in tmp_path.rglob("*") if p.is_file())]
    assert not any("verysecret" in text for text in texts)


def test_the_payload_is_plain_values(tmp_path):
    payload = vars(replace(work(tmp_path), cells=("ab",), events="e.jsonl"))
    assert json.loads(json.dumps(payload)) == {**payload, "cells": ["ab"]}


def test_the_same_jobs_run_here_as_subprocesses_and_in_the_process(tiny, tmp_path, capsys):
    assert main(["submit", *tiny, "--executor", "debug", "--method", "dense"]) == 0
    assert main(["submit", *tiny, "--executor", "local", "--method", "dense", "magnitude", "--only", "dense"]) == 0
    assert "cells submitted: 0" in capsys.readouterr().err
    assert status(tiny) == 0
    assert "1 done" in capsys.readouterr().out


def test_a_job_that_a_killed_launcher_never_completed_is_forgotten_and_sent_again(tiny, tmp_path, monkeypatch):
    monkeypatch.setitem(launch.SENDERS, "debug", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["submit", *tiny, "--executor", "debug", "--method", "dense"]) == 130
    (broken,) = ledger.load(tmp_path / "results", "tiny")
    assert not broken.complete
    monkeypatch.setitem(launch.SENDERS, "debug", lambda *_: ["debug"])
    assert main(["submit", *tiny, "--executor", "debug", "--method", "dense"]) == 0
    (entry,) = ledger.load(tmp_path / "results", "tiny")
    assert entry.complete
    assert entry.name != broken.name


def test_a_failed_cell_shows_its_last_lines_and_is_retried_alone(tiny, tmp_path, monkeypatch, capsys):
    methods = (None, pruners.Wanda(pattern="3:7"))
    monkeypatch.setitem(papers.TABLES, "tiny", small.table(methods))
    main(["submit", *tiny, "--executor", "debug"])
    capsys.readouterr()
    assert status(tiny) == 1
    told = capsys.readouterr().out
    assert "1 done, 1 failed" in told
    assert "multiple of 7" in told
    assert main(["retry", *tiny, "--failed", "--executor", "debug"]) == 0
    assert capsys.readouterr().out == "debug: Wanda 3:7\n"


def test_status_calls_cells_and_models_as_other_commands_do(tmp_path, capsys):
    assert main(["status", "flap.perplexity", "--results", str(tmp_path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["FLAP", "(formula)", "20", "%", "6241048aab", "llama-30b", "missing"] in lines


def test_the_overview_says_how_many_tables_it_leaves_out(tiny, tmp_path, capsys):
    main(["submit", *tiny, "--executor", "debug", "--method", "dense"])
    capsys.readouterr()
    main(["status", *tiny[1:3]])
    assert f"{len(papers.TABLES) - 1} other tables have no record, no failure and no job." in capsys.readouterr().out
    assert status(tiny) == 0
    assert "other tables" not in capsys.readouterr().out


def test_what_was_sent_on_other_models_is_told_apart(tiny, tmp_path, monkeypatch, capsys):
    name = shutil.copytree(small.MODEL, tmp_path / "another").name
    for model in (str(small.MODEL), str(tmp_path / name)):
        main(["submit", *tiny, "--executor", "debug", "--method", "dense", "--model", model])
    capsys.readouterr()
    assert status(tiny) == 0
    told = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert sorted(line[2] for line in told if line[:1] == ["Dense"]) == [name, small.MODEL.name]


def test_a_plan_of_months_is_warned_of_with_the_profiles_that_have_accelerators(tmp_path, capsys):
    words = ["submit", "flap.perplexity", "--dry-run", "--results", str(tmp_path)]
    assert main(words) == 0
    (warning,) = capsys.readouterr().err.splitlines()
    assert "10 of 60 cells would take more than 30 days each with the profile cpu, up to 703;" in warning
    assert "gpu_partition (80 GB); these cells need up to 142 GB per GPU." in warning
    assert main([*words, "--method", "dense", "--model", "llama-7b"]) == 0
    assert capsys.readouterr().err == ""


def test_logs_finds_a_cell_by_id_or_label(tiny, tmp_path, capsys):
    main(["submit", *tiny, "--executor", "debug", "--method", "dense"])
    (record,) = records.load(tmp_path / "results", "tiny").values()
    for name in (record.id, "dense"):
        assert main(["logs", name, *tiny[1:3]]) == 0
    assert main(["logs", "dance", *tiny[1:3]]) == 2
    assert "status TABLE" in capsys.readouterr().err


def test_a_job_gives_up_after_it_went_back_too_often_without_a_finished_cell(tmp_path):
    job = replace(work(tmp_path), cells=("ab",), events=str(tmp_path / "e.jsonl"), requeues=1)
    job = job.checkpoint().function
    assert job.stalled == 1
    with pytest.raises(SystemExit, match="2 times in a row"):
        job.checkpoint()
    callbacks.Events(tmp_path / "e.jsonl").write("finished")
    assert job.checkpoint().function.stalled == 0
    assert [event["event"] for event in callbacks.read(tmp_path / "e.jsonl")] == [
        "job requeued", "job gave up", "finished", "job requeued",
    ]  # fmt: skip


def test_the_end_that_comes_with_the_warning_does_not_stop_the_requeue(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    job = replace(work(tmp_path), cells=("ab",), events=str(tmp_path / "e.jsonl"), requeues=1)
    before = signal.getsignal(signal.SIGTERM)
    try:
        job.checkpoint()
        told = subprocess.run(["sh", "-c", "kill -TERM $$; echo on"], capture_output=True, text=True, check=True)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert told.stdout == "on\n"


def test_records_of_earlier_work_are_no_progress_of_a_job(tmp_path):
    job = replace(work(tmp_path), cells=("ab",), events=str(tmp_path / "e.jsonl"), requeues=1)
    (tmp_path / "runs/flap.perplexity").mkdir(parents=True)
    (tmp_path / "runs/flap.perplexity/ab.json").touch()
    assert job.checkpoint().function.stalled == 1


def test_cells_of_other_texts_and_on_demand_of_other_code_are_sent_again(tiny, tmp_path, capsys):
    def sent(*words: str) -> int:
        assert main(["submit", *tiny, "--method", "dense", "--executor", "debug", *words]) == 0
        return int(capsys.readouterr().err.rpartition("cells submitted: ")[2].partition(",")[0])

    assert [sent(), sent(), sent("--again")] == [1, 0, 0]
    (record,) = records.load(tmp_path / "results", "tiny").values()
    records.write(record.model_copy(update={"code": {}}), tmp_path / "results")
    assert [sent(), sent("--again"), sent("--again")] == [0, 1, 0]
    ptb = tmp_path / "data/ptb/ptb_test.jsonl"
    ptb.write_text("".join(reversed(ptb.read_text().splitlines(keepends=True))))
    assert [sent(), sent()] == [1, 0]


def test_a_job_that_makes_a_record_again_is_asked_for_until_it_has(tiny, tmp_path, monkeypatch, capsys):
    """Its cell has a record all the while, which is no reason to send a second job."""
    assert main(["submit", *tiny, "--method", "dense", "--executor", "debug"]) == 0
    (record,) = records.load(tmp_path / "results", "tiny").values()
    earlier = record.made_by.model_copy(update={"at": "2020-01-01T00:00:00+00:00"})
    records.write(record.model_copy(update={"code": {}, "made_by": earlier}), tmp_path / "results")
    monkeypatch.setattr(queue, "check", lambda: None)
    monkeypatch.setitem(launch.SENDERS, "slurm", lambda entry, works, *_: [str(n) for n, _ in enumerate(works)])
    pending = queue.Queued("PENDING", "", "", "Priority")
    monkeypatch.setattr(queue, "jobs", lambda names: {"0": pending} if names else {})
    words = ["submit", *tiny, "--method", "dense", "--again"]
    assert main(words) == main(words) == 0
    assert [line for line in capsys.readouterr().err.splitlines() if "cells submitted" in line][-1].startswith(
        "tiny: cells submitted: 0, done or queued already: 1"
    )
    assert status(tiny) == 0
    assert "1 queued" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--memory-gb", "8"], ["--dry-run"]])
@pytest.mark.parametrize("executor", ["local", "debug"])
def test_what_only_a_cluster_heeds_is_refused_elsewhere(options, executor, tmp_path, capsys):
    words = ["submit", "flap.perplexity", "--results", str(tmp_path), "--executor", executor, *options]
    assert main(words) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{options[0]} has no effect without a cluster")
    assert f"--executor {executor}" in said


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("slurmstepd: error: Exceeded job memory limit", "--memory-gb 8"),
        ("slurmstepd: error: Detected 1 oom-kill event(s) in step 7.0", "--memory-gb 8"),
        ("*** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***", "warning_seconds"),
        ("*** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO JOB REQUEUE ***", "ended early"),
        ("*** STEP 7.0 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***", "Cancelled"),
        ("srun: error: n1: task 0: Killed", "Killed from outside"),
        ("IndexError: list index out of range", "ended early"),
    ],
)
def test_why_a_job_died_is_one_sentence(tmp_path, line, said):
    entry = ledger.Entry("t-1", "t", "slurm", str(tmp_path), (ledger.Sent("7", {"ab": "Dense"}),), 4, "now", True)
    job = state.Job(entry, 0, None)
    job.logs[1].parent.mkdir(parents=True)
    job.logs[1].write_text(f"[1/2] Dense in 4 s\n{line}\n")
    assert said in job.death
    assert "\n" not in job.death


@pytest.mark.parametrize(
    ("words", "said", "status"),
    [
        (["submit", "flap.perplexty"], "Unknown table 'flap.perplexty'", 2),
        (
            ["submit", "embedded.demo", "--profile", "gpu_partion"],
            "Unknown profile 'gpu_partion'. Did you mean gpu_partition?",
            2,
        ),
        (["submit", "embedded.demo", "--method", "wnda"], "Did you mean wanda", 2),
        (["status", "flap.perplexty"], "Unknown table 'flap.perplexty'", 2),
        (["cancel", "flap.perplexty"], "Unknown table 'flap.perplexty'", 2),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(tmp_path, capsys, words, said, status):
    assert main([*words, "--results", str(tmp_path)]) == status
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


def test_without_slurm_the_way_out_is_named(tiny, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["submit", *tiny]) == 1
    assert "sbatch is not on the path" in capsys.readouterr().err


def test_what_sbatch_complains_of_is_passed_on_and_nothing_counts_as_sent(tiny, tmp_path, monkeypatch, capsys):
    for name in ("sbatch", "srun", "squeue", "scancel"):
        (path := tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        path.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2\nexit 1\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    assert main(["submit", *tiny]) == 1
    assert capsys.readouterr().err == "sbatch refused: sbatch: error: invalid partition specified: gpu\n"
    assert ledger.load(tmp_path / "results", "tiny") == []


def test_a_queue_that_cannot_be_asked_is_never_taken_for_an_empty_one(monkeypatch, tmp_path):
    (tmp_path / "squeue").write_text("#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact slurm' >&2\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setattr(queue, "check", lambda: None)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(queue.SlurmError, match="Unable to contact slurm"):
        queue.jobs(["tiny-1"])


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("slurm_load_jobs error: Unable to contact slurm controller (connect failure)", "SLURM_CONF must name the"),
        ("sbatch: fatal: Could not establish a configuration source", "Set SLURM_CONF to the slurm.conf"),
        ("sbatch: error: Protocol authentication error: munge", "Is munged running here"),
    ],
)
def test_a_cluster_that_cannot_be_reached_says_what_to_do(said, remedy):
    told = str(queue.refusal("sbatch", said))
    assert told.startswith(f"sbatch refused: {said}. ")
    assert remedy in told


def interrupted(*_: object) -> int:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["status", "--watch"], "Stopped. The jobs are as they were."),
        (["cancel"], "Stopped. Some jobs may be cancelled by now; the same command cancels the rest."),
        (["submit"], "Stopped. Submitted jobs stay in the queue; the same command submits the rest."),
        (["submit", "--dry-run"], "Stopped. Nothing was submitted."),
        (["submit", "--executor", "local"], "Stopped. Finished cells are kept; the same command runs the rest."),
    ],
)
def test_a_command_that_is_interrupted_says_what_is_so_then(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cli, "declared", interrupted)
    monkeypatch.setattr(state, "jobs", interrupted)
    assert main([words[0], "embedded.demo", *words[1:], "--results", str(tmp_path)]) == 130
    assert capsys.readouterr().err.strip() == said


def test_a_damaged_entry_is_reported_and_left_out(tiny, tmp_path, caplog):
    main(["submit", *tiny, "--executor", "debug", "--method", "dense"])
    (path,) = (tmp_path / "results").rglob("entry.json")
    small.edit(path, '"debug"', '"slurm"')
    assert ledger.load(tmp_path / "results", "tiny") == []
    assert "checksum" in caplog.text


def test_a_short_job_is_not_warned_before_it_begins():
    short = found("opt-125m")
    assert estimate.request(short, with_changes(warning_seconds=120)).minutes == 60 * estimate.SHORTEST_HOURS
    assert estimate.request(short, with_changes(warning_seconds=3600)).minutes == 120


def test_what_is_no_entry_and_no_event_stops_no_command(tiny, tmp_path, caplog):
    main(["submit", *tiny, "--executor", "debug", "--method", "dense"])
    root = tmp_path / "results"
    (entry,) = ledger.load(root)
    events = entry.events(0)
    for name, made in {
        "folder": lambda path: path.mkdir(parents=True),
        "bytes": lambda path: (path.parent.mkdir(), path.write_bytes(b"\xff\xfe")),
        "pipe": lambda path: (path.parent.mkdir(), os.mkfifo(path)),
        "other": lambda path: (path.parent.mkdir(), path.write_text(checksummed_json.dumps({"jobs": 5}))),
    }.items():
        made(entry.folder.with_name(name) / "entry.json")
    events.unlink()
    events.mkdir()
    for words in (["status", *tiny], ["submit", *tiny, "--executor", "debug", "--method", "dense"]):
        caplog.clear()
        assert main(words) == 0
        assert len({one.getMessage() for one in caplog.records if one.name == "slurm.ledger"}) == 4
    assert ledger.load(root) == [entry]


def test_a_lock_that_is_a_folder_is_one_sentence(tiny, tmp_path, capsys):
    lock = ledger.place(tmp_path / "results") / "launching.lock"
    lock.mkdir(parents=True)
    assert main(["submit", *tiny, "--executor", "debug", "--method", "dense"]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"Cannot write {lock}: is a directory; ")


def test_what_a_job_needs_first_loads_without_torch():
    code = "import sys, slurm.work; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("collect", [[], ["--collect"]])
def test_a_dry_run_shows_the_last_job_and_times_as_they_are_asked_for(collect, tiny, capsys):
    assert main(["submit", *tiny, "--dry-run", *collect]) == 0
    told = capsys.readouterr().out
    assert "GB of memory and 15 min." in told
    assert "#SBATCH --time=15\n" in told
    assert "cpu: 5 cells in 1 job, about 1 s together\n" in told
    assert ("writes tables, figures, claims and report" in told) == bool(collect)
    assert told.count("#SBATCH --job-name=collect\n") == told.count("--dependency=afterany") == len(collect)
    assert told.endswith("Nothing was submitted: 5 cells would be, 0 left out.\n")


def test_cluster_examples_need_no_cluster_to_be_shown(tiny, capsys):
    for name in profile.names():
        assert main(["submit", *tiny, "--profile", name, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("#SBATCH --signal=USR2@") == 3


def test_a_job_on_this_machine_is_alive_as_long_as_its_process_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sent = ledger.Sent("", {"ab": "Dense"})
    entry = ledger.Entry("t-1", "t", "local", str(tmp_path), (sent,), 4, "now", True)
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", str(entry.folder)])
    ledger.write(entry.with_ids([str(process.pid)]))
    (job,) = state.jobs(tmp_path, "t")
    assert job.alive
    assert state.cells(tmp_path, "t", {"ab": "Dense"})[0].state == "queued"
    assert state.cancel([job]) == [str(process.pid)]
    process.wait()
    assert not state.jobs(tmp_path, "t")[0].alive
    ledger.write(entry.with_ids([str(os.getpid())]))  # that number is somebody else's now
    assert not state.jobs(tmp_path, "t")[0].alive
