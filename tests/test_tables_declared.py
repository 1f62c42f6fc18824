"""Every declared table: its runs build, their ids are unique and stable, every printed cell has a place or a reason.

`snapshot.json` holds the digest of each table's ids.  An id changes when something that moves a number changes, and
every record made under the old one is then orphaned: accept that (PYTHONPATH=. python tests/test_tables_declared.py)
only where a protocol, calibration or hyperparameter was wrong, or where a field was added that every old record lacks,
and say which in the commit.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import pruners
from analysis import coverage, published
from experiments import cells, models, papers, protocols
from experiments.labels import labels
from experiments.papers import llm_pruner
from experiments.spec import Table
from experiments.store.described import digest

SNAPSHOT = Path(__file__).with_name("snapshot.json")
PAPERS = {name: table for name, table in papers.TABLES.items() if not name.startswith("embedded.")}
RUNNABLE = list(PAPERS.values())
named = pytest.mark.parametrize("table", RUNNABLE, ids=lambda table: table.name)
EMBEDDED = [table for name, table in papers.TABLES.items() if name not in PAPERS]


def ids(table: Table) -> list[str]:
    return [cell.id for cell in cells.cells(table.runs(), table)]


def snapshot() -> dict[str, dict[str, str | int]]:
    """By table the number of its runs and the digest of their ids in reading order."""
    return {table.name: {"runs": len(ids(table)), "ids": digest({"ids": ids(table)})} for table in RUNNABLE}


@pytest.mark.parametrize("table", [*EMBEDDED, *RUNNABLE], ids=lambda table: table.name)
def test_every_run_has_its_own_id_and_words(table):
    assert len(set(ids(table))) == len(ids(table)) > 0
    assert all(method for method, _ in labels(table.runs(), table.label))


@named
def test_runs_of_one_name_differ_in_their_seed_alone(table):
    runs = table.runs()
    same: dict[tuple[str, ...], set] = {}
    for run, label in zip(runs, labels(runs, table.label), strict=True):
        same.setdefault((run.model, *label), set()).add(
            replace(run, windows=run.windows and replace(run.windows, seed=0))
        )
    assert [len(alike) for alike in same.values()] == [1] * len(same)


@named
def test_models_are_known_and_their_windows_fit(table):
    for run in table.runs():
        positions = models.find(run.model).positions
        assert run.windows is None or run.windows.length <= positions
        assert all(getattr(what, "window", 0) <= positions for what in run.measures)


@named
def test_a_table_runs_on_another_model(table):
    runs = table.runs("llama-2-7b")
    assert {run.model for run in runs} == {"llama-2-7b"}


@pytest.mark.parametrize(
    ("model", "share", "parameters"),
    [("llama-7b", 0.2, 5_422_977_024), ("llama-7b", 0.5, 3_350_188_032), ("tinyllama-1.1b", 0.2, 945_907_712)],
)
def test_the_blocks_that_llm_pruner_prunes_leave_the_published_parameters(model, share, parameters):
    hidden, mlp, blocks, kv_heads = {"llama-7b": (4096, 11008, 32, 32), "tinyllama-1.1b": (2048, 5632, 22, 4)}[model]
    config = LlamaConfig(hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=blocks, num_attention_heads=32,
                         num_key_value_heads=kv_heads, vocab_size=32000)  # fmt: skip
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    pruners.prune(empty, llm_pruner.method("Random", model, share), None)
    assert empty.num_parameters() == parameters


def test_the_pruned_model_beside_stablelm_keeps_the_published_parameters():
    config = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
                         vocab_size=32000)  # fmt: skip
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    pruners.prune(empty, replace(llm_pruner.to_3_6b("llama-7b"), importance="random"), None)
    asked = ("table 9", "parameters", "llama-7b")
    printed = next(c for c in published.read("llm_pruner") if (c.table, c.metric, c.model) == asked)
    assert empty.num_parameters() == pytest.approx(printed.value, abs=printed.rounding)


@pytest.mark.parametrize(
    ("name", "cells"), [("baselines.mmlu", 16), ("llm_pruner.more_data", 24), ("llm_pruner.stablelm", 18),
     ("llm_pruner.more_models", 70), ("baselines.sparsity", 32), ("baselines.bloom_sizes", 20),
     ("baselines.bloom_groups", 10)],
)  # fmt: skip
def test_these_tables_claim_every_number_that_has_a_protocol(name, cells):
    claimed = coverage.claimed([papers.find(name)])
    printed = published.of(papers.find(name).published)
    assert sum(map(bool, claimed.values())) == cells
    assert [cell for cell in printed if not claimed[cell] and cell.protocol] == []


def test_ids_are_those_of_the_snapshot():
    assert snapshot() == json.loads(SNAPSHOT.read_text())


def test_ids_are_the_same_in_another_process():
    imports = "from experiments import cells; from experiments.papers import gblm"
    code = f"{imports}; print(*[c.id for c in cells.cells(gblm.alpha.runs())])"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment,
                          cwd=SNAPSHOT.parents[1])  # fmt: skip
    assert told.stdout.split() == ids(papers.find("gblm.alpha"))


def test_every_printed_cell_has_one_place_or_a_reason():
    claimed, left = coverage.claimed(PAPERS.values()), coverage.unmatched(PAPERS.values())
    assert len(claimed) == sum(len(published.read(paper)) for paper in published.papers())
    assert {tuple(names) for names in claimed.values() if len(names) > 1} == set()
    assert Counter(cell.place for cell, reason in left.items() if not reason) == {}
    assert sum(bool(names) for names in claimed.values()) > 1800


@pytest.mark.parametrize("place", ["gblm: table 2", "wanda: table 3", "flap: table 1", "llm_pruner: table 1"])
def test_the_headline_tables_are_claimed_but_for_what_is_named(place):
    left = {cell for cell in coverage.unmatched(PAPERS.values()) if cell.place == place}
    assert {cell.method for cell in left} <= {"Wanda minus GBLM-Pruner (l1)", "Dense (numbers of the LLaMA paper)"}


def test_a_key_of_another_protocol_is_never_claimed():
    claimed = coverage.claimed([papers.find("gblm.perplexity")])
    assert {cell.protocol for cell, names in claimed.items() if names} == {protocols.perplexity("gblm")[0].key}


if __name__ == "__main__":
    SNAPSHOT.write_text(json.dumps(snapshot(), indent=1) + "\n")
