"""What a method gathers of a model, stored where the model's weights are: on the device, in CPU memory or on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pruners.lazy import Tensor, nn
from pruners.weights import homes, memory, storage
from pruners.weights.shards import Shards


class Aside:
    """Tensors of a model by name, added part by part; `kind` names them."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        disk = homes.on_disk(model)
        self._away = homes.of(model) is not None
        self._folder = disk.folder / kind if disk else None
        self._tensors: dict[str, Tensor] = {}
        self._files: list[Path] = []

    def add(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        if self._folder is None:
            self._tensors |= {name: tensor.cpu() if self._away else tensor for name, tensor in tensors.items()}
        elif tensors:
            self._files.append(self._folder / f"{part}.safetensors")
            storage.write_tensors(self._files[-1], tensors, {}, flushed=False)

    def all(self) -> Mapping[str, Tensor]:
        """Of a model at home on the disk each tensor is read when it is asked for."""
        return self._tensors if self._folder is None else Shards(self._files)


def put(model: nn.Module, tensor: Tensor) -> Tensor:
    """A copy out of the device's way, in memory or on the disk; the tensor itself where the weights are in place."""
    if homes.of(model) is None:
        return tensor
    disk = homes.on_disk(model)
    return memory.roomy(tuple(tensor.shape), tensor.dtype, disk.folder if disk else None).copy_(tensor)
