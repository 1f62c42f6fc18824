"""Measures beside those of `experiments.spec`: open answers, places of the mask, and what making a cell costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pruners.interface import checks
from pruners.interface.checks import Count, Number


@dataclass(frozen=True)
class OpenAnswers:
    """Problems of GSM8K that are solved, by the last number that is written greedily, in per cent.

    The first `examples` of its train split are the few-shot examples; `limit` keeps the first so many problems.
    """

    examples: Number = 5
    limit: Count | None = None
    new_tokens: Count = 256

    shown: ClassVar[tuple[str, ...]] = ("score",)
    problems: ClassVar[str] = "gsm8k/test"
    solved: ClassVar[str] = "gsm8k/train"

    def __post_init__(self) -> None:
        checks.fields(self)

    @property
    def key(self) -> str:
        """E.g. `gsm8k.exact_match@5shot+256` or, limited, `gsm8k.exact_match@5shot+256[:100]`."""
        limit = f"[:{self.limit}]" if self.limit else ""
        return f"gsm8k.exact_match@{self.examples}shot+{self.new_tokens}{limit}"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)

    @property
    def corpora(self) -> tuple[str, ...]:
        """What it reads, by name."""
        return (self.problems, self.solved) if self.examples else (self.problems,)


@dataclass(frozen=True)
class DenseAnswers:
    """How far the greedy answers to fixed prompts, of `new_tokens`, are those of the model before it was pruned."""

    new_tokens: Count = 32

    shown: ClassVar[tuple[str, ...]] = ("exact_share", "first_difference")

    def __post_init__(self) -> None:
        checks.fields(self)

    @property
    def key(self) -> str:
        """E.g. `as dense@32`."""
        return f"as dense@{self.new_tokens}"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)


@dataclass(frozen=True)
class MaskSample:
    """What the mask keeps at `count` places, the same in every cell of a model, by which two cells' masks compare."""

    count: Count = 32_768

    shown: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        checks.fields(self)

    @property
    def key(self) -> str:
        """E.g. `mask sample@32768`."""
        return f"mask sample@{self.count}"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)


@dataclass(frozen=True)
class Costs:
    """Seconds of pruning, tokens a second of retraining with the share trained, and the device's peak memory."""

    shown: ClassVar[tuple[str, ...]] = ("pruning_s", "training_tokens_per_second", "peak_bytes")

    @property
    def key(self) -> str:
        return "costs"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)
