"""Watchers of a table: the log of events and Weights & Biases, offline; neither can harm a cell."""

from __future__ import annotations

import os
import pty
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import small_table as small
import wandb
from conftest import needs_shared

import pruners
from experiments import batch, callbacks, cells
from experiments.callbacks import Events, Watcher, Watchers
from experiments.settings import Settings
from experiments.store import records
from experiments.wandb_callback import Wandb

METHODS = (None, pruners.Magnitude(sparsity=0.5), pruners.Wanda(pattern="3:7"))  # the last one fails: no groups of 7


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    if not small.MODEL.is_dir():
        pytest.skip(f"{small.MODEL} is absent")
    return small.data(tmp_path_factory.mktemp("data"))


def run(root: Path, data: Path, *watching: Watcher, methods=METHODS) -> batch.Outcome:
    return batch.run_table("tiny", cells.cells(small.table(methods).runs()), Settings(root, data_dir=data), watching)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("CONFIG", "CACHE", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name.lower()))
    yield
    wandb.teardown()


def test_offline_tracking_leaves_one_run_a_cell_with_the_record_in_it(tmp_path, data, offline, monkeypatch):
    added, add_file = [], wandb.Artifact.add_file
    monkeypatch.setattr(wandb.Artifact, "add_file", lambda self, path: added.append(path) or add_file(self, path))
    outcome = run(tmp_path, data, Wandb("demo", "tiny", tmp_path))
    assert (len(outcome.done), outcome.failed) == (2, ["Wanda 3:7"])
    stored = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(stored) == 3
    text = b"".join(path.read_bytes() for path in stored)
    assert all(word in text for word in (b"ptb/test@64[:4]", b"nll_per_window", b"multiple of 7", b"magnitude"))
    assert sorted(added) == sorted(str(path) for path in (tmp_path / "runs/tiny").glob("*[0-9a-f].json"))


def test_a_tracker_that_cannot_start_fails_no_cell(tmp_path, data, monkeypatch, caplog):
    monkeypatch.setattr(wandb, "init", lambda **_: (_ for _ in ()).throw(wandb.errors.UsageError("no API key")))
    assert len(run(tmp_path, data, Wandb("demo", "tiny", tmp_path), methods=METHODS[:2]).done) == 2
    assert [record.message for record in caplog.records] == [
        "Wandb failed and is switched off; cells continue: Weights & Biases did not start (no API key); run "
        "`wandb login`, set "
        "WANDB_API_KEY, or keep its runs on this disk with WANDB_MODE=offline."
    ]


@contextmanager
def terminal(monkeypatch) -> Iterator[None]:
    """Standard streams on a terminal where 3, "Don't visualize my results", is typed ahead, so a question goes by."""
    keys, screen = pty.openpty()
    os.write(keys, b"3\n" * 9)
    with os.fdopen(screen, "r") as reading, os.fdopen(os.dup(screen), "w") as writing, monkeypatch.context() as streams:
        for name, stream in {"stdin": reading, "stdout": writing, "stderr": writing}.items():
            streams.setattr(sys, name, stream)
        yield
    os.close(keys)


@needs_shared
def test_on_a_terminal_without_a_login_nothing_is_asked(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("NETRC", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("TERM", "xterm")
    wandb.teardown()
    (cell,) = cells.cells(small.table(METHODS[:1]).runs())
    with terminal(monkeypatch):
        keyboard = sys.stdin
        with pytest.raises(ValueError, match=r"did not start .* run `wandb login`, set WANDB_API_KEY"):
            Wandb("demo", "tiny", tmp_path).started(cell, 0)
        assert sys.stdin is keyboard


def test_a_watcher_that_breaks_is_told_nothing_more_and_the_others_are(caplog):
    class Broken(Watcher):
        def stage(self, name):
            raise RuntimeError("boom")

    class Counting(Watcher):
        stages = 0

        def stage(self, name):
            self.stages += 1

    counting = Counting()
    both = Watchers([Broken(), counting])
    both.stage("loading")
    both.stage("pruning")
    assert counting.stages == 2
    assert len([record for record in caplog.records if record.name == "experiments.callbacks"]) == 1


def test_events_say_which_cell_does_what(tmp_path, data):
    run(tmp_path, data, Events(tmp_path / "events.jsonl", job="7_0"))
    told = callbacks.read(tmp_path / "events.jsonl")
    steps = [e["event"] for e in told if e["event"] not in ("stage", "progress")]
    assert steps == ["started", "finished"] * 2 + ["started", "failed"]
    assert {e["cell"] for e in told} == {cell.id for cell in cells.cells(small.table(METHODS).runs())}
    assert {e["name"] for e in told if e["event"] == "stage"} >= {"loading", "pruning", "measuring ptb/test@64[:4]"}
    assert all(e["job"] == "7_0" and e["at"].endswith("+00:00") for e in told)


def test_an_event_that_a_kill_cut_short_costs_that_event_alone(tmp_path):
    path = tmp_path / "events.jsonl"
    Events(path).write("first")
    path.write_bytes(path.read_bytes() + b'{"at": "2026-')
    Events(path).write("second")
    assert [event["event"] for event in callbacks.read(path)] == ["first", "second"]


@pytest.mark.parametrize(
    "line",
    [
        "5", "null", "{}", "[]", '"x"', "[" * 200_000, "1" * 5000, '{"event": "stage"}',
        '{"event": "stage", "cell": 5, "at": "2026-01-01"}', '{"event": "stage", "cell": "", "at": "2026-01-01"}',
        '{"event": "x", "cell": "", "at": "soon"}', '{"event": "progress", "cell": "", "at": "2026-01-01"}',
        '{"event": "progress", "cell": "", "at": "2026-01-01", "share": "x", "left": 1}',
        '{"event": "progress", "cell": "", "at": "2026-01-01", "share": 1, "left": 1e300}',
        '{"event": "progress", "cell": "", "at": "2026-01-01", "share": 1, "left": NaN}',
        '{"event": "rank failed", "cell": "", "at": "2026-01-01"}',
    ],
)  # fmt: skip
def test_a_line_that_is_no_event_is_passed_over(tmp_path, line):
    path = tmp_path / "events.jsonl"
    Events(path).write("first")
    path.write_text(f"{path.read_text()}{line}\n")
    Events(path).write("second")
    assert [event["event"] for event in callbacks.read(path)] == ["first", "second"]


def test_a_folder_holds_no_events(tmp_path):
    assert callbacks.read(tmp_path) == []


def test_a_record_is_the_same_watched_or_not(tmp_path, data):
    run(tmp_path / "watched", data, Events(tmp_path / "events.jsonl"), methods=METHODS[1:2])
    run(tmp_path / "alone", data, methods=METHODS[1:2])
    (watched,), (alone,) = (records.load(tmp_path / name, "tiny").values() for name in ("watched", "alone"))
    assert (watched.id, watched.measures) == (alone.id, alone.measures)
