"""Base of the methods that zero single weights: the fields `sparsity` and `pattern`, and the loop over blocks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pruners import anatomy, calibrate, select
from pruners.anatomy import Block
from pruners.calibrate import PLAIN, Execution, Statistic
from pruners.interface import checks, returned
from pruners.interface.checks import Rule, Share
from pruners.interface.method import Method
from pruners.lazy import Bool, Float, Int, Tensor, nn
from pruners.run.matrices import Matrix
from pruners.run.report import Projection, Report
from pruners.run.statistic import is_finite
from pruners.select import Pattern
from pruners.weights import homes


@dataclass(frozen=True)
class Unstructured(Method):
    """Zeroes single weights of the linear layers inside decoder blocks; everything else stays bit for bit.

    `sparsity` is the share removed (default 0.5, or what `pattern` implies); `pattern` "n:m" keeps n of every m
    consecutive inputs of a row.  ValueError where the two disagree or lie out of range.
    Routed experts are matrices like others, with the statistics of the tokens routed to them; one that no calibration
    token reaches loses its smallest weights, and the report says so.
    """

    sparsity: Share | None = None
    pattern: Annotated[str, Rule("n:m as text, such as '2:4'", (str,))] | None = None

    NEEDS: ClassVar[type[Statistic] | None] = None

    def __post_init__(self) -> None:
        checks.fields(self)
        object.__setattr__(self, "sparsity", select.agreed_sparsity(self.sparsity, self.pattern))

    @property
    def needs_windows(self) -> bool:
        return self.NEEDS is not None or self.statistics_key is not None

    @property
    def walks(self) -> bool:
        """Whether windows go through the model block by block."""
        return self.NEEDS is not None

    def score(self, name: str, weight: Float[Tensor, "out inp"], x: Any, dense: Mapping[str, Tensor]) -> Tensor:
        """How much each weight of projection `name` matters [out, inp]; `x` is what NEEDS saw of its inputs.

        A new tensor: of float32 `weight.float()` is the weight itself.
        """
        raise TypeError(f"{type(self).__name__} does not implement score().")

    def gone(self, score: Float[Tensor, "out inp"]) -> Bool[Tensor, "out inp"]:
        """What the scores condemn: within rows, or by the pattern."""
        if self.pattern:
            return select.n_of_m(score, Pattern.parse(self.pattern))
        return select.per_row(score, self.asked)

    @property
    def asked(self) -> float:
        assert self.sparsity is not None  # __post_init__ has filled it in
        return self.sparsity

    def remove(self, linears: Mapping[str, Matrix], x: Any, dense: Mapping[str, Tensor]) -> None:
        """Prune, in place, projections that share the input `x`, given by full name."""
        for name, linear in linears.items():
            weight = linear.weight.data
            with returned.read_only(self, name, weight, x):
                score = returned.score(self, name, self.score(name, weight, x, dense), weight)
                gone = returned.mask(self, name, self.gone(score), weight)
            weight.masked_fill_(gone, 0)

    def prune(
        self,
        model: nn.Module,
        windows: Int[Tensor, "count length"] | None,
        dense: Mapping[str, Tensor],
        how: Execution = PLAIN,
    ) -> Report:
        """Prune in place; `dense` is what `gather` returned.  Matrices are refused before the first is pruned.

        ValueError where the method's own `score`, `gone` or `remove` returns or leaves what is of no use.
        """
        report = Report(repr(self), self.asked)
        started = time.perf_counter()
        blocks = anatomy.blocks(model)
        disk = homes.on_disk(model)
        for block in () if disk else blocks:  # from a disk each weight is read once, and nothing has changed there
            with homes.held(block.module):
                refuse_non_finite(block)

        def finished(block: Block) -> None:
            report.projections += [
                Projection.of(f"{block.name}.{name}", linear, self.asked) for name, linear in block.linears().items()
            ]

        for block, seen in self._walk(model, windows, how, finished):
            if disk:
                refuse_non_finite(block)
            for names in block.shared_inputs:
                together = {f"{block.name}.{name}": block.linear(name) for name in names}
                x = seen.get(names[0])
                if names in block.expert_groups and self._unreached(together, x, dense):
                    report.without_tokens += together
                    self._by_magnitude(together)
                elif type(self).remove is Unstructured.remove:
                    self.remove(together, x, dense)
                else:
                    with returned.in_place(self, together):
                        self.remove(together, x, dense)
            how.report(block, len(blocks))
        report.seconds["prune"] = time.perf_counter() - started
        return report

    def _unreached(self, linears: Mapping[str, Matrix], x: Any, dense: Mapping[str, Tensor]) -> bool:
        """Whether no calibration token was routed to the expert whose matrices these are."""
        if self.NEEDS is not None:
            return x is None
        return self.needs_windows and not any(dense[name].any() for name in linears)

    def _by_magnitude(self, linears: Mapping[str, Matrix]) -> None:
        for name, linear in linears.items():
            weight = linear.weight.data
            weight.masked_fill_(returned.mask(self, name, self.gone(weight.float().abs()), weight), 0)

    def _walk(
        self, model: nn.Module, windows: Tensor | None, how: Execution, finished: Callable[[Block], None]
    ) -> Iterator[tuple[Block, Mapping[str, Any]]]:
        if windows is None or not (self.walks or how.keeper.rebuild_batch):
            return _one_by_one(model, finished)
        return calibrate.walk(model, windows, self.NEEDS, how, keeper=how.keeper, finished=finished)

    def check_widths(self, blocks: list[Block]) -> None:
        """ValueError for a matrix whose rows the pattern does not divide."""
        if self.pattern is None:
            return
        pattern = Pattern.parse(self.pattern)
        for block in blocks:
            for name, linear in block.linears().items():
                if linear.in_features % pattern.m:
                    raise ValueError(
                        f"{pattern} needs rows of a multiple of {pattern.m} weights; {block.name}.{name} has "
                        f"{linear.in_features}. Use unstructured sparsity, or a pattern that divides the width."
                    )


def _one_by_one(model: nn.Module, finished: Callable[[Block], None]) -> Iterator[tuple[Block, Mapping[str, Any]]]:
    for block in anatomy.blocks(model):
        with homes.held(block.module, changes=True):
            yield block, {}
            finished(block)


def refuse_non_finite(block: Block) -> None:
    """ValueError, naming the first matrix of the block that holds NaN or inf."""
    for name, linear in block.linears().items():
        if not linear.weight.is_meta and not is_finite(linear.weight):
            raise ValueError(
                f"{block.name}.{name}.weight holds NaN or inf, so it cannot be pruned. Check the checkpoint."
            )
