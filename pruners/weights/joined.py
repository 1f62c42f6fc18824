"""Parameters that are joined of several tensors of a checkpoint, such as those of all experts of a block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pruners.lazy import Tensor, torch
from pruners.weights.shards import Tensors


@dataclass(frozen=True)
class Join:
    """Parts side by side along `dim`, each of so many `sizes` of it; None: one each, without that dimension.

    A part is the name of a tensor in the files, or joined itself.
    """

    parts: tuple[str | Join, ...]
    dim: int
    sizes: tuple[int, ...] | None
    shape: torch.Size
    dtype: torch.dtype

    def places(self, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The tensors of the files by name, and the view of `whole` that each fills."""
        views = whole.unbind(self.dim) if self.sizes is None else whole.split(self.sizes, self.dim)
        for part, view in zip(self.parts, views, strict=True):
            if isinstance(part, str):
                yield part, view
            else:
                yield from part.places(view)


def read(tensors: Tensors, stored: str | Join, device: torch.device | None = None) -> Tensor:
    """A tensor as it is stored, or joined of its parts on `device` (the CPU), in the type that the model has it in.

    Parts go straight to their places, one after the other, so that one of them is in memory beside the whole.
    """
    if isinstance(stored, str):
        return tensors[stored]
    whole = torch.empty(stored.shape, dtype=stored.dtype, device=device)
    for name, place in stored.places(whole):
        part = tensors[name]
        place.copy_(part.pin_memory() if whole.is_cuda else part, non_blocking=True)
    return whole
