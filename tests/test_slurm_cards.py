"""Jobs on several cards of a node: how many they ask for, and why they end."""

from __future__ import annotations

import re
import signal
from dataclasses import replace

import pytest
from test_slurm import GPU, found, with_changes
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import pruners
from experiments import callbacks, cards, cells, papers
from experiments.__main__ import main as experiments
from experiments.placement import several
from experiments.recovery import Retraining
from experiments.spec import Perplexity, Run, Windows
from pruners.retrain import MaskLoRA, Reconstruction, Trainable
from slurm import estimate, jobs, launch, launched, ledger, overview, profile, state
from slurm.__main__ import main
from slurm.profile import ProfileError

NODE = with_changes(cards=8)
TEXT = Windows("c4/train", 128, 2048)
ALL = Retraining(Trainable.full(), TEXT, steps=1000, learning_rate=1e-5, batch_size=8)


def trained(model: str, recovery=ALL) -> list[cells.Cell]:
    return cells.cells([Run(model, pruners.Magnitude(sparsity=0.5), None, (), "float16", recovery=recovery)])


@pytest.mark.parametrize(
    ("model", "card_gb", "cards"),
    [("opt-2.7b", 80, 1), ("opt-6.7b", 80, 2), ("opt-13b", 80, 4), ("opt-2.7b", 24, 4), ("opt-1.3b", 24, 2)],
)
def test_training_all_weights_takes_the_fewest_cards_that_hold_it(model, card_gb, cards):
    (array,) = jobs.arrays(trained(model), with_changes(cards=8, gpu_memory_gb=card_gb, hours=1000, memory_gb=480))
    assert array.request.cards == array.request.gpus == cards
    assert array.request.gpu_memory_gb <= card_gb
    assert array.jobs[0].cards == cards


def test_a_node_of_fewer_cards_refuses_what_takes_more():
    with pytest.raises(estimate.TooLargeError, match=r"needs about .* GB on each of 2 GPUs"):
        jobs.arrays(trained("opt-13b"), with_changes(cards=2))
    found, left = jobs.assigned(trained("opt-13b"), {"two": with_changes(cards=2), "four": with_changes(cards=4)})
    assert (list(found), left) == (["four"], {})


def test_of_two_profiles_the_cell_goes_where_less_memory_holds_it():
    """All weights of OPT-2.7B fit one card of 80 GB, or four of 24."""
    small = with_changes(cards=8, gpu_memory_gb=24)
    assert list(jobs.assigned(trained("opt-2.7b"), {"24": small, "80": NODE})[0]) == ["80"]
    assert list(jobs.assigned(trained("opt-1.3b"), {"24": small, "80": NODE})[0]) == ["24"]


def test_more_cards_are_asked_for_where_the_time_limit_is_near_and_they_help():
    (long,) = trained("opt-2.7b", replace(ALL, steps=20_000))
    alone = estimate.needed_hours([long], GPU)
    hours = {cards: estimate.needed_hours([long], GPU, cards) for cards in (1, 2, 4)}
    assert hours[4] < 0.6 * hours[2] < 0.4 * hours[1] == 0.4 * alone
    for limit, count in ((alone + 1, 1), (hours[2] + 0.1, 2), (hours[4] + 0.1, 4), (0.01, 8)):
        assert estimate.cards([long], with_changes(cards=8, hours=limit)) == count
    assert estimate.cards([long], with_changes(cards=4, hours=0.01)) == 4
    assert estimate.cards([long], with_changes(cards=8, hours=0.01, memory_gb=30)) == 2  # each has weights in memory


def test_what_gains_nothing_stays_on_one_card():
    rebuilt = Reconstruction(Trainable(adapters=MaskLoRA(rank=4)), learning_rate=1e-3, steps=100_000)
    odd = replace(ALL, steps=20_000, batch_size=3)
    speed = cells.cells([run for run in papers.find("flap.speed").runs() if run.method is None][:1])
    for some in (trained("opt-2.7b", rebuilt), trained("opt-2.7b", odd), speed):
        assert several.counts(some[0].run, 8) == [1]
        assert estimate.cards(some, with_changes(cards=8, hours=0.01)) == 1


