"""GBLM-Pruner: Wanda's score plus the weight times the magnitude of its gradients over the calibration windows.

    S[o, i] = |W[o, i]| * (||x_i|| / sqrt(N) + alpha * G[o, i])        Das et al. 2023, arXiv:2311.04902
    G[o, i] = sum_n |g_n[o, i]|  (l1)   or   sqrt(sum_n g_n[o, i]^2)  (l2)

g_n is the gradient of the mean next-token loss of window n on the dense model.  G is not divided by the number of
windows N: it grows with N (l1) or sqrt(N) (l2) while the activation term does not, so alpha = 100 holds for the
papers' N = 128; for another N, alpha * 128 / N (l1) or alpha * sqrt(128 / N) (l2) keeps the balance.

Departures of the released code: gradients in float16 without loss scaling and l1 accumulated in float16 (here float32
or better, scaled), its l2 kept in float16 after the root; model.train() during the gradient pass, which drops out
activations of OPT (here off).  Its `--gradient_inv`, which divides by G + 1e-8 and which no table uses, is not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pruners import anatomy
from pruners.anatomy import Block
from pruners.calibrate import PLAIN, Execution, InputNorm, Progress
from pruners.interface import checks
from pruners.interface.checks import Finite
from pruners.lazy import Float, Int, Tensor, nn, torch
from pruners.run import gradients, matrices, ranks
from pruners.unstructured import Unstructured
from pruners.weights.aside import Aside


def score(
    weight: Float[Tensor, "out inp"], x: InputNorm, gradient: Float[Tensor, "out inp"], alpha: float
) -> Float[Tensor, "out inp"]:
    return weight.float().abs() * (x.norm / math.sqrt(x.windows) + alpha * gradient)


def gradient_norms(
    model: nn.Module,
    windows: Int[Tensor, "count length"],
    norm: str,
    *,
    checkpointing: bool = False,
    progress: Progress | None = None,
) -> Mapping[str, Float[Tensor, "out inp"]]:
    """G of every projection in float32, by full name; memory is the weights, G and one gradient.

    Of a model whose weights are away from home G lies there, too, and one block's is on the device at a time.
    The ranks of a launch share the windows; G is the same on all, to the bit that of one process.
    """
    blocks = anatomy.blocks(model)
    weights = {f"{b.name}.{name}": p for b in blocks for name, p in map(b.parameter, b.linears())}
    sums: dict[str, Tensor] = {}
    kept = Aside(model, "gradient_norms")

    def add(name: str, gradient: Tensor, scale: float) -> None:
        """In float32 whatever the gradient's dtype; `scale` is a power of two, so that it rounds nothing."""
        if name not in sums:
            sums[name] = torch.zeros_like(gradient, dtype=torch.float32)
        if norm == "l1":
            sums[name].add_(gradient.abs_(), alpha=1 / scale)
        else:
            sums[name].addcmul_(gradient, gradient, value=1 / scale**2)

    def left(block: Block) -> None:
        found = {}
        for name, parameter in dict(map(block.parameter, block.linears())).items():  # experts share one
            total = sums.pop(f"{block.name}.{name}", None)
            if total is None:  # of experts that no token has reached, all in one parameter
                total = torch.zeros_like(parameter, dtype=torch.float32)
            found[name] = total.sqrt_() if norm == "l2" else total
        kept.add(
            block.name,
            {
                f"{block.name}.{name}": matrices.view(linear, found[block.parameter(name)[0]])
                for name, linear in block.linears().items()
            },
        )

    together = ranks.here(next(model.parameters()).device)
    gradients.backward(
        model, windows, weights, add, checkpointing=checkpointing, progress=progress, left=left, together=together
    )
    return kept.all()


@dataclass(frozen=True)
class Gradient(Unstructured):
    """|W| * G alone, the paper's ablation; within rows."""

    norm: str = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"norm is 'l1' or 'l2'; got {checks.shown(self.norm)}.")

    @property
    def statistics_key(self) -> dict[str, str]:
        return {"kind": "gradient_norms", "norm": self.norm}

    def statistics_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {
            f"{block.name}.{name}": tuple(linear.weight.shape)
            for block in anatomy.blocks(model)
            for name, linear in block.linears().items()
        }

    def gather(self, model: nn.Module, windows: Tensor, how: Execution = PLAIN) -> Mapping[str, Tensor]:
        """One window a backward pass, whatever batches others work in."""
        return gradient_norms(model, windows, self.norm, progress=how.progress)

    def score(self, name: str, weight: Tensor, x: Any, dense: Mapping[str, Tensor]) -> Tensor:
        return weight.float().abs() * dense[name].to(weight.device)


@dataclass(frozen=True)
class GBLM(Gradient):
    norm: str = "l1"
    alpha: Finite = 100.0

    NEEDS = InputNorm

    def score(self, name: str, weight: Tensor, x: InputNorm, dense: Mapping[str, Tensor]) -> Tensor:
        return score(weight, x, dense[name].to(weight.device), self.alpha)
