"""Perplexity as the pruning papers measure it.

    ppl = exp(mean over windows of the mean next-token cross-entropy)

The token stream is cut into non-overlapping windows, the tail is dropped, and labels are shifted by one inside a
window.  All windows are equally long, so averaging windows or tokens is the same number (`targets` of the papers:
LLM-Pruner averages tokens, the others windows).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from eval.checks import Progress, check_model, measuring
from eval.marks import prefixed, text_prefix
from pruners.interface import checks
from pruners.interface.checks import Count, Whole
from pruners.run import inputs, ranks
from pruners.run.stream import instead
from pruners.weights import sweep

LOGITS = 2**25  # float32 logits held at once (128 MiB)


@dataclass(frozen=True)
class PerplexityResult:
    """`nll_per_window` are mean next-token losses in nats; `tokens` counts windows * window, as the papers do."""

    perplexity: float
    windows: int
    tokens: int
    nll_per_window: tuple[float, ...]
    token_sha256: str

    @property
    def standard_error(self) -> float | None:
        """Of the perplexity, over windows (delta method); None for a single window, which has no spread."""
        if self.windows < 2:
            return None
        deviation = float(torch.tensor(self.nll_per_window, dtype=torch.float64).std())
        return self.perplexity * deviation / math.sqrt(self.windows)


@checks.arguments
def perplexity(
    model: PreTrainedModel,
    token_ids: Int[Tensor, " tokens"],
    window: Whole,
    batch_size: Count = 8,
    progress: Progress | None = None,
) -> PerplexityResult:
    """Perplexity of `model` over the windows of `token_ids`, in float32 log-softmax whatever the model's dtype.

    A model whose weights are away from home reads them once for as many windows as there is memory.  The head runs on
    as many tokens at a time as keep the logits within 128 MiB.  The ranks of a launch share the batches.  A model that
    needs marks in front of text (ChatGLM: `[gMASK] <sop>`) gets them before every window, where they are not scored.
    Raises TypeError for invalid arguments, ValueError where the stream is shorter than one window, the window
    longer than the model's positions, a token outside the vocabulary, or a loss is not finite.
    """
    check_model(model)
    windows = _windows(model, token_ids, window)
    batches = windows.split(batch_size)
    together = ranks.here(model.device)

    def losses(numbers: Sequence[int]) -> list[list[float]]:
        mine = [prefixed(model, batches[number].to(model.device)) for number in numbers]
        found: list[list[float]] = []
        done = 0
        for number in sweep.over(model, mine):
            found.append(_nll(model, mine[number]).tolist())
            done += len(mine[number]) * together.count
            if progress:
                progress(min(done, len(windows)), len(windows))
        return found

    with measuring(model):
        made = together.split(losses, len(batches))
    nll = torch.tensor([loss for batch in made for loss in batch], dtype=torch.float64)
    if not nll.isfinite().all():
        raise ValueError("The loss is NaN or inf in some windows: the model overflows; use bfloat16 or float32.")
    return PerplexityResult(
        perplexity=float(nll.mean().exp()),
        windows=len(windows),
        tokens=windows.numel(),
        nll_per_window=tuple(nll.tolist()),
        token_sha256=token_sha256(windows),
    )


def token_sha256(token_ids: Int[Tensor, "..."]) -> str:
    """SHA-256 of the tokens as little-endian 64-bit integers."""
    return hashlib.sha256(token_ids.cpu().contiguous().numpy().astype("<i8").tobytes()).hexdigest()


def _windows(model: PreTrainedModel, token_ids: Any, window: int) -> Int[Tensor, "windows window"]:
    if not isinstance(token_ids, Tensor):
        raise TypeError(
            f"Perplexity takes a LongTensor of token ids; got {checks.typed(token_ids)}. Convert: "
            "torch.tensor(token_ids, dtype=torch.long)."
        )
    if token_ids.dtype != torch.long or token_ids.is_meta:
        raise ValueError(
            f"Perplexity takes a LongTensor of token ids; got {token_ids.dtype}"
            f"{' without values' * token_ids.is_meta}. For other integers: token_ids.long()."
        )
    count = token_ids.numel() // window if window > 1 else 0
    if count == 0:
        raise ValueError(
            f"Perplexity needs at least one window of two or more tokens; got {token_ids.numel()} tokens for windows "
            f"of {window}. Give more text or a shorter window."
        )
    limit = getattr(model.config, "max_position_embeddings", None)
    positions = None if limit is None else limit - len(text_prefix(model))
    if positions is not None and window > positions:
        raise ValueError(
            f"Windows of {window} tokens are longer than the model's context length, {positions}; use shorter ones."
        )
    inputs.in_vocabulary(token_ids, model.config.vocab_size, "the tokenizer belongs to another model")
    return token_ids.flatten()[: count * window].view(count, window)


def _nll(model: PreTrainedModel, batch: Int[Tensor, "windows longer"]) -> Float[Tensor, " windows"]:
    """Mean next-token loss of each window, float64; the windows come with the tokens that belong before text."""
    begin = len(text_prefix(model))  # not scored and no part of the window
    made = model.get_decoder()(input_ids=batch, use_cache=False)
    hidden = made.last_hidden_state[:, begin:-1]
    flat, labels = hidden.flatten(0, 1), batch[:, begin + 1 :].flatten()
    chunk = max(1, LOGITS // model.config.vocab_size)
    with _logits_of(model, type(made)) as logits:
        losses = [
            F.cross_entropy(logits(flat[at : at + chunk]).float(), labels[at : at + chunk], reduction="none")
            for at in range(0, len(flat), chunk)
        ]
    return torch.cat(losses).view(len(batch), -1).double().mean(1)


@contextmanager
def _logits_of(model: PreTrainedModel, output: Any) -> Iterator[Callable[[Tensor], Tensor]]:
    """Gives the logits [tokens, vocabulary] of last hidden states [tokens, width]; `output` is what decoders return.

    It runs the model's own forward pass with the decoder left out, as families scale or cap what comes from the head.
    """
    given: list[Tensor] = []

    def stand_in(*_: Any, **__: Any) -> Any:
        return output(last_hidden_state=given.pop())

    def logits(hidden: Tensor) -> Tensor:
        given.append(hidden[None])
        few = torch.zeros(1, len(hidden), dtype=torch.long, device=hidden.device)
        made = model(input_ids=few, use_cache=False).logits
        if given:
            raise ValueError(
                f"{type(model).__name__} does not call the module that its get_decoder() returns, so its "
                "logits cannot be computed in chunks; let get_decoder() return the module that computes the "
                "last hidden states."
            )
        return made[0]

    with instead(model.get_decoder(), stand_in):
        yield logits