def test_cells_of_one_job_have_one_number_of_cards():
    both = trained("opt-6.7b") + trained("opt-6.7b", replace(ALL, trainable=Trainable(norms=True)))
    arrays = jobs.arrays(both, with_changes(cards=8, packed_hours=1000, hours=1000))
    assert sorted(array.request.cards for array in arrays) == [1, 2]
    assert all(job.cards == array.request.cards for array in arrays for job in array.jobs)


def test_every_process_has_its_cpus_and_weights():
    one, two = (estimate.request(found(), NODE, cards=cards) for cards in (1, 2))
    assert two.memory_gb == pytest.approx(2 * one.memory_gb, abs=1)
    (array,) = jobs.arrays(trained("opt-13b"), with_changes(cards=8, hours=1000, gres="gpu:a100:1,scratch:9"))
    script = launch.script(array, with_changes(gres="gpu:a100:1,scratch:9", cards=8), "t", launch.Path("/t"))
    assert "#SBATCH --gres=gpu:a100:4,scratch:9\n" in script
    assert "#SBATCH --cpus-per-task=32\n" in script
    assert "--cpus-per-task=32 python" in script


@pytest.mark.parametrize(
    ("gres", "four"),
    [("gpu:1", "gpu:4"), ("gpu", "gpu:4"), ("gpu:a100:1", "gpu:a100:4"), ("gpu:a100", "gpu:a100:4"),
     ("lscratch:1,gpu:h100:1", "lscratch:1,gpu:h100:4")],
)  # fmt: skip
def test_the_name_of_one_card_becomes_that_of_several(gres, four):
    asked = with_changes(gres=gres, cards=8)
    assert (asked.gres_of(1), asked.gres_of(4)) == (gres, four)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("cards = 0", "cards: Input should be greater than or equal to 1"),
        ("cards = -2", "cards: Input should be greater than or equal to 1"),
        ("cards = 2.5", "cards: Input should be a valid integer"),
        ("cards = true", "cards: Input should be a valid integer"),
        ('cards = "8"', "cards: Input should be a valid integer"),
        ('cards = 8\ngres = "gpu:a100:2"\ngpu_memory_gb = 80', "gres: 'gpu:a100:2' does not name one GPU, as"),
        ('cards = 8\ngres = "tpu:1"\ngpu_memory_gb = 80', "gres: 'tpu:1' does not name one GPU, as"),
    ],
)
def test_no_other_number_of_cards(tmp_path, lines, said):
    (path := tmp_path / "p.toml").write_text(f"teraflops = 1\n{lines}\n")
    with pytest.raises(ProfileError) as refusal:
        profile.load(str(path))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_dry_run_says_the_cards_of_its_jobs(tmp_path, capsys):
    (path := tmp_path / "p.toml").write_text('teraflops = 60\ngres = "gpu:1"\ngpu_memory_gb = 80\ncards = 4\n')
    words = ["submit", "perp.cost", "--dry-run", "--profile", str(path), "--results", str(tmp_path)]
    assert main([*words, "--only", "Magnitude + all weights 50 %"]) == 0
    told, left = capsys.readouterr()
    needed = re.search(r"Each requests 4 GPUs, each with ([\d.]+) GB in use,", told)
    assert needed
    assert 16 * 13 / 4 < float(needed[1]) < 80  # weights, gradients and moments of OPT-13B, shared, and room to work
    assert "3 cells in 3 jobs (1 on 1, 1 on 2, 1 on 4 cards), about" in told
    assert "opt-30b needs about" in left
    assert "GB on each of 4 GPUs" in left


def test_a_card_that_is_named_is_the_only_one(tmp_path, capsys):
    (path := tmp_path / "p.toml").write_text('teraflops = 60\ngres = "gpu:1"\ngpu_memory_gb = 80\ncards = 4\n')
    words = [
        "submit",
        "perp.cost",
        "--dry-run",
        "--profile",
        str(path),
        "--results",
        str(tmp_path),
        "--device",
        "cuda:0",
    ]
    assert main([*words, "--only", "Magnitude + all weights 50 %"]) == 0
    assert f"{path}: 1 cell in 1 job, about" in capsys.readouterr().out


