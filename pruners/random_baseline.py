"""Random: every weight is as good as any other.  The floor that a method has to clear."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pruners.checks import Seed
from pruners.lazy import Tensor, torch
from pruners.unstructured import Unstructured


@dataclass(frozen=True)
class Random(Unstructured):
    """Uniform scores within rows, drawn from `seed` and the projection's name, the same on every device."""

    seed: Seed = 0

    def score(self, name: str, weight: Tensor, x: Any, dense: Mapping[str, Tensor]) -> Tensor:
        mixed = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
        return torch.rand(weight.shape, generator=generator, dtype=torch.float32).to(weight.device)
