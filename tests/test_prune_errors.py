"""Bad input: one clear sentence, and the model is left as it was."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import CodeGenConfig, CodeGenForCausalLM

import pruners
from pruners import anatomy
from pruners.run.statistic import is_finite
from tests.conftest import tiny


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range(sparsity):
    with pytest.raises(ValueError, match=r"\[0, 1\)"):
        pruners.Wanda(sparsity=sparsity)


def test_sparsity_and_pattern_that_disagree():
    with pytest.raises(ValueError, match=r"2:4 keeps 2 of every 4 weights, so sparsity is 0\.5; got 0\.6"):
        pruners.Magnitude(sparsity=0.6, pattern="2:4")
    assert pruners.Magnitude(pattern="1:4").sparsity == 0.75
    assert pruners.Magnitude(sparsity=0.5, pattern="4:8").sparsity == 0.5


@pytest.mark.parametrize("pattern", ["2", "4:2", "0:4", "2:4:8", "half", "4:4"])
def test_patterns_that_are_none(pattern):
    with pytest.raises(ValueError, match="n:m"):
        pruners.Wanda(pattern=pattern)


def test_a_width_that_m_does_not_divide_names_the_projection_and_prunes_nothing(kind):
    model = tiny(kind)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj has 48"):
        pruners.prune(model, pruners.Magnitude(pattern="3:5"))
    assert all((lin.weight != 0).all() for b in anatomy.blocks(model) for lin in b.linears().values())


def test_an_unknown_method_gets_the_nearest_names():
    with pytest.raises(ValueError, match="Did you mean wanda"):
        pruners.method("wnda")


@pytest.mark.parametrize("windows", [None, torch.empty(0, 16, dtype=torch.long), torch.empty(3, 0, dtype=torch.long)])
def test_empty_calibration(windows):
    with pytest.raises(ValueError, match="needs calibration windows"):
        pruners.prune(tiny("opt"), pruners.Wanda(), windows)


@pytest.mark.parametrize("windows", [torch.zeros(8, dtype=torch.long), torch.zeros(2, 8)])
def test_windows_of_another_shape_or_type(windows):
    with pytest.raises(ValueError, match=r"LongTensor \[count, length\]"):
        pruners.prune(tiny("opt"), pruners.Wanda(), windows)


def test_windows_longer_than_the_models_positions(kind):
    with pytest.raises(ValueError, match="65 tokens are longer than the model's context length, 64"):
        pruners.prune(tiny(kind), pruners.GBLM(), torch.zeros(1, 65, dtype=torch.long))


def test_tokens_of_another_tokenizer(kind):
    with pytest.raises(ValueError, match="Token 96 is outside"):
        pruners.prune(tiny(kind), pruners.Wanda(), torch.full((1, 8), 96))


@pytest.mark.parametrize("method", [pruners.Magnitude(), pruners.Wanda(), pruners.SparseGPT()])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(kind, windows, method, bad):
    model = tiny(kind)
    anatomy.blocks(model)[1].linear("self_attn.k_proj").weight.data[0, 0] = bad
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.\w+"):
        pruners.prune(model, method, windows)


def test_activations_that_are_not_finite_are_named(kind, windows):
    model = tiny(kind)
    model.get_input_embeddings().register_forward_hook(lambda _, __, found: found + float("inf"))
    with pytest.raises(ValueError, match=r"inputs of .*layers\.0\.self_attn\.q_proj hold NaN or inf"):
        pruners.prune(model, pruners.Wanda(), windows)


def test_gradients_that_are_not_finite_are_named(kind, windows):
    model = tiny(kind)
    model.get_input_embeddings().register_forward_hook(lambda _, __, found: found * float("nan"))
    with pytest.raises(ValueError, match=r"gradient of .* is not finite"):
        pruners.prune(model, pruners.Gradient(), windows)


def test_an_unknown_architecture_says_what_to_add():
    model = CodeGenForCausalLM(CodeGenConfig(n_layer=1, n_embd=8, n_head=4, rotary_dim=2, vocab_size=16))
    with pytest.raises(ValueError, match=r"decoder family 'codegen'.*in pruners/families\.py: FAMILIES"):
        pruners.prune(model, pruners.Magnitude())


def test_linear_layers_that_the_family_does_not_name_are_refused():
    model = tiny("llama multi-head")
    model.model.layers[1].mlp.extra = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"layers\.1 has matrices that .* mlp\.extra\.weight"):
        pruners.prune(model, pruners.Magnitude())


@pytest.mark.parametrize(
    ("method", "fields", "said"),
    [
        ("wanda", {"group": "columns:0"}, "'rows:N' or 'columns:N'; got 'columns:0'"),
        ("gblm", {"norm": "l3"}, "'l1' or 'l2'"),
        ("sparsegpt", {"damping": 0.0}, "positive"),
        ("sparsegpt", {"pattern": "2:4", "block_size": 6}, "not a multiple"),
    ],
)
def test_hyperparameters_out_of_range(method, fields, said):
    with pytest.raises(ValueError, match=said):
        pruners.method(method, **fields)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_is_found_wherever_it_is(dtype, bad):
    sound = torch.linspace(-1, 1, 77).to(dtype).view(7, 11)
    for place in range(77):
        tensor = sound.clone()
        tensor.view(-1)[place] = bad
        assert not is_finite(tensor)
        assert not is_finite(tensor.T)
    assert is_finite(sound)
    assert is_finite(sound[:0])
