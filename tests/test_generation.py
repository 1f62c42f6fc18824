"""Continuations with a seed, their repetition as numbers, and dense beside pruned on one page."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis.pages.generation import page
from eval.generation import Sampling, distinct, generate, repeated

STORIES = Path(__file__).resolve().parents[1].parent / "shared/data/models/stories260K/hf"
needs_model = pytest.mark.skipif(not STORIES.exists(), reason="../shared/data is absent")
PROMPTS = ("Once upon a time", "The dog | and the cat")


@pytest.fixture(scope="module")
def pair():
    return AutoModelForCausalLM.from_pretrained(STORIES).eval(), AutoTokenizer.from_pretrained(STORIES)


def test_distinct_and_repeated_n_grams():
    assert distinct([1, 2, 3, 4], 2) == 1
    assert distinct([1, 2, 1, 2, 1], 2) == 2 / 4
    assert repeated([7] * 10) == 1 - 1 / 7
    assert distinct([1], 2) is None
    assert repeated([1, 2, 3]) is None


@needs_model
def test_greedy_text_is_the_argmax_of_every_step(pair):
    model, tokenizer = pair
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    expected = ids
    for _ in range(12):
        with torch.no_grad():
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(-1)], dim=1)
    found = generate(model, tokenizer, PROMPTS[:1], new_tokens=12)[0]
    assert (found.decoding, found.tokens) == ("greedy", 12)
    assert found.text == tokenizer.decode(expected[0, ids.shape[1] :], skip_special_tokens=True)


@needs_model
def test_a_seed_decides_the_sampled_text_and_nothing_else(pair):
    before = torch.random.get_rng_state()
    first, again = (generate(*pair, PROMPTS, 12, Sampling(seed=1)) for _ in range(2))
    other = generate(*pair, PROMPTS, 12, Sampling(seed=2))
    assert first == again
    assert [c.text for c in first if c.decoding == "greedy"] == [c.text for c in other if c.decoding == "greedy"]
    assert [c.text for c in first if c.decoding == "sampled"] != [c.text for c in other if c.decoding == "sampled"]
    assert torch.equal(before, torch.random.get_rng_state())


@needs_model
def test_a_page_holds_both_models_side_by_side(pair):
    answers = [answer.to_dict() for answer in generate(*pair, PROMPTS, 8)]
    text = page({"Dense": answers, "Wanda 50 %": answers})
    assert text.count("| Dense") == 1 + len(answers)
    assert "distinct-2" in text
    assert "## The dog | and the cat (sampled)" in text
    with pytest.raises(ValueError, match="same prompts"):
        page({"Dense": answers, "Wanda 50 %": answers[:2]})


@needs_model
@pytest.mark.parametrize(
    ("prompts", "new_tokens", "message"),
    [((), 4, "at least one"), ((" ",), 4, "empty"), (PROMPTS, 600, "context length, 512")],
)
def test_prompts_that_cannot_be_continued_are_refused(pair, prompts, new_tokens, message):
    with pytest.raises(ValueError, match=message):
        generate(*pair, prompts, new_tokens)
