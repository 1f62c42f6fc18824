"""ChatGLM measured: choices asked in its two ways, perplexity and latency with its marks in front."""

from __future__ import annotations

import json

import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file
from torch.nn import functional as F

from eval import chatglm
from eval.efficiency import counts, efficiency
from eval.marks import begun, prefixed, text_prefix
from eval.perplexity import perplexity
from eval.scorer import fingerprint
from eval.zero_shot import zero_shot
from experiments.data import eval_tasks
from pruners.chatglm import ChatGLMTokenizer
from tests.chatglm import GOLDEN, golden, odd, prompts, sentencepiece_file
from tests.conftest import SHARED, needs_shared, tiny


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return ChatGLMTokenizer(str(sentencepiece_file(tmp_path_factory.mktemp("vocabulary"))))


def requests(*pairs):
    return [Instance("loglikelihood", {}, pair, index, ("task", index, 1)) for index, pair in enumerate(pairs)]


PAIRS = (("old words", " count"), ("", "numbers"), ("the old model counts words and ", "numbers learn"))


def nats(model, before, scored):
    logits = model(torch.tensor([before + scored])).logits[0, len(before) - 1 : -1].log_softmax(-1)
    return float(logits.gather(1, torch.tensor(scored)[:, None]).sum())


@pytest.mark.parametrize("released", [False, True])
@torch.no_grad()
def test_choices_are_asked_behind_the_marks(released, tokenizer):
    model = odd()
    scorer = chatglm.scorer(model, tokenizer, released=released)
    for (prompt, choice), (found, _) in zip(PAIRS, scorer.loglikelihood(requests(*PAIRS)), strict=True):
        before, scored = (tokenizer.encode(text, add_special_tokens=False) if text else [] for text in (prompt, choice))
        expected = nats(model, [*before, 5, 8], [*scored, *([5, 8] if released else [])])
        assert found == pytest.approx(expected, abs=1e-4)


@needs_shared
def test_the_authors_choices(tokenizer):
    """The golden case stores inputs without their last token, which is `<sop>` in every row."""
    model, values = golden(), load_file(GOLDEN / "cases.safetensors")
    expected = json.loads((GOLDEN / "cases.json").read_text())["tiny/choices"]["log_likelihoods"]
    bos, gmask = model.config.bos_token_id, model.config.gmask_token_id
    asked = []
    for row in values["tiny/choices/input_ids"].tolist():
        begin = row.index(bos) + 1
        end = row.index(gmask, begin) + 1  # right-padding follows
        asked.append((("context", "choice"), row[:begin], [*row[begin:end], bos]))
    found = chatglm.scorer(model, tokenizer, released=True)._loglikelihood_tokens(asked)
    assert [value for value, _ in found] == pytest.approx(expected, abs=2e-5)


def test_other_models_are_asked_as_before(tokenizer):
    model = tiny("llama multi-head")
    assert text_prefix(model) == ()
    tokens = torch.arange(6).view(2, 3)
    assert prefixed(model, tokens) is tokens
    assert begun(model, tokens) is tokens
    with pytest.raises(ValueError, match="protocol for ChatGLM only, and this is a LlamaForCausalLM"):
        chatglm.scorer(model, tokenizer, released=True)


@torch.no_grad()
def test_perplexity_puts_the_marks_before_every_window():
    model = odd()
    tokens = prompts(4, prompt=12, answer=0)[:, :12]
    found = perplexity(model, tokens.flatten(), 12, batch_size=3)
    for row, loss in zip(tokens, found.nll_per_window, strict=True):
        logits = model(torch.cat([torch.tensor([5, 8]), row])[None]).logits[0, 2:-1]
        assert loss == pytest.approx(float(F.cross_entropy(logits, row[1:])), abs=1e-5)
    assert found.tokens == 48
    with pytest.raises(ValueError, match="longer than the model's context length, 62"):
        perplexity(model, torch.full((80,), 20), 63)


def test_speed_and_counts_are_measured():
    model = odd()
    found = efficiency(model, batch_sizes=(2,), lengths=(8,), new_tokens=2, repetitions=1)
    assert found["timing"]["runs"][0]["length"] == 8
    assert counts(odd().to("meta")).macs == found["macs"]
    assert len(fingerprint(model)) == 64


@needs_shared
@pytest.mark.parametrize("released", [False, True])
@torch.no_grad()
def test_a_task_is_asked_in_either_way(released, tokenizer):
    model, data = odd(max_sequence_length=2048), SHARED / "data"
    (document,) = map(json.loads, (data / "tasks/openbookqa_test.jsonl").read_text().splitlines()[:1])
    sources = {"openbookqa": eval_tasks.changes("openbookqa", data)}
    found = zero_shot(model, tokenizer, sources, limit=1, released_marks=released)
    before = tokenizer.encode(document["question_stem"])  # ends in the marks
    for choice, answer in zip(document["choices"]["text"], found.samples[0]["answers"], strict=True):
        scored = tokenizer.encode(f" {choice}", add_special_tokens=released)
        assert answer == pytest.approx(nats(model, before, scored), abs=2e-3)
