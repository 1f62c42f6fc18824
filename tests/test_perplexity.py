"""Perplexity against a direct float64 loop, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch

from eval import perplexity as module
from eval.perplexity import perplexity, token_sha256
from tests.conftest import tiny


@pytest.fixture
def tokens():
    return torch.randint(0, 96, (203,), generator=torch.Generator().manual_seed(3))


def oracle(model, tokens, window):
    model = model.double()
    losses = []
    for start in range(0, len(tokens) - window + 1, window):
        ids = tokens[start : start + window]
        logs = model(ids[None]).logits[0].log_softmax(-1).detach()
        losses.append(-sum(float(logs[t, ids[t + 1]]) for t in range(window - 1)) / (window - 1))
    return math.exp(sum(losses) / len(losses)), losses


@pytest.mark.parametrize("window", [2, 16, 64])
def test_equals_a_direct_float64_loop(kind, tokens, window):
    expected, losses = oracle(tiny(kind), tokens, window)
    result = perplexity(tiny(kind), tokens, window)
    assert result.perplexity == pytest.approx(expected, rel=1e-5)
    assert result.nll_per_window == pytest.approx(losses, rel=1e-4)
    assert (result.windows, result.tokens) == (203 // window, 203 // window * window)


def test_neither_batches_nor_head_chunks_change_the_number(kind, tokens, monkeypatch):
    whole = perplexity(tiny(kind), tokens, 16, batch_size=12)
    monkeypatch.setattr(module, "LOGITS", 7 * 96)
    pieces = perplexity(tiny(kind), tokens, 16, batch_size=5)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_standard_error_is_that_of_the_mean_loss_times_the_perplexity(tokens):
    result = perplexity(tiny("opt"), tokens, 16)
    losses = torch.tensor(result.nll_per_window, dtype=torch.float64)
    assert result.standard_error == pytest.approx(result.perplexity * float(losses.std()) / math.sqrt(12))
    assert perplexity(tiny("opt"), tokens[:16], 16).standard_error is None


def test_half_precision_losses_are_computed_in_float32(tokens):
    exact, half = (
        perplexity(tiny("llama multi-head").to(d), tokens, 16).perplexity for d in (torch.float32, torch.bfloat16)
    )
    assert half == pytest.approx(exact, rel=0.05)


def test_the_token_hash_covers_the_tokens_that_were_used(tokens):
    result = perplexity(tiny("opt"), tokens, 16)
    assert result.token_sha256 == token_sha256(tokens[:192])
    assert result.token_sha256 != token_sha256(tokens)


def test_progress_counts_windows(tokens):
    calls = []
    perplexity(tiny("opt"), tokens, 16, batch_size=5, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(5, 12), (10, 12), (12, 12)]


@pytest.mark.parametrize(
    ("window", "count", "said"),
    [
        (64, 63, "at least one window"),
        (1, 50, "two or more tokens"),
        (65, 200, "context length, 64"),
        (16, 0, "got 0 tokens"),
    ],
)
def test_windows_that_do_not_fit(tokens, window, count, said):
    with pytest.raises(ValueError, match=said):
        perplexity(tiny("opt"), tokens[:count], window)


def test_a_tokenizer_of_another_model(tokens):
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        perplexity(tiny("opt"), tokens + 90, 16)


def test_losses_that_are_not_finite_are_refused(tokens):
    model = tiny("opt")
    model.get_input_embeddings().weight.data[int(tokens[20])] = float("nan")
    with pytest.raises(ValueError, match="NaN or inf"):
        perplexity(model, tokens, 16)


def test_what_happens_to_logits_after_the_head_happens(tokens):
    model = tiny("llama multi-head")
    plain, dense = model.forward, perplexity(model, tokens, 16).perplexity
    model.forward = lambda **inputs: scaled(plain(**inputs))
    halved = perplexity(model, tokens, 16).perplexity
    model.lm_head.weight.data *= 0.5
    model.forward = plain
    assert halved == pytest.approx(perplexity(model, tokens, 16).perplexity)
    assert abs(halved - dense) > 0.1


def scaled(output):
    output.logits = output.logits * 0.5
    return output


def test_a_model_that_does_not_run_its_decoder_is_refused(tokens):
    model, other = tiny("llama multi-head"), tiny("llama multi-head")
    model.get_decoder = lambda: other.model
    with pytest.raises(ValueError, match=r"does not call the module that its get_decoder\(\) returns"):
        perplexity(model, tokens, 16)
