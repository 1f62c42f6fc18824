"""On a real Slurm of one machine: whatever happens to the jobs, the records are those of an undisturbed run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_driver
import small_table as small

from experiments import batch, callbacks, cells, papers
from experiments.__main__ import main as experiments
from experiments.settings import Settings
from experiments.store import records
from slurm import ledger, queue, state
from slurm.__main__ import main

TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "slurm" / "one_machine_cluster.sh"
PATIENCE_SECONDS = 240


def reason_to_skip() -> str:
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    absent = [program for program in ("munged", "slurmctld", "slurmd") if not shutil.which(program, path=path)]
    if absent:
        return f"there is no {', '.join(absent)}; apt-get install slurm-wlm munge"
    if os.geteuid() != 0:
        return "slurmd needs root"
    return "" if small.MODEL.is_dir() else f"{small.MODEL} is absent"


pytestmark = pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip())


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Callable[[str], None]]:
    """Running; call it with a word for one_machine_cluster.sh."""
    folder = tmp_path_factory.mktemp("cluster")

    def do(what: str) -> None:
        subprocess.run([SCRIPT, what, folder], check=True, stdout=subprocess.DEVNULL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setitem(papers.TABLES, "tiny", small.table())
        patch.setitem(papers.TABLES, "retrained", small.retrained())
        do("start")
        try:
            yield do
        finally:
            do("stop")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small.data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data) -> dict[str, tuple]:
    root = tmp_path_factory.mktemp("undisturbed")
    small.run(root, data)
    return results(root)


def results(root: Path, table: str = "tiny") -> dict[str, tuple]:
    return {id: (r.spec, r.achieved, r.measures, r.data) for id, r in records.load(root, table).items()}


class Site:
    """One results folder and one profile; every life of a job ends at the next of `pauses`, e.g. "remove 9"."""

    def __init__(
        self, root: Path, data: Path, *pauses: str, greedy_gb: int = 0, table: str = "tiny", **profile
    ) -> None:
        self.table = table
        self.root, self.data, self.pauses = root / "results", data, root / "pauses"
        self.profile = root / "profile.toml"
        self.pauses.write_text("\n".join(pauses))
        python = f"{sys.executable} {TESTS / 'slurm_driver.py'}"
        asked = {"teraflops": 1.0, "cpus": 1, "packed_hours": 0, "parallel": 2, "python": python, **profile}
        environment = {slurm_driver.PAUSES: str(self.pauses), slurm_driver.GREEDY: str(greedy_gb)}
        lines = [f"{key} = {value!r}" for key, value in asked.items()]
        variables = [f"{key} = {value!r}" for key, value in environment.items()]
        self.profile.write_text("\n".join([*lines, "[environment]", *variables, ""]))

    def __call__(self, *words: str) -> int:
        sending = ("--profile", str(self.profile), "--data-dir", str(self.data), "--memory-gb", "2")
        return main([*words[:1], self.table, *words[1:], *(sending if words[0] in ("submit", "retry") else ()),
                     "--results", str(self.root)])  # fmt: skip

    @property
    def jobs(self) -> list[state.Job]:
        return self.of(self.table)

    def of(self, table: str) -> list[state.Job]:
        return state.jobs(self.root.resolve(), table)

    def wait(self, until: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not until():
            if time.monotonic() > deadline:
                main(["status", self.table, "--results", str(self.root)])
                raise TimeoutError(f"{what} did not come; jobs: {self.jobs}")
            time.sleep(0.3)

    def wait_for_the_end(self, table: str | None = None) -> None:
        self.wait(lambda: not any(job.alive for job in self.of(table or self.table)), "the end of the jobs")

    def wait_for_pause(self, left: int) -> None:
        """Until a job has come to a pause and so many pauses are left."""
        self.wait(lambda: len(self.pauses.read_text().split("\n")) - (not self.pauses.read_text()) == left, "a pause")

    @property
    def record(self) -> records.Record:
        (record,) = records.load(self.root, self.table).values()
        return record

    def kill(self) -> None:
        """The process of the last job, as the kernel does it, and wait for the end of the job."""
        os.kill(callbacks.read(self.jobs[-1].entry.events(0))[-1]["process"], signal.SIGKILL)
        self.wait_for_the_end()


def test_a_table_goes_as_an_array_and_twice_sent_is_sent_once(cluster, tmp_path, data, undisturbed, capsys):
    site = Site(tmp_path, data)
    assert (site("submit"), site("submit")) == (0, 0)
    (entry,) = ledger.load(site.root.resolve(), "tiny")
    assert [list(job.cells.values()) for job in entry.jobs] == [
        ["Dense"], ["Magnitude 50 %"], ["Wanda 50 %"], ["GBLM 50 %", "GBLM 2:4"],
    ]  # fmt: skip
    assert [job.id.split("_")[1] for job in entry.jobs] == ["0", "1", "2", "3"]
    assert "done or queued already: 5" in capsys.readouterr().err
    site.wait_for_the_end()
    assert results(site.root) == undisturbed
    assert site("status") == 0
    assert "5 done" in capsys.readouterr().out


def test_a_job_at_its_time_limit_goes_back_into_the_queue_and_on_from_its_block(cluster, tmp_path, data, undisturbed):
    site = Site(tmp_path, data, "remove 10", hours=0.01, warning_seconds=25)
    site("submit", "--method", "wanda")
    site.wait_for_the_end()
    assert results(site.root)[site.record.id] == undisturbed[site.record.id]
    assert site.record.resumed >= 1  # more often where a busy machine is slow to start it
    told = [event["event"] for event in callbacks.read(site.jobs[0].entry.events(0))]
    assert "job requeued" in told
    assert len(ledger.load(site.root, "tiny")) == 1


def test_the_controller_restarts_the_job_is_requeued_and_its_node_fails(cluster, tmp_path, data, undisturbed):
    site, node = Site(tmp_path, data, "remove 6", "remove 9"), os.uname().nodename.split(".")[0]
    site("submit", "--method", "wanda")
    site.wait_for_pause(left=1)
    cluster("restart")
    assert site.jobs[0].alive
    queue.ask("scontrol", "requeue", site.jobs[0].sent.id)
    site.wait_for_pause(left=0)
    queue.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
    site.wait(lambda: site.jobs[0].queued.state == "PENDING", "the requeued job")
    queue.ask("scontrol", "update", f"nodename={node}", "state=resume")
    site.wait_for_the_end()
    assert results(site.root)[site.record.id] == undisturbed[site.record.id]
    assert site.record.resumed == 2


def test_killed_while_pruning_and_while_measuring_a_cell_is_sent_again(cluster, tmp_path, data, undisturbed, capsys):
    site = Site(tmp_path, data, "remove 10", "_nll 1")
    site("submit", "--method", "wanda")
    site.wait_for_pause(left=1)
    queue.ask("scancel", "--signal=KILL", site.jobs[0].sent.id)
    site.wait_for_the_end()
    assert site("status") == 1
    assert "Cancelled" in capsys.readouterr().out
    site("retry", "--failed")
    site.wait_for_pause(left=0)
    site.kill()
    assert site("status") == 1
    assert "Killed from outside" in capsys.readouterr().out
    site("submit", "--method", "wanda")
    site.wait_for_the_end()
    assert results(site.root)[site.record.id] == undisturbed[site.record.id]
    assert site.record.resumed == 2


def test_killed_while_retraining_a_cell_goes_on_from_its_steps(cluster, tmp_path, data):
    batch.run_table("retrained", cells.cells(small.retrained().runs()), Settings(tmp_path, data_dir=data))
    site = Site(tmp_path, data, "step 6", table="retrained")
    site("submit")
    site.wait_for_pause(left=0)
    site.kill()
    site("submit")
    site.wait_for_the_end()
    (undisturbed,) = results(tmp_path, "retrained").values()
    (resumed,) = results(site.root, "retrained").values()
    assert resumed[1]["recovery"]["resumed_at"] == 4  # of eight steps, kept every second, killed in the sixth
    assert but_for_how(resumed) == but_for_how(undisturbed)
    assert site.record.resumed == 1


def but_for_how(result: tuple) -> str:
    return re.sub(r"'(seconds|resumed_at|resumed_seconds)': [0-9.e-]+", "", repr(result))


def test_a_job_without_enough_memory_says_what_to_ask_for_and_the_others_finish(cluster, tmp_path, data, capsys):
    site = Site(tmp_path, data, greedy_gb=4)
    site("submit", "--method", "magnitude", "dense")
    site.wait_for_the_end()
    assert site("status") == 1
    assert "Out of memory in a job of 2 GB: submit again with --memory-gb 4" in capsys.readouterr().out
    assert site.record.spec["method"] is None


@pytest.mark.parametrize("moment", ["before the cluster was asked", "before the answer was kept"])
def test_a_launcher_that_is_killed_loses_no_cell_and_sends_none_twice(cluster, tmp_path, data, undisturbed, moment):
    site, two = Site(tmp_path, data), ("--method", "dense", "magnitude")
    launcher = TESTS / "killed_launcher.py"
    words = ["submit", "tiny", *two, "--profile", site.profile, "--data-dir", data, "--results", site.root]
    killed = subprocess.run([sys.executable, launcher, moment, *words, "--memory-gb", "2"], check=False)
    assert killed.returncode == -signal.SIGKILL
    site("submit", *two)
    (entry,) = ledger.load(site.root.resolve(), "tiny")
    site.wait_for_the_end()
    assert results(site.root) == {id: result for id, result in undisturbed.items() if id in entry.cells}
    told = [event for index in range(2) for event in callbacks.read(entry.events(index))]
    assert sorted(event["cell"] for event in told if event["event"] == "started") == sorted(entry.cells)


TWO = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import small_table as small
from experiments.spec import Perplexity
from pruners.unstructured import Unstructured

two = small.table(name="two", measures=(Perplexity("ptb/test", window=64, limit=20),))
fatal, own = Path({fatal!r}), Unstructured.remove

def remove(*arguments):
    if os.environ.get("RANK") == "1" and fatal.exists():
        fatal.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return own(*arguments)

Unstructured.remove = remove
"""


