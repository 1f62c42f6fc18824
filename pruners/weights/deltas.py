"""Weights that were published as a difference to another model's: base + delta, each tensor summed when it is read.

    weights = deltas.Sum(deltas.opened(llama), deltas.opened(vicuna_delta))
    model = opening.brought(vicuna_delta, weights, device="cuda")

FastChat's `apply_delta` for the first version of Vicuna: the base gets a row of zeros for each token that the delta
adds to the vocabulary, and all of it is summed in float16, the type of the delta.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pruners.lazy import Tensor, torch
from pruners.weights.shards import Shards, Tensors

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
COMPUTED = "rotary_emb.inv_freq"  # a buffer that older checkpoints hold and no model reads


def files(folder: Path) -> list[Path]:
    """The weight files of one half, safetensors where there are any, otherwise those of torch.save.

    ValueError where there is neither, FileNotFoundError for one that an index names and that is not there.
    """
    from pruners.modeling_pruned import check_shards, indexed  # which loads torch

    check_shards(folder)
    named = [folder / name for name in indexed(folder)]
    if named and all(path.is_file() for path in named):
        return named
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if pickled := _pickled(folder):
        return pickled
    raise ValueError(f"{folder} has no weights, neither model.safetensors nor {PICKLED} nor the files of an index.")


def opened(folder: Path) -> Tensors:
    """The tensors of the files that `files` names."""
    found = files(folder)
    return Shards(found) if found[0].suffix == ".safetensors" else Pickled(found)


def _pickled(folder: Path) -> list[Path]:
    index = folder / PICKLED_INDEX
    if not index.is_file():
        return [path for path in (folder / PICKLED,) if path.is_file()]
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} does not say which file holds which weight; copy it there again.") from error
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(errno.ENOENT, f"{os.strerror(errno.ENOENT)}: copy it there", str(folder / name))
    return [folder / name for name in names]


class Pickled(Mapping[str, Tensor]):
    """The tensors of files of torch.save, mapped into memory; a file that holds anything but tensors is refused unread.

    Raises ValueError for such a file and for a damaged one.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.bytes_read = 0
        self._tensors: dict[str, Tensor] = {}
        for path in files:
            found = _tensors(path)
            if wrong := [name for name, tensor in found.items() if not isinstance(tensor, Tensor)]:
                raise ValueError(f"{path} holds something else than tensors, {wrong[0]!r}; only weights are read.")
            self._tensors |= found

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name].clone()  # as whoever reads it may change it
        self.bytes_read += tensor.nbytes
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __contains__(self, name: object) -> bool:  # a Mapping would read it
        return name in self._tensors

    def __len__(self) -> int:
        return len(self._tensors)

    def empty(self, name: str) -> Tensor:
        return torch.empty_like(self._tensors[name], device="meta")


def _tensors(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} could run code and is not read: it holds more than tensors. Save its weights as safetensors."
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"The weights in {path} are damaged, or of an old format of torch.save; save them as safetensors."
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no weights by name; save them as safetensors.")
    return found


class Sum(Mapping[str, Tensor]):
    """base + delta by name, of the type of the delta; rows that the delta has beyond the base's vocabulary are its own.

    `rows` are the tokens of the base and of the delta.  Raises ValueError where one has a tensor that the other lacks,
    or of another shape.
    """

    def __init__(self, base: Tensors, delta: Tensors, rows: tuple[int, int], called: tuple[str, str]) -> None:
        self.base, self.delta = base, delta
        self._names = dict.fromkeys(name for name in delta if not name.endswith(COMPUTED))
        halves = f"{called[1]} is no difference to {called[0]}"
        there = {name for name in base if not name.endswith(COMPUTED)}
        if alone := sorted(there.symmetric_difference(self._names)):
            which = called[0] if alone[0] in there else called[1]
            raise ValueError(f"{halves}: only {which} has {alone[0]} ({len(alone)} such tensors); name its own base.")
        for name in self._names:
            one, other = tuple(base.empty(name).shape), tuple(delta.empty(name).shape)
            added = rows[0] < rows[1] and (one[:1], other[:1]) == ((rows[0],), (rows[1],)) and one[1:] == other[1:]
            if one != other and not added:
                raise ValueError(f"{halves}: {name} is {list(other)} and in the base {list(one)}; name its own base.")

    @property
    def bytes_read(self) -> int:
        return self.base.bytes_read + self.delta.bytes_read

    def __getitem__(self, name: str) -> Tensor:
        found = self.delta[name]
        base = self.base[name].to(found.dtype)
        if base.shape == found.shape:
            return found.add_(base)
        found[: len(base)] += base
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __len__(self) -> int:
        return len(self._names)

    def empty(self, name: str) -> Tensor:
        return self.delta.empty(name)
