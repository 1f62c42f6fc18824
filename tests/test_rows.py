"""Requests that share their beginnings in one row: of every family, against each request computed alone."""

from __future__ import annotations

import random

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from eval.requests import rows, sharing
from eval.scorer import Scorer
from tests.families import TINY, WINDOW, tiny

APART = {
    "bloom": "it takes no position_ids",
    "mpt": "it takes no position_ids",
    "falcon: alibi": "its attention counts the tokens of a row (ALiBi)",
    "chatglm": "its mask depends on the marks in a text",
}


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({f"w{n}": n for n in range(88)}, "w0")))


def documents(count, seed=0, context=(1, 30), answer=(1, 5)):
    """Requests of few-shot documents with several answers each, some of them equal and some the beginning of others."""
    draw = random.Random(seed)
    examples = [[draw.randrange(3, 80) for _ in range(draw.randint(*context))] for _ in range(3)]
    asked = []
    for number in range(count):
        before = examples[number % 3] + [draw.randrange(3, 80) for _ in range(draw.randint(*context))]
        answers = [[draw.randrange(3, 80) for _ in range(draw.randint(*answer))] for _ in range(3)]
        asked += [(("", str(number)), before, answer) for answer in (*answers, answers[0], [*answers[1], 7])]
    draw.shuffle(asked)
    return asked


def alone(model, before, scored, longest):
    """By its definition, in a pass of the request alone."""
    tokens = (before + scored)[-(longest + 1) :]
    with torch.no_grad():
        logs = model(torch.tensor([tokens[:-1]]), use_cache=False).logits[0, -len(scored) :].float().log_softmax(-1)
    wanted = torch.tensor(scored)
    return float(logs.gather(1, wanted[:, None]).sum()), bool((logs.argmax(-1) == wanted).all())


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "chatglm"])
def test_every_request_is_answered_as_alone(kind, tokenizer):
    model = tiny(kind)
    scorer = Scorer(model, tokenizer)
    asked = documents(6, context=(1, 3), answer=(1, 2)) + documents(6, seed=1)  # within and beyond sliding windows
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    found = scorer._loglikelihood_tokens(asked)
    assert scorer.apart == APART.get(kind)
    taken = len(passes)
    expected = [alone(model, before, scored, scorer.max_length) for _, before, scored in asked]
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert taken < len(asked) / 3
    if sharing.window(model):
        assert {len(before) + len(scored) - 1 > WINDOW for _, before, scored in asked} == {True, False}


def test_chatglm_is_asked_apart():
    assert sharing.why_apart(tiny("chatglm")) == APART["chatglm"]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_both_kinds_of_attention_obey_the_mask(implementation, tokenizer):
    model = tiny("llama")
    model.set_attn_implementation(implementation)
    asked = documents(5)
    found = Scorer(model, tokenizer)._loglikelihood_tokens(asked)
    expected = [alone(model, before, scored, 64)[0] for _, before, scored in asked]
    assert [nats for nats, _ in found] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dropped", [None, "attention_mask", "position_ids"])
def test_a_model_that_drops_the_mask_or_the_positions_is_found_out(dtype, dropped, tokenizer, monkeypatch, caplog):
    model = tiny("llama")
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 20  # attention that looks at some tokens more than at others, as trained models do
    model.to(dtype)
    forward = model.model.forward
    changes = {dropped: None} if dropped else {}
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: forward(*args, **(kwargs | changes)))
    scorer = Scorer(model, tokenizer)
    scorer._loglikelihood_tokens(documents(1))
    assert scorer.apart == (dropped and "its logits in one row are not those of each alone")
    assert ("Every request is computed separately" in caplog.text) == bool(dropped)


@pytest.mark.parametrize("dropped", [None, "attention_mask", "position_ids"])
def test_what_rounding_alone_does_in_half_precision_is_no_difference(dropped, monkeypatch):
    """Pruned and dense models of a table are asked in one way, however much of them the rounding takes."""
    monkeypatch.setitem(sharing.TOLERANCE, torch.bfloat16, 0.0)
    model = tiny("llama")
    for name, weight in model.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            weight.data *= 20
    model.to(torch.bfloat16)
    forward = model.model.forward
    changes = {dropped: None} if dropped else {}
    monkeypatch.setattr(model.model, "forward", lambda *args, **kwargs: forward(*args, **(kwargs | changes)))
    assert bool(sharing.why_apart(model)) == bool(dropped)
    monkeypatch.setattr(sharing, "ROUNDINGS", 0)
    assert sharing.why_apart(model)


