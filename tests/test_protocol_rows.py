"""Tables of variants of one protocol: rates that they take, text that they hold out, what a rehearsal of them runs."""

from __future__ import annotations

from dataclasses import replace

import torch

from experiments import models
from experiments.data import corpora
from experiments.papers import headlines, llm_pruner, perp
from experiments.rates import choice
from experiments.recovery import POST_TRAINING
from experiments.selection import rehearsal


def test_every_granularity_has_a_rate_of_its_own():
    tuned = [run for run in perp.granularity.runs() if run.recovery]
    assert len(tuned) == 2 * len(perp.WAYS) == 20
    assert {choice(run) for run in tuned} == set(perp.granularity_rates.runs())
    assert {run.tuning.table for run in tuned} == {perp.granularity_rates.name}
    assert len({(run.recovery.granularity, run.recovery.inputs) for run in tuned}) == 10


def test_rows_of_the_embedded_table_differ_in_what_is_rebuilt_alone():
    _, pruned, *rebuilt = headlines.granularity.runs()
    assert len(rebuilt) == 10
    assert {replace(run, recovery=None) for run in rebuilt} == {pruned}
    assert len({replace(run.recovery, granularity="block", inputs="pruned") for run in rebuilt}) == 1


def test_rows_of_the_released_protocol_are_those_of_the_paper_but_for_dtype_and_step():
    found = [run for run in llm_pruner.as_released_table.runs() if run.method]
    assert len(found) == 6
    assert {replace(run.method, score_dtype=None) for run in found} == {found[0].method}
    assert [run.method.score_dtype for run in found] == [None] * 3 + ["float32"] * 3
    assert [run.recovery for run in found] == 2 * [None, POST_TRAINING, replace(POST_TRAINING, keep="best")]
    assert set(found[:2]) <= set(llm_pruner.llama_7b.runs())


def test_text_held_out_on_the_embedded_model_is_not_trained_on():
    """No 16 tokens in a row of one are in the other."""
    _, tokenizer, *_ = models.load(headlines.MODEL)
    trained = corpora.calibration(headlines.BEST.text, tokenizer).flatten()
    held_out = corpora.calibration(headlines.BEST.held_out, tokenizer)
    assert held_out.shape == (32, 128)
    there = set(map(tuple, trained.unfold(0, 16, 1).tolist()))
    assert not any(tuple(row) in there for window in held_out for row in window.unfold(0, 16, 1).tolist())
    assert torch.equal(trained.view(32, 128), corpora.calibration(headlines.TUNED.text, tokenizer))


def test_a_rehearsal_runs_every_granularity_and_every_way_to_keep_a_step():
    ways = {
        (run.recovery.granularity, run.recovery.inputs)
        for run in rehearsal.rehearsed(headlines.granularity).runs()
        if run.recovery
    }
    assert ways == set(headlines.WAYS)
    kept = [run.recovery for run in rehearsal.rehearsed(headlines.as_released).runs() if run.recovery]
    assert {(one.keep, one.check_every) for one in kept} == {("last", 2), ("best", 2)}
