"""The same calibration windows in another order: what it is in a spec, and how far it moves a number and a mask."""

from __future__ import annotations

import base64
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import small_table as small
import torch
from conftest import tiny
from transformers import AutoTokenizer

import pruners
from analysis import rows
from analysis.__main__ import main as analysis
from analysis.pages import report, spread
from analysis.tables import frames
from eval.mask_sample import agreement, mask_sample
from eval.mask_sample import rows as rows_of
from experiments import cells, labels, papers
from experiments.batch import run_table
from experiments.data import corpora
from experiments.measures import made
from experiments.measures.asked import MaskSample
from experiments.recovery import Retraining
from experiments.run import execute
from experiments.settings import Settings
from experiments.spec import Run, Table, Windows
from experiments.store import records
from pruners import anatomy
from pruners.interface.suggest import UsageError
from pruners.retrain import Trainable

needs_model = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")
TOKENS = torch.arange(96).view(6, 16)


def test_no_order_leaves_the_id_and_every_order_has_its_own():
    run = Run("llama-7b", pruners.Wanda(sparsity=0.5), Windows("c4/train", 128, 2048), (small.PPL,))
    assert run.spec()["windows"] == {
        "corpus": "c4/train", "count": 128, "length": 2048, "seed": 0, "sampling": "documents",
    }  # fmt: skip
    runs = [run, *(replace(run, windows=replace(run.windows, order=order)) for order in range(3))]
    assert len({run.id() for run in runs}) == 4
    assert labels.calibration(runs[2]) == "c4/train 128 x 2048 documents, seed 0, order 1"
    assert labels.apart(runs, [("Wanda", "50 %")] * 4)[1:] == [f"Wanda 50 %, order {order}" for order in range(3)]


def test_an_order_shuffles_the_windows_and_nothing_else(tmp_path):
    if not small.MODEL.is_dir():
        pytest.skip(f"{small.MODEL} is absent")
    data, tokenizer = small.data(tmp_path / "data"), AutoTokenizer.from_pretrained(small.MODEL)
    asked = Windows("c4/train", 8, 32)
    drawn = corpora.calibration(asked, tokenizer, data)
    shuffled = [corpora.calibration(replace(asked, order=order), tokenizer, data) for order in (0, 1, 1)]
    assert torch.equal(shuffled[1], shuffled[2])
    assert not torch.equal(shuffled[0], shuffled[1])
    for other in shuffled:
        assert not torch.equal(other, drawn)
        assert sorted(other.tolist()) == sorted(drawn.tolist())


def test_a_sample_tells_how_far_two_masks_agree():
    models = [tiny("llama multi-head") for _ in range(2)]
    for model, sparsity in zip(models, (0.5, 0.6), strict=True):
        pruners.prune(model, pruners.Magnitude(sparsity=sparsity))
    kept = [
        torch.cat([p.flatten() != 0 for block in model.model.layers for p in block.parameters() if p.ndim == 2])
        for model in models
    ]
    whole = [mask_sample(model, 10**9) for model in models]
    assert [sample["places"] for sample in whole] == [len(mask) for mask in kept]
    assert [sample["kept"] for sample in whole] == [pytest.approx(mask.double().mean().item()) for mask in kept]
    true = (kept[0] == kept[1]).double().mean().item()
    assert agreement(*whole) == pytest.approx(true, abs=1e-12)
    assert true < 0.95
    some = [mask_sample(model, 2_000) for model in models]
    assert agreement(*some) == pytest.approx(true, abs=0.04)
    assert agreement(some[0], some[0]) == 1.0
    assert agreement(some[0], whole[0]) is None


@pytest.mark.parametrize("kind", ["llama grouped-query", "opt"])
def test_of_what_was_cut_the_sample_has_the_units(kind):
    model = tiny(kind)
    dense = rows_of(model)
    assert mask_sample(model, 10**9, dense)["kept"] == 1.0
    pruners.prune(model, pruners.Flap(ratio=0.5), TOKENS)
    found, masked = mask_sample(model, 10**9, dense), tiny(kind)
    pruners.prune(masked, pruners.Flap(ratio=0.5), TOKENS, cut=False)
    bits = np.unpackbits(np.frombuffer(base64.b64decode(found["bits"]), np.uint8))[: found["places"]].astype(bool)
    assert found["kept"] == pytest.approx(bits.mean())
    assert 0.2 < found["kept"] < 0.8
    start = 0
    for block in anatomy.blocks(masked):  # whose columns are zero where the released code cuts
        outward = {"mlp": block.family.outward, "attention": block.family.output}
        columns = {part: (block.linear(name).weight != 0).any(0).numpy() for part, name in outward.items()}
        for name in (*block.family.qkv, *block.family.inward):
            there = bits[start : start + block.linear(name).out_features]
            start += len(there)
            of_queries = name == block.family.qkv[0]
            if name in block.family.inward or of_queries:
                assert (there == columns["attention" if of_queries else "mlp"]).all()
    assert start == len(bits)
    block = anatomy.blocks(model)[0]
    with torch.no_grad():
        block.linear(block.family.inward[0]).weight.mul_(2)
    with pytest.raises(ValueError, match="are not the dense model's, so what was cut is unknown"):
        mask_sample(model, 10**9, dense)


