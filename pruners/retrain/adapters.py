"""Low-rank adapters for pruned matrices: what is trained beside W, and what remains of it once merged.

    M = 1[W survives]     B: out x rank     A: rank x inp     s = alpha / rank

    LoRA       trains  W + s BA         merges into  W + s BA         the pruned weights come back
    LoRA-Prune trains  W + s BA         merges into  W + s (BA . M)   what BA put on pruned weights is lost
    ScaleLoRA  trains  W . BA           merges into  W . BA           exact; BA starts as all ones
    MaskLoRA   trains  W + s (BA . M)   merges into  W + s (BA . M)   exact

Zimmer et al. 2023, arXiv:2312.15230 (LoRA: Hu et al. 2021, arXiv:2106.09685).  A starts uniform within
1/sqrt(inp), B at zero; ScaleLoRA starts with both at 1/sqrt(rank).  These are the released code's formulas
and ranges; A is drawn by seed and name, not from the global generator, so that a projection starts alike whatever else
is trained.  Plain LoRA has LLM-Pruner's defaults, rank 8, alpha 16 and dropout 0.05; PERP's are 16, 32 and 0.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from pruners.interface import checks
from pruners.interface.checks import Flag, Positive, Probability, Texts, Whole
from pruners.lazy import Float, Tensor, nn, no_grad, torch
from pruners.retrain.masks import BitMask


@dataclass
class Adapter:
    """One matrix's adapter: `module` stands in the place of `linear`, and a, b are trained."""

    name: str
    kind: Any
    module: nn.Module
    linear: nn.Linear
    mask: BitMask
    a: nn.Parameter
    b: nn.Parameter

    @property
    def on_head(self) -> bool:
        """Whether it sits on the output matrix, which is never pruned, and not in a decoder block."""
        return self.name == "head"

    @no_grad
    def merge(self) -> None:
        """Put what was learned into the linear's weight; raises AssertionError if a pruned weight came back."""
        weight = self.linear.weight
        product = self.b.float() @ self.a.float()
        weight.data = self.kind.merged(product, weight.data.float(), self.mask).to(weight.dtype)
        if self.kind.keeps_sparsity:
            self.mask.check(self.name, weight)

    @no_grad
    def dropped(self) -> tuple[float, float]:
        """Squared size of what the merge will lose of s BA, and of s BA."""
        product = self.b.float() @ self.a.float()
        return float(product[self.mask.gone()].square().sum()), float(product.square().sum())


@dataclass(frozen=True)
class LowRank:
    """`targets` names projections (`q_proj`, `fc1`, ...; None: every linear layer of the decoder blocks)."""

    rank: Whole = 16
    targets: Texts | None = None

    keeps_sparsity: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.rank < 1:
            raise ValueError(f"rank is a positive integer; got {self.rank}.")
        if self.targets == ():
            raise ValueError(
                "targets=() selects no projection; leave adapters= out, or leave targets= out for all projections."
            )

    def attach(self, name: str, linear: nn.Linear, mask: BitMask, seed: int) -> Adapter:
        """An adapter for `linear`, not yet in its place; ValueError where the rank exceeds the matrix."""
        self.check(name, linear)
        module, a, b = self.make(linear, mask)
        module.train(linear.training)
        with torch.no_grad():
            self.start(a, b, name, seed)
        return Adapter(name, self, module, linear, mask, a, b)

    def check(self, name: str, linear: nn.Linear) -> None:
        """ValueError where the rank exceeds the matrix."""
        smallest = min(linear.weight.shape)
        if self.rank > smallest:
            raise ValueError(
                f"Rank {self.rank} is larger than {name}, which is {linear.out_features} x {linear.in_features}; "
                f"use {smallest} or less, or leave this projection out with targets=."
            )

    def make(self, linear: nn.Linear, mask: BitMask) -> tuple[nn.Module, nn.Parameter, nn.Parameter]:
        from pruners.retrain.fused import FusedLinear

        module = FusedLinear(linear, self.rank, self, mask)
        return module, module.a, module.b

    def start(self, a: Tensor, b: Tensor, name: str, seed: int) -> None:
        if a.is_meta:  # parameters are only counted
            return
        mixed = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(mixed[:7], "big"))
        a.copy_((torch.rand(a.shape, generator=generator) * 2 - 1) / math.sqrt(a.shape[1]))
        b.zero_()


@dataclass(frozen=True)
class MaskLoRA(LowRank):
    alpha: Positive = 32

    def merged(
        self, product: Float[Tensor, "out inp"], weight: Float[Tensor, "out inp"], mask: BitMask
    ) -> Float[Tensor, "out inp"]:
        return mask.apply(product.mul_(self.alpha / self.rank)).add_(weight)

    def to_product(
        self, gradient: Float[Tensor, "out inp"], weight: Float[Tensor, "out inp"], mask: BitMask
    ) -> Float[Tensor, "out inp"]:
        """The gradient of BA from that of the merged weight, in place."""
        return mask.apply(gradient.mul_(self.alpha / self.rank))


@dataclass(frozen=True)
class ScaleLoRA(LowRank):
    def start(self, a: Tensor, b: Tensor, name: str, seed: int) -> None:
        a.fill_(1 / math.sqrt(self.rank))
        b.fill_(1 / math.sqrt(self.rank))

    def merged(
        self, product: Float[Tensor, "out inp"], weight: Float[Tensor, "out inp"], mask: BitMask
    ) -> Float[Tensor, "out inp"]:
        return product.mul_(weight)

    def to_product(
        self, gradient: Float[Tensor, "out inp"], weight: Float[Tensor, "out inp"], mask: BitMask
    ) -> Float[Tensor, "out inp"]:
        """The gradient of BA from that of the merged weight, in place."""
        return gradient.mul_(weight)


@dataclass(frozen=True)
class LoRA(LowRank):
    """Plain LoRA, by `peft`.  It stays beside its matrix unless `merge`: merging fills what was pruned."""

    rank: Whole = 8
    alpha: Positive = 16
    dropout: Probability = 0.05
    merge: Flag = False

    keeps_sparsity: ClassVar[bool] = False

    def make(self, linear: nn.Linear, mask: BitMask) -> tuple[nn.Module, nn.Parameter, nn.Parameter]:
        return _by_peft(linear, self.rank, self.alpha, self.dropout)

    def merged(
        self, product: Float[Tensor, "out inp"], weight: Float[Tensor, "out inp"], mask: BitMask
    ) -> Float[Tensor, "out inp"]:
        return product.mul_(self.alpha / self.rank).add_(weight)


@dataclass(frozen=True)
class LoRAPrune(LowRank):
    alpha: Positive = 32

    def make(self, linear: nn.Linear, mask: BitMask) -> tuple[nn.Module, nn.Parameter, nn.Parameter]:
        return _by_peft(linear, self.rank, self.alpha, dropout=0.0)

    def merged(
        self, product: Float[Tensor, "out inp"], weight: Float[Tensor, "out inp"], mask: BitMask
    ) -> Float[Tensor, "out inp"]:
        return mask.apply(product.mul_(self.alpha / self.rank)).add_(weight)


def _by_peft(
    linear: nn.Linear, rank: int, alpha: float, dropout: float
) -> tuple[nn.Module, nn.Parameter, nn.Parameter]:
    holder = nn.ModuleDict({"linear": linear})
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=["linear"])  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator; its values are replaced
        inject_adapter_in_model(config, holder)
    module: Any = holder["linear"]
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    for parameter in (a, b):
        parameter.data = parameter.data.float()
    return module, a, b
