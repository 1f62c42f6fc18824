"""What a pruning run did: per projection or per block, and in total."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from pruners import anatomy
from pruners.lazy import nn
from pruners.run.matrices import Matrix


@dataclass(frozen=True)
class Projection:
    """One pruned matrix: `weights` entries, of which `zeros` are zero now; `asked` is the sparsity aimed at.

    A matrix that structured pruning left nothing of has no weights and an `achieved` of 0.
    """

    name: str
    weights: int
    zeros: int
    asked: float

    @property
    def achieved(self) -> float:
        return self.zeros / self.weights if self.weights else 0.0

    @classmethod
    def of(cls, name: str, linear: Matrix, asked: float) -> Projection:
        weight = linear.weight
        return cls(name, weight.numel(), weight.numel() - int(weight.count_nonzero()), asked)


@dataclass(frozen=True)
class Widths:
    """How many units a decoder block has."""

    heads: int
    kv_heads: int
    channels: int


@dataclass(frozen=True)
class Size:
    """Parameters of the whole model, tied ones once, and of its decoder blocks."""

    model: int
    decoder: int

    @classmethod
    def of(cls, model: nn.Module) -> Size:
        decoder = (p.numel() for block in anatomy.blocks(model) for p in block.module.parameters())
        return cls(sum(p.numel() for p in model.parameters()), sum(decoder))

    def times(self, share: float | int) -> Size:
        return Size(round(share * self.model), round(share * self.decoder))

    def less(self, other: Size) -> Size:
        return Size(self.model - other.model, self.decoder - other.decoder)

    def shares_of(self, whole: Size) -> dict[str, float]:
        return {"decoder": self.decoder / whole.decoder, "model": self.model / whole.model}


@dataclass(frozen=True)
class State:
    """The size of a model and the widths of its parts; `hidden_size` is that of the residual stream, in channels."""

    size: Size
    blocks: list[Widths]
    hidden_size: int

    @classmethod
    def of(cls, model: Any) -> State:
        blocks = [Widths(block.heads, block.kv_heads, block.channels) for block in anatomy.blocks(model)]
        return cls(Size.of(model), blocks, model.config.hidden_size)


@dataclass(frozen=True)
class Structure:
    """What structured pruning left: of a masked model, what cutting it would leave.

    `asked` are the parameters that were to go, `setting` says so in words, and `rounding` are those of the whole model
    that stayed because of `round_to`.
    """

    setting: str
    asked: Size
    rounding: int
    before: State
    after: State

    @property
    def asked_shares(self) -> dict[str, float]:
        return self.asked.shares_of(self.before.size)

    @property
    def achieved_shares(self) -> dict[str, float]:
        return self.before.size.less(self.after.size).shares_of(self.before.size)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "asked_shares": self.asked_shares, "achieved_shares": self.achieved_shares}

    def __str__(self) -> str:
        asked, achieved = self.asked_shares, self.achieved_shares
        told = f"{self.setting}: {self.before.size.model:,} parameters to {self.after.size.model:,}; " + ", ".join(
            f"{achieved[of]:.2%} of the {name} (requested {asked[of]:.2%})"
            for of, name in (("decoder", "decoder blocks"), ("model", "model"))
        )
        return told + (f"; {self.rounding:,} kept to round widths" if self.rounding else "")


@dataclass
class Report:
    """`seconds` by stage; sparsities are shares of the weights of the decoder blocks' linear layers.

    Structured methods fill in `structure`; their `achieved` is the share of the decoder blocks' parameters.
    `reconstruction` has each block's mean squared error before and after it was rebuilt, if it was.  `without_tokens`
    names the matrices of experts that no calibration token reached, which were pruned by magnitude.
    """

    method: str
    asked: float
    projections: list[Projection] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    structure: Structure | None = None
    reconstruction: list[dict[str, Any]] = field(default_factory=list)
    without_tokens: list[str] = field(default_factory=list)

    @property
    def achieved(self) -> float:
        if self.structure:
            return self.structure.achieved_shares["decoder"]
        weights = sum(p.weights for p in self.projections)
        return sum(p.zeros for p in self.projections) / weights if weights else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        projections = [{**asdict(p), "achieved": p.achieved} for p in self.projections]
        structure = self.structure.to_dict() if self.structure else None
        told = {**asdict(self), "achieved": self.achieved, "projections": projections, "structure": structure}
        return told if self.without_tokens else {k: v for k, v in told.items() if k != "without_tokens"}

    def __str__(self) -> str:
        seconds = ", ".join(f"{stage} {value:.1f} s" for stage, value in self.seconds.items())
        if self.structure:
            return f"{self.method}: {self.structure}; {seconds}"
        told = f"{self.method}: sparsity {self.achieved:.4f} (requested {self.asked:.4f}); {seconds}"
        if not self.without_tokens:
            return told
        count, first = len(self.without_tokens), self.without_tokens[0]
        return f"{told}; {count} matrices of experts that no calibration token reached by magnitude, e.g. {first}"
