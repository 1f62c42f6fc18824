"""What a pruned model writes: LLM-Pruner's qualitative page, with numbers for how much it repeats itself.

Every prompt is continued greedily and once sampled.  LLM-Pruner samples at temperature 1 from the 50 likeliest tokens
within 95 % of the probability (Ma et al. 2023, arXiv:2305.11627, tables 11 and 18-21).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from eval.checks import Progress, check_fits, check_model, check_tokenizer
from pruners.interface import checks
from pruners.interface.checks import Count, Number, Positive, Rule, Seed
from pruners.run import ranks

PROMPTS = (
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that",
    "Building a website can be done in 10 simple steps:",
    "Once upon a time, there was a little girl who",
)


Prompts = Annotated[Sequence[str], checks.several(Rule("", (str,)), "a tuple or list of texts")]


@dataclass(frozen=True)
class Sampling:
    """How the sampled continuation is drawn; the defaults are LLM-Pruner's."""

    temperature: Positive = 1.0
    top_k: Number = 50
    top_p: Annotated[float, Rule("a share above 0, up to 1", (int, float), lambda value: 0 < value <= 1)] = 0.95
    seed: Seed = 0

    def __post_init__(self) -> None:
        checks.fields(self)


LLM_PRUNER = Sampling()


@dataclass(frozen=True)
class Continuation:
    """One continuation, and over its tokens: distinct n-grams per n-gram, and the share of repeated 4-grams.

    The shares are None where there are fewer tokens than one n-gram has.
    """

    prompt: str
    decoding: str
    text: str
    tokens: int
    distinct_1: float | None
    distinct_2: float | None
    repeated_4: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@checks.arguments
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts = PROMPTS,
    new_tokens: Count = 64,
    sampling: Annotated[Sampling, checks.instance(Sampling, "an eval.generation.Sampling")] = LLM_PRUNER,
    progress: Progress | None = None,
) -> list[Continuation]:
    """Each prompt's greedy and sampled continuation by at most `new_tokens` tokens.

    The same seed gives the same text on the same device and no random state is left changed.  The ranks of a launch
    share the continuations.  Raises ValueError for no or an empty prompt, for one that does not fit the model's
    positions with its continuation, and for a tokenizer that does not belong to the model.
    """
    check_model(model)
    check_tokenizer(model, tokenizer)
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("Generation needs at least one prompt, and none that is empty.")
    configs = _configs(new_tokens, sampling)
    asked = [(prompt, decoding) for prompt in prompts for decoding in configs]

    def continued(number: int) -> list[int]:
        prompt, decoding = asked[number]
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        check_fits(model, ids.shape[1], new_tokens)
        return _continue(model, ids, configs[decoding], sampling.seed)

    found = ranks.here(model.device).deal(continued, len(asked), progress)
    return [
        _described(prompt, decoding, new, str(tokenizer.decode(new, skip_special_tokens=True)))
        for (prompt, decoding), new in zip(asked, found, strict=True)
    ]


@checks.arguments
def written(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    count: Count,
    length: Count,
    seed: Seed = 0,
    batch_size: Count = 8,
) -> torch.Tensor:
    """Windows [count, length] that the model writes itself, by its own probabilities, drawn with `seed`.

    Each begins with the token that begins a text.  No end of text is drawn.  Another `batch_size` draws other windows.
    Raises ValueError for a tokenizer without a token that begins or ends a text, and for windows that do not fit.
    """
    check_model(model)
    check_tokenizer(model, tokenizer)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise ValueError("This tokenizer has no token that begins a text, so the model cannot write one of its own.")
    check_fits(model, 1, length - 1)
    config = GenerationConfig(max_new_tokens=length - 1, min_new_tokens=length - 1, do_sample=True, temperature=1.0,
                              top_k=0, top_p=1.0, eos_token_id=tokenizer.eos_token_id, pad_token_id=begin)  # fmt: skip
    generator: Any = model
    devices = [model.device] if model.device.type == "cuda" else []
    parts = []
    with torch.random.fork_rng(devices=devices), torch.inference_mode():
        torch.manual_seed(seed)
        for at in range(0, count, batch_size):
            ids = torch.full((min(batch_size, count - at), 1), begin, device=model.device)
            parts.append(generator.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config).cpu())
    return torch.cat(parts).clone()


def distinct(tokens: Sequence[int], n: int) -> float | None:
    """Different n-grams per n-gram (Li et al. 2016): 1 says nothing twice, near 0 says the same forever."""
    grams = [tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def repeated(tokens: Sequence[int], n: int = 4) -> float | None:
    """Share of n-grams that were there before (Welleck et al. 2020, seq-rep-n)."""
    different = distinct(tokens, n)
    return None if different is None else 1 - different


def _configs(new_tokens: int, sampling: Sampling) -> dict[str, GenerationConfig]:
    shared = {"max_new_tokens": new_tokens, "num_beams": 1, "repetition_penalty": 1.0, "use_cache": True}
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
    return {
        "greedy": GenerationConfig(**shared, do_sample=False),
        "sampled": GenerationConfig(**shared, do_sample=True, **drawn),
    }


def _continue(model: PreTrainedModel, ids: torch.Tensor, config: GenerationConfig, seed: int) -> list[int]:
    """The new tokens; transformers draws from the global state, which is therefore put back afterwards."""
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.inference_mode():
        torch.manual_seed(seed)
        generator: Any = model  # the class's own annotation hides that `generate` is a method
        output = generator.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return [int(token) for token in output[0, ids.shape[1] :]]


def _described(prompt: str, decoding: str, new: list[int], text: str) -> Continuation:
    return Continuation(prompt, decoding, text, len(new), distinct(new, 1), distinct(new, 2), repeated(new))