def test_show_says_the_fewest_cards(tmp_path, capsys):
    words = ["show", "perp.cost", "--results", str(tmp_path), "--only", "Magnitude + all weights 50 %"]
    assert experiments([*words, "--card", "80", "--cards", "8"]) == 0
    told = capsys.readouterr().out
    assert [line.split()[9:11] for line in told.splitlines() if "opt-" in line and "missing" in line] == [
        ["1", "device"], ["2", "device"], ["4", "device"], ["8", "too"],
    ]  # fmt: skip
    assert (
        "1 cell needs more than 8 cards of 80 GB hold, as training all weights needs all weights on the device" in told
    )


def test_status_says_the_cards_of_a_job(tmp_path):
    entry = ledger.Entry("t-1", "t", "slurm", str(tmp_path), (ledger.Sent("7", {"ab": "Dense"}),), 4, "now", cards=4)
    ledger.write(entry)
    assert ledger.load(tmp_path, "t") == [entry]
    (cell,) = state.cells(tmp_path, "t", {"ab": "Dense"}, [state.Job(entry, 0, None)])
    assert cell.cards == 4
    assert overview.text([overview.Standing("t", [cell], {"ab": "m"})], []).splitlines()[2].split()[3:6] == [
        "7", "(4", "cards)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("statuses", "events", "said"),
    [
        ({0: 1, 1: -signal.SIGKILL}, [(0, True, "It has ended.")], "Process 1 of 2 was killed (SIGKILL), usually"),
        ({0: -signal.SIGTERM, 1: -signal.SIGSEGV}, [], "Process 1 of 2 was killed (SIGSEGV); submit again;"),
        (
            {0: 1, 1: 1},
            [(0, True, "It is lost."), (1, False, "The disk is full.")],
            "Process 1 of 2: The disk is full.",
        ),
        ({0: 1}, [(0, True, "It does not answer.")], "Process 0 of 2: It does not answer."),
        ({1: 3}, [], "One of 2 processes ended early (exit status 3 of process 1); see `logs` for its output."),
    ],
)
def test_why_a_launch_failed_is_one_sentence(tmp_path, statuses, events, said):
    log = callbacks.Events(tmp_path / "0.events.jsonl")
    log.write("rank failed", rank=0, lost=False, message="Of an earlier life.")
    before = len(callbacks.read(log.path))
    for rank, lost, message in events:
        log.write("rank failed", rank=rank, lost=lost, message=message)
    assert launched._why(2, statuses, log.path, before).startswith(said)


def test_processes_that_slurm_stopped_leave_it_to_slurm_to_say_why(tmp_path, monkeypatch):
    def stopped(*_: object) -> None:
        failures = {rank: ProcessFailure(rank, 0, -signal.SIGTERM, "") for rank in (0, 1)}
        raise ChildFailedError("t", failures)

    log = callbacks.Events(tmp_path / "0.events.jsonl")
    monkeypatch.setattr(cards, "start", stopped)
    with pytest.raises(launched.ProcessFailedError, match="All processes received a signal to stop"):
        launched.run(2, {"cells": {}}, log, "")
    assert callbacks.read(log.path) == []


def test_estimates_go_by_where_the_weights_are_asked_to_be():
    (dense,) = cells.cells([Run("llama-65b", None, None, (Perplexity("wikitext2/test", 2048),), "float16")])
    profile = with_changes(cards=1, gpu_memory_gb=80, hours=1000, memory_gb=480)
    asked = {home: estimate.request([dense], profile.with_weights(home)) for home in ("auto", "host", "disk")}
    assert all(one.gpu_memory_gb < 12 for one in asked.values())
    assert asked["disk"].memory_gb < 20 < 130 < asked["host"].memory_gb
    assert asked["disk"].needed_hours > asked["host"].needed_hours
    with pytest.raises(estimate.TooLargeError, match=r"have 80 GB; .* or leave out --weights device"):
        estimate.request([dense], profile.with_weights("device"))
    with pytest.raises(estimate.TooLargeError, match=r"all weights of opt-1\.3b on .*; leave out --weights host"):
        estimate.request(trained("opt-1.3b"), profile.with_weights("host"))
