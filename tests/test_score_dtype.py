"""LLM-Pruner scored in float32 on a model in half precision, as the released commands do, at every home of weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import small_table as small
import torch
from conftest import needs_shared
from test_homes import at_home
from test_streamed_retraining import weights_of

import pruners
from experiments import cells
from experiments.batch import run_table
from experiments.placement import needs
from experiments.settings import Settings
from experiments.spec import Run
from experiments.store import records
from experiments.store.described import describe
from pruners import gather
from pruners.run import gradients
from pruners.weights import dtypes, homes
from tests import families

PART = {"attention_blocks": (0, 3), "mlp_blocks": (0, 3)}
IMPORTANCES = ("vector", "element1", "element2", "element_mix")
KINDS = ("llama", "opt", "gemma3_text", "bloom", "chatglm", "gpt2", "falcon: multi-query", "phi3")
HALVES = (torch.float16, torch.bfloat16)


def method(**more):
    return pruners.LLMPruner(0.5, **PART, **more)


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("dtype", HALVES)
def test_scores_are_those_of_the_model_in_float32(family, dtype):
    model, wide = (families.tiny(family).to(dtype) for _ in range(2))
    wide, windows, before = wide.float(), families.windows(family), weights_of(model)
    for importance in IMPORTANCES:
        own = gather(model, method(importance=importance), windows)
        found = gather(model, method(importance=importance, score_dtype="float32"), windows)
        expected = gather(wide, method(importance=importance), windows)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        assert any(not torch.equal(found[name], own[name]) for name in own)
        assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    assert all(p.dtype == dtype and torch.equal(p, before[name]) for name, p in weights_of(model).items())


@pytest.mark.parametrize("more", [{}, {"importance": "element_mix"}, {"steps": 2}, {"scope": "global"}],
                         ids=["plain", "squares", "steps", "global"])  # fmt: skip
def test_what_is_cut_is_the_same_at_every_home(more, tmp_path):
    families.tiny("llama").to(torch.float16).save_pretrained(tmp_path)
    made = []
    for home in ("device", "host", "disk"):
        model = at_home(home, tmp_path)
        report = pruners.prune(model, method(score_dtype="float32", **more), families.windows("llama"))
        made.append((report.structure, weights_of(model)))
        assert {p.dtype for p in model.parameters()} == {torch.float16}
    wide = at_home("device", tmp_path).float()
    pruners.prune(wide, method(**more), families.windows("llama"))
    expected = {name: p.to(torch.float16) for name, p in weights_of(wide).items()}
    for structure, weights in made:
        assert structure == made[0][0]
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], p) for name, p in expected.items())


def test_channels_of_the_residual_stream_are_scored_in_float32(tmp_path):
    model = families.tiny("llama").to(torch.float16)
    wide = families.tiny("llama").to(torch.float16).float()
    how = {"granularity": "channel"}
    pruners.prune(model, pruners.LLMPruner(0.5, score_dtype="float32", **how), families.windows("llama"))
    pruners.prune(wide, pruners.LLMPruner(0.5, **how), families.windows("llama"))
    expected = {name: p.to(torch.float16) for name, p in weights_of(wide).items()}
    assert all(torch.equal(p, expected[name]) for name, p in weights_of(model).items())


@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_after_an_error_the_model_is_in_its_own_dtype_again(home, tmp_path, monkeypatch):
    families.tiny("opt").to(torch.bfloat16).save_pretrained(tmp_path)
    model = at_home(home, tmp_path)
    before = weights_of(model)

    def failing(model, *_, **__):
        assert {p.dtype for part in homes.each(model) for p in part.values()} == {torch.float32}
        raise ConnectionError

    monkeypatch.setattr(gradients, "of_mean_loss", failing)
    with pytest.raises(ConnectionError):
        gather(model, method(score_dtype="float32"), families.windows("opt"))
    assert all(p.dtype == torch.bfloat16 and torch.equal(p, before[name]) for name, p in weights_of(model).items())


def test_a_model_in_a_wider_dtype_is_not_narrowed():
    model = families.tiny("llama").double()
    with torch.no_grad():
        for p in model.parameters():
            p += 1e-12
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with dtypes.widened(model, torch.float32):
        assert all(p.dtype == torch.float64 for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_model_in_that_dtype_already_is_left_alone():
    model = families.tiny("llama")
    values = [p.data_ptr() for p in model.parameters()]
    with dtypes.widened(model, torch.float32):
        assert [p.data_ptr() for p in model.parameters()] == values
    with dtypes.widened(model, None):
        assert [p.data_ptr() for p in model.parameters()] == values


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"score_dtype": "float16"}, "Unknown score_dtype 'float16'.*Known: float32"),
        ({"score_dtype": "float32", "importance": "l2"}, "score_dtype is that of gradients, and none are taken here"),
        ({"score_dtype": "float32", "granularity": "layer"}, "score_dtype is that of gradients, and none are taken"),
    ],
)
def test_what_does_not_go_together_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        pruners.LLMPruner(0.5, **given)


def test_ids_and_statistics_are_those_of_before_without_it():
    plain, wide = method(), method(score_dtype="float32")
    assert "score_dtype" not in describe(plain)
    assert describe(wide)["score_dtype"] == "float32"
    assert plain.statistics_key == {"kind": "group_scores", "importance": "element1", "granularity": "block"}
    assert wide.statistics_key == {**plain.statistics_key, "dtype": "float32"}  # cells of both share no scores


def test_estimates_know_that_weights_and_gradients_are_wider():
    run = Run("llama-7b", pruners.LLMPruner(0.25), small.WINDOWS, (), "float16")
    wide = replace(run, method=pruners.LLMPruner(0.25, score_dtype="float32"))
    assert needs.device_gb(wide) > 1.8 * needs.device_gb(run)
    assert needs.device_gb(wide, away=True) > needs.device_gb(run, away=True)


@needs_shared
def test_a_cell_is_scored_in_float32_and_measured_in_its_own_dtype(tmp_path):
    data = small.data(tmp_path / "data")
    how = {"attention_blocks": (0, 5), "mlp_blocks": (0, 5)}
    runs = [
        Run(str(small.MODEL), pruners.LLMPruner(0.5, score_dtype=dtype, **how), small.WINDOWS, (small.PPL,), "bfloat16")
        for dtype in (None, "float32")
    ]
    found = cells.cells(runs)
    assert len({cell.id for cell in found}) == 2
    made = []
    for home in ("device", "disk"):
        settings = Settings(tmp_path / home, device="cpu", data_dir=data, weights=home)
        assert not run_table("tiny", found, settings).failed
        made.append([records.find(tmp_path / home, "tiny", cell.id) for cell in found])
    (own, wide), (_, wide_away) = made
    assert wide.made_by.dtype == "bfloat16"
    assert wide.measures[small.PPL.key]["perplexity"] == wide_away.measures[small.PPL.key]["perplexity"]
    assert wide.measures[small.PPL.key]["perplexity"] != own.measures[small.PPL.key]["perplexity"]
