"""What every pruning method says of itself before it runs; a method overrides what does not hold for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from pruners.calibrate import PLAIN, Execution
from pruners.lazy import Int, Tensor, nn


class Method:
    """The base of `Unstructured` and `Structured`."""

    statistics_key: ClassVar[Any] = (
        None  # equal for settings that share what `gather` returns; None where there is none
    )

    @property
    def walks(self) -> bool:
        """Whether windows go through the model block by block."""
        return False

    @property
    def needs_all_weights(self) -> bool:
        """Whether all weights of the model must be on the device at once, so that none can be offloaded."""
        return False

    @property
    def reads_weights(self) -> bool:
        """Whether it matters what the weights are."""
        return True

    def statistics_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what `gather` returns."""
        return {}

    def gather(
        self, model: nn.Module, windows: Int[Tensor, "count length"], how: Execution = PLAIN
    ) -> Mapping[str, Tensor]:
        """Statistics of the dense model by name, which other settings of the method share; most methods have none."""
        return {}