@pytest.mark.parametrize("kind", ["llama grouped-query", "opt"])
def test_of_blocks_that_are_gone_nothing_is_kept(kind):
    model = tiny(kind)
    dense = rows_of(model)
    before = mask_sample(model, 10**9, dense)
    pruners.prune(model, pruners.LLMPruner(0.5, granularity="layer"))
    found = mask_sample(model, 10**9, dense)
    assert len(anatomy.blocks(model)) == 1
    assert found["places"] == before["places"]
    assert found["kept"] == 0.5
    bits = np.unpackbits(np.frombuffer(base64.b64decode(found["bits"]), np.uint8))[: found["places"]]
    assert bits.tolist() == [1] * (len(bits) // 2) + [0] * (len(bits) // 2)  # the last one
    assert agreement(before, found) == 0.5


def test_of_equal_rows_as_many_are_kept_as_are_left():
    model = tiny("llama multi-head")
    block = anatomy.blocks(model)[0]
    inward = [block.linear(name).weight for name in block.family.inward]
    with torch.no_grad():
        for weight in inward:
            weight[::2] = weight[0]
            weight[1] = 0.0
            weight[3] = 0.0
    dense, width = rows_of(model), len(inward[0])
    whole = mask_sample(model, 10**9, dense)
    assert whole["kept"] == 1.0
    assert whole["places"] == sum(
        each.linear(name).out_features
        for each in anatomy.blocks(model)
        for name in (*each.family.qkv, *each.family.inward)
    )
    stay = [place for place in range(width) if place not in (0, 3, width - 1)]
    for name in block.family.inward:
        linear = block.linear(name)
        linear.weight = torch.nn.Parameter(linear.weight[stay].detach())
    found = mask_sample(model, 10**9, dense)
    assert found["kept"] == pytest.approx(1 - 3 * len(inward) / whole["places"])
    bits = np.unpackbits(np.frombuffer(base64.b64decode(found["bits"]), np.uint8))
    start = sum(block.linear(name).out_features for name in block.family.qkv)
    there = bits[start : start + width]
    assert there.sum() == width - 3
    assert not there[width - 1]
    assert there[1] + there[3] == 1  # which of the two nothing tells
    with torch.no_grad():  # one more of a kind than the dense model has
        linear.weight[2:6] = 0.0
    with pytest.raises(ValueError, match="are not the dense model's, so what was cut is unknown"):
        mask_sample(model, 10**9, dense)


@needs_model
def test_a_cell_without_its_last_blocks_tells_the_share_that_stays(tmp_path):
    run = Run(str(small.MODEL), pruners.LLMPruner(0.4, granularity="layer"), None, (MaskSample(),))
    (cell,) = cells.cells([run])
    assert not run_table("tiny", [cell], Settings(tmp_path, device="cpu")).failed
    assert records.find(tmp_path, "tiny", cell.id).measures[MaskSample().key]["kept"] == 0.6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": pruners.LLMPruner(0.2, granularity="channel")}, "granularity='channel' shortens every row"),
        (
            {"recovery": Retraining(Trainable(norms=True), small.WINDOWS, 8, 1e-3)},
            "and retraining changes weights",
        ),
        ({"quantised": True}, "and LLM.int8 changes weights"),
    ],
)
def test_a_mask_that_the_finished_model_does_not_tell_is_refused_before_the_work(changes, said, tmp_path, monkeypatch):
    monkeypatch.setattr("experiments.run.open_session", lambda *args: pytest.fail("opened"))
    run = replace(Run(str(small.MODEL), pruners.Flap(ratio=0.3), small.WINDOWS, (MaskSample(),)), **changes)
    with pytest.raises(ValueError, match=said) as caught:
        execute(run, "tiny", Settings(tmp_path, device="cpu"))
    assert str(caught.value).startswith("mask sample@32768 ")
    made.check(replace(run, measures=(small.PPL,)))


