"""Greedy answers: whether a model still answers as another did, and whether it solves arithmetic problems.

Multiple choice and perplexity flatter pruned models, which rank given answers well long after they fail to write one.
GSM8K is asked as lm-eval asks it, `Question: ...\\nAnswer:` after solved examples, and right where the last number that
is written equals that of the solution.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from statistics import fmean
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from eval.checks import Progress, check_fits, check_model, check_tokenizer, measuring
from eval.generation import Prompts, continued
from eval.intervals import standard_error
from pruners.interface import checks
from pruners.interface.checks import Count, Text
from pruners.run import ranks

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "The three primary colours are",
    "To make a cup of tea, first",
    "In the beginning there was",
    "The quick brown fox",
    "One, two, three, four,",
    "The largest planet of the solar system is",
    "My favourite season is autumn because",
    "A good friend is someone who",
    "The train was late, so we",
    "Photosynthesis is the process by which",
    "Shakespeare is best known for",
    "If it rains tomorrow,",
    "The doctor told her that",
    "The most important thing about learning is",
)
STOP = "Question:"  # where a model goes on with a problem of its own
# A sign stands behind nothing that could be subtracted from.
NUMBER = re.compile(r"(?:(?<![^\W_])(?<![.)%])[-\u2212])?(?:\d+(?:,\d+)*(?:\.\d+)?|(?<![\w.])\.\d+)")


@dataclass(frozen=True)
class Agreement:
    """Of greedy answers to the same prompts: the share that is the same to the last token, and where others part.

    `first_difference` is the mean number of tokens before the first that differs, all of them where none does;
    `differing` has it by prompt.
    """

    exact_share: float
    first_difference: float
    prompts: int
    differing: list[int]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


@checks.arguments
def greedy(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts = PROMPTS,
    new_tokens: Count = 32,
    stop: Text | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """The tokens [new_tokens or fewer] of each prompt's greedy answer, which ends after the text `stop`.

    The ranks of a launch share the prompts.  Raises ValueError for no or an empty prompt, one that does not fit the
    model's positions with its answer, and a tokenizer that does not belong to the model.
    """
    check_model(model)
    check_tokenizer(model, tokenizer)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("Greedy answers need at least one prompt, and no empty ones.")
    config = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, use_cache=True, stop_strings=stop)

    def answer(number: int) -> list[int]:
        ids = tokenizer(prompts[number], return_tensors="pt").input_ids.to(model.device)
        check_fits(model, ids.shape[1], new_tokens)
        with measuring(model):
            output = continued(model, ids, config, tokenizer=tokenizer)
        return [int(token) for token in output[0, ids.shape[1] :].tolist()]

    return ranks.here(model.device).deal(answer, len(prompts), progress)


def agreement(one: Sequence[Sequence[int]], other: Sequence[Sequence[int]]) -> Agreement:
    """Of two models' answers to the same prompts; ValueError where there are not as many."""
    if len(one) != len(other) or not one:
        raise ValueError(
            f"Two lists of answers to the same prompts must be equally long; got {len(one)} and {len(other)}."
        )
    differing = [_common(a, b) for a, b in zip(one, other, strict=True)]
    same = [list(a) == list(b) for a, b in zip(one, other, strict=True)]
    return Agreement(fmean(same), fmean(differing), len(one), differing)


def last_number(text: str) -> Decimal | None:
    """The last number of a text, thousands separated by commas or not; None without any."""
    found = NUMBER.findall(text)
    if not found:
        return None
    whole, point, decimals = found[-1].replace("\u2212", "-").partition(".")
    groups = whole.split(",")
    first = len(groups) - 1
    while first and len(groups[-1]) == 3 and len(groups[first]) in (2, 3):  # else commas separate numbers
        first -= 1
    return Decimal("".join(groups[first:]) + point + decimals)


def prompt(problem: Mapping[str, str], examples: Sequence[Mapping[str, str]] = ()) -> str:
    """A problem's `question` after the solved `examples`, as lm-eval's task gsm8k writes them."""
    told = [f"Question: {example['question']}\nAnswer: {example['answer']}\n\n" for example in examples]
    return "".join(told) + f"Question: {problem['question']}\nAnswer:"


@checks.arguments
def solved(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Mapping[str, str]],
    examples: Sequence[Mapping[str, str]] = (),
    new_tokens: Count = 256,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The share of `problems`, each a `question` and an `answer`, whose last number is the answer's; plain JSON.

    With its standard error over problems, what was written, and the digest of what was asked.  Raises ValueError for no
    problem, for an answer without a number, and as `greedy` does.
    """
    if not problems:
        raise ValueError("Open answers need at least one problem.")
    right = [last_number(problem["answer"]) for problem in problems]
    if None in right:
        raise ValueError(f"Problem {right.index(None) + 1:,} has an answer without a number; fetch the problems again.")
    prompts = [prompt(problem, examples) for problem in problems]
    answers = greedy(model, tokenizer, prompts, new_tokens, STOP, progress)
    texts = [str(tokenizer.decode(answer, skip_special_tokens=True)).partition(STOP)[0] for answer in answers]
    hits = [float(last_number(text) == number) for text, number in zip(texts, right, strict=True)]
    asked = json.dumps([prompts, [str(number) for number in right]])
    return {
        "score": fmean(hits),
        "standard_error": standard_error(hits),
        "documents": len(problems),
        "documents_sha256": hashlib.sha256(asked.encode()).hexdigest(),
        "per_document": hits,
        "answers": texts,
    }


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens at the beginning are the same."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(one), len(other)))