def test_what_is_not_known_to_take_a_mask_is_asked_apart():
    model = tiny("llama")
    model.config._attn_implementation = "flash_attention_2"
    assert sharing.why_apart(model) == "its attention, 'flash_attention_2', is not known to take any mask"
    model = tiny("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    assert sharing.why_apart(model) == "its positions depend on the longest sequence"


def test_a_row_that_does_not_fit_is_halved(tokenizer, monkeypatch):
    model, asked = tiny("llama"), documents(8)
    expected = Scorer(model, tokenizer)._loglikelihood_tokens(asked)
    widths, forward = [], model.forward
    longest = max(len(before) + len(scored) - 1 for _, before, scored in asked)

    def little_memory(*, input_ids, **kwargs):
        widths.append(input_ids.shape[1])
        if widths[-1] > longest:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than there is.")
        return forward(input_ids=input_ids, **kwargs)

    scorer = Scorer(model, tokenizer)
    scorer._check()
    monkeypatch.setattr(model, "forward", little_memory)
    found = scorer._loglikelihood_tokens(asked)
    assert max(widths) > longest
    assert [nats for nats, _ in found] == pytest.approx([nats for nats, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("seed", range(5))
def test_a_token_attends_to_what_stands_before_it_in_its_request(seed):
    asked = [before + scored for _, before, scored in documents(12, seed)]
    for numbers in rows.pack(asked, 100, 200):
        made = rows.row([(asked[number], 1) for number in numbers])
        told = made.inputs(torch.device("cpu"))
        mask, tokens = told["attention_mask"][0, 0], told["input_ids"][0]
        paths = {tuple(asked[number][:end]) for number in numbers for end in range(1, len(asked[number]))}
        seen = [tuple(tokens[mask[node]].tolist()) for node in range(len(tokens))]
        assert len(seen) == len(paths)  # every beginning once
        assert set(seen) == paths
        assert made.positions.tolist() == [len(path) - 1 for path in seen]
        assert torch.equal(made.inputs(torch.device("cpu"), torch.float32)["attention_mask"][0, 0] == 0, mask)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("room", "longest"), [(40, 40), (100, 300), (10_000, 10_000)])
def test_every_request_is_in_one_row_and_rows_have_their_length(seed, room, longest):
    asked = [before + scored for _, before, scored in documents(40, seed)]
    packed = rows.pack(asked, room, longest)
    assert sorted(number for numbers in packed for number in numbers) == list(range(len(asked)))
    sizes = [len(rows.row([(asked[number], 1) for number in numbers]).tokens) for numbers in packed]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) <= max(longest, *map(len, asked))
    for numbers, size in zip(packed, sizes, strict=True):
        shared = len(beginning([asked[number][:-1] for number in numbers]))
        assert size <= max(room, rows.WORTH_A_LONGER_ROW * shared, len(asked[numbers[0]]) - 1)
    assert rows.pack(asked, room, longest) == packed
    assert rows.pack([], room, longest) == []


def beginning(lists):
    first, last = min(lists), max(lists)
    return first[: next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))]


def test_examples_that_many_questions_share_are_read_a_few_times():
    draw = random.Random(0)
    examples = [draw.randrange(1_000) for _ in range(500)]
    questions = [[*examples, *(draw.randrange(1_000) for _ in range(68))] for _ in range(200)]
    asked = [[*question, answer] for question in questions for answer in (1, 2, 3, 4)]
    read = sum(len(rows.row([(asked[number], 1) for number in numbers]).tokens)
               for numbers in rows.pack(asked, 512, 4_096))  # fmt: skip
    assert read < 0.2 * sum(map(len, questions))


def test_the_answers_of_a_long_row_are_read_off_in_parts():
    asked = [([1, *(n % 90 for n in range(3 * rows.HEAD_ROWS))], 3 * rows.HEAD_ROWS)]
    made = rows.row(asked)
    logits = torch.randn(len(made.asked), 96, generator=torch.Generator().manual_seed(0))
    logs = logits.log_softmax(-1)
    ((nats, greedy),) = made.answers(logits)
    assert nats == pytest.approx(float(logs.gather(1, torch.tensor(made.targets)[:, None]).sum()), rel=1e-6)
    assert not greedy