@needs_model
def test_the_spread_of_orders_draws_and_texts_is_told(tmp_path, capsys, monkeypatch):
    base = replace(small.WINDOWS, count=6)
    windows = [base, *(replace(base, order=order) for order in (0, 1)), replace(base, seed=1)]
    windows.append(replace(base, corpus="embedded/c4"))
    methods = (None, pruners.SparseGPT(pattern="2:4"), pruners.Flap(ratio=0.3))
    table = Table(
        "tiny",
        "Tiny",
        methods,
        tuple((str(small.MODEL), one) for one in windows),
        lambda method, model, one: Run(model, method, one, (small.PPL, *([MaskSample()] if method else []))),
    )
    monkeypatch.setitem(papers.TABLES, "tiny", table)
    settings = Settings(tmp_path, device="cpu", data_dir=small.data(tmp_path / "data"))
    assert len(run_table("tiny", cells.cells(table.runs(), table), settings).done) == 11
    assert analysis(["spread", "tiny", "--results", str(tmp_path)]) == 0
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    found = {(line[0], line[2]): line for line in lines if len(line) > 5 and line[0] in ("SparseGPT", "Flap")}
    assert {axis: found["SparseGPT", axis][4] for _, axis in found} == {
        "order of the windows": "3", "draw of the windows": "2", "text": "2",
    }  # fmt: skip
    stored = records.load(tmp_path, "tiny").values()
    orders = [
        record.measures[small.PPL.key]["perplexity"]
        for record in stored
        if (record.spec["method"] or {}).get("name") == "sparsegpt"
        and {**record.spec["windows"], "order": 0} == {**base.told(), "order": 0}
    ]
    assert found["SparseGPT", "order of the windows"][6] == f"{min(orders):,.3f} to {max(orders):,.3f}"
    agreed = {key: [float(share) for share in line[8].split(", ")] for key, line in found.items()}
    assert agreed["SparseGPT", "draw of the windows"][0] < agreed["SparseGPT", "order of the windows"][0] <= 1
    assert 0.3 < agreed["Flap", "text"][0] < 1


def test_every_text_has_its_own_spread_of_draws_and_every_draw_its_own_of_texts(tmp_path):
    places = [(corpus, seed) for corpus in ("c4/train", "embedded/c4") for seed in (0, 1)]
    table = Table(
        "tiny", "Tiny", (pruners.Wanda(0.5),), tuple(("smollm2-135m", *place) for place in places),
        lambda method, model, corpus, seed: Run(model, method, Windows(corpus, 4, 32, seed), (small.PPL,)),
    )  # fmt: skip
    for value, run in enumerate(table.runs(), start=10):
        told = small.record(run).measures[small.PPL.key]
        records.write(small.record(run, measures={small.PPL.key: {**told, "perplexity": float(value)}}), tmp_path)
    page = spread.page(table, rows.rows(table, tmp_path))
    lines = [[part.strip() for part in line.split("|")[1:-1]] for line in page.splitlines() if "Wanda" in line]
    assert [(line[2], line[3], line[6]) for line in lines] == [
        ("draw of the windows", "c4/train", "10.000 to 11.000"),
        ("draw of the windows", "embedded/c4", "12.000 to 13.000"),
        ("text", "seed 0", "10.000 to 12.000"),
        ("text", "seed 1", "11.000 to 13.000"),
    ]
    longer = replace(table, run=lambda *told: replace(run := table.run(*told), windows=replace(run.windows, length=64)))
    both = [*rows.rows(table, tmp_path), *(
        replace(row, run=run) for row, run in zip(rows.rows(table, tmp_path), longer.runs(), strict=True)
    )]  # fmt: skip
    assert "c4/train, 32 tokens each" in spread.page(table, both)


def test_rows_that_differ_in_their_order_are_told_apart(tmp_path):
    table = Table(
        "tiny", "Tiny", (pruners.Wanda(0.5),), tuple(("smollm2-135m", order) for order in (None, 0, 1)),
        lambda method, model, order: Run(model, method, replace(small.WINDOWS, order=order), (small.PPL,)),
    )  # fmt: skip
    for run in table.runs():
        records.write(small.record(run), tmp_path)
    made = rows.rows(table, tmp_path)
    assert list(frames.text(made)["Seed"]) == ["0", "0, order 0", "0, order 1"]
    assert list(frames.numbers(made)["order"])[1:] == [0, 1]


def test_committed_draws_have_a_spread_and_a_table_without_records_has_none():
    table = papers.find("embedded.gblm")
    drawn = rows.rows(table, Path(__file__).resolve().parents[1] / "results")
    lines = [line for line in spread.page(table, drawn).splitlines() if "draw of the windows" in line]
    assert len(lines) == 6  # Wanda, SparseGPT and GBLM at two settings
    with pytest.raises(UsageError, match=r"No two measured cells of embedded.gblm differ only"):
        spread.page(table, [])


@pytest.mark.parametrize(
    ("changes", "more"),
    [({"order": 1}, True), ({"corpus": "embedded/c4"}, True), ({"seed": 9}, False), ({"count": 9}, False),
     ({"count": 9, "corpus": "embedded/c4"}, False)],
)  # fmt: skip
def test_the_report_shows_a_spread_where_more_than_the_seed_varies(changes, more, tmp_path):
    columns = tuple(("smollm2-135m", one) for one in (small.WINDOWS, replace(small.WINDOWS, **changes)))
    table = Table("tiny", "Tiny", (pruners.Wanda(0.5),), columns,
                  lambda method, model, windows: Run(model, method, windows, (small.PPL,)))  # fmt: skip
    for run in table.runs():
        records.write(small.record(run), tmp_path)
    made = rows.rows(table, tmp_path)
    assert spread.tells_more_than_seeds(made) == more
    assert (report._spread(made) is not None) == more
