"""What a pruning run did, per projection and in total."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Projection:
    """One pruned matrix: `weights` entries, of which `zeros` are zero now; `asked` is the sparsity aimed at."""

    name: str
    weights: int
    zeros: int
    asked: float

    @property
    def achieved(self) -> float:
        return self.zeros / self.weights

    @classmethod
    def of(cls, name: str, linear: nn.Linear, asked: float) -> Projection:
        return cls(name, linear.weight.numel(), int((linear.weight == 0).sum()), asked)


@dataclass
class Report:
    """`seconds` by stage; sparsities are shares of the weights of the decoder blocks' linear layers."""

    method: str
    asked: float
    projections: list[Projection] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def achieved(self) -> float:
        weights = sum(p.weights for p in self.projections)
        return sum(p.zeros for p in self.projections) / weights if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        projections = [{**asdict(p), "achieved": p.achieved} for p in self.projections]
        return {**asdict(self), "achieved": self.achieved, "projections": projections}

    def __str__(self) -> str:
        seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in self.seconds.items())
        return f"{self.method}: sparsity {self.achieved:.4f} (asked {self.asked:.4f}); {seconds}"