def test_a_job_on_two_cards_makes_the_records_of_one_process_also_after_one_was_killed(cluster, tmp_path, data, capsys):
    """Two processes share a node's CPUs as they would share its cards; the limit of time is what asks for them."""
    fatal, table = tmp_path / "fatal", tmp_path / "two.py"
    table.write_text(TWO.format(tests=str(TESTS), fatal=str(fatal)))
    some = ("--only", "Dense", "GBLM 50 %")
    words = ["run", str(table), "--results", str(tmp_path / "one"), "--data-dir", str(data), "--device", "cpu"]
    assert experiments([*words, *some]) == 0
    site = Site(tmp_path, data, table=str(table), python=sys.executable, cards=2, teraflops=1e-8, packed_hours=1000)
    fatal.touch()
    site("submit", *some)
    site.wait_for_the_end("two")
    (job,) = site.of("two")
    assert (job.entry.cards, job.queued.state, fatal.exists()) == (2, "FAILED", False)
    assert len(records.load(site.root, "two")) == 1  # the dense model was finished before
    capsys.readouterr()
    assert site("status") == 1
    told = capsys.readouterr().out
    assert "Process 1 of 2 was killed (SIGKILL)" in told
    assert f"failed   {job.sent.id} (2 cards)" in told
    site("submit", *some)
    site.wait_for_the_end("two")
    assert results(site.root, "two") == results(tmp_path / "one", "two")
    assert [record.made_by.processes for record in records.load(site.root, "two").values()] == [2, 2]
