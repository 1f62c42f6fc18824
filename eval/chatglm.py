"""Multiple choice for models that need special tokens between prompt and answer, as ChatGLM's `[gMASK] <sop>`.

lm-eval takes prompt and choice apart where it expects no such marks: the choice would lose its first tokens to them.
Two ways of asking are known here:

- `prompt [gMASK] <sop> choice`, the choice's own tokens scored: how the model was trained.
- `prompt [gMASK] <sop> choice [gMASK] <sop>`, the last two scored, too: LLM-Pruner's released harness (its vendored
  lm-eval's class `ChatGLM`), and so its table 5.  The model takes the first `<sop>` for the beginning of the answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.answers import Answer, AnswerStore
from eval.checks import Progress
from eval.marks import text_prefix
from eval.scorer import Request, Scorer


class PromptScorer(Scorer):
    """Prompt and choice are tokenised apart; the marks follow the prompt, also an empty one."""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        return [*self._tokens(context), *text_prefix(self.model)], self._tokens(continuation)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Answer]:
        """lm-eval puts a token of its own before a choice without a prompt; here the marks do."""
        marked: list[Request] = [
            (asked, *self._encode_pair(*asked)) if asked[0] == "" else (asked, before, scored)
            for asked, before, scored in requests
        ]
        return super()._loglikelihood_tokens(marked, disable_tqdm, override_bs)

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False)) if text else []


class ReleasedScorer(PromptScorer):
    """The marks follow the choice as well and are scored with it, as in LLM-Pruner's table 5."""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        prompt, choice = super()._encode_pair(context, continuation)
        return prompt, [*choice, *text_prefix(self.model)]


def scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int | None = None,
    store: AnswerStore | None = None,
    progress: Progress | None = None,
    released: bool = False,
) -> Scorer:
    """The `lm` for this model; with `released` as LLM-Pruner's harness asks ChatGLM.

    Raises ValueError where `released` is asked of a model that knows no marks.
    """
    marks = text_prefix(model)
    if released and not marks:
        raise ValueError(
            "Choices followed by [gMASK] <sop> are a protocol for ChatGLM only, and this is a "
            f"{type(model).__name__}; leave that protocol out."
        )
    kind: Any = (ReleasedScorer if released else PromptScorer) if marks else Scorer
    return kind(model, tokenizer, batch_size, store, progress)
