"""Measures beside those of `experiments.spec`: what making a cell costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


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
