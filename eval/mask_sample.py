"""Which weights two pruned models both keep, told by what each keeps at the same places.

A mask has as many bits as a model has weights, too many for a record; of some ten thousand places, the same in every
model of one shape, two records tell their agreement to a third of a per cent or better.  Where units were cut out, the
places are the units: the rows of what makes queries, keys and values and of gate and up (fc1), known by their weights,
which cutting leaves as they were and in their order.  A block that is gone has kept none: only last ones are dropped,
so that the others have their names still.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from eval.matrices import decoder_matrices
from pruners import anatomy
from pruners.interface import checks
from pruners.interface.checks import Count
from pruners.weights import homes

Dense = Mapping[str, Sequence[bytes]]  # by matrix, the digests of its rows
DIGEST_BYTES = 16


def rows(model: nn.Module) -> dict[str, list[bytes]]:
    """By what the rows of these matrices of the dense model are known; ValueError for an unknown family."""
    return {name: _digests(weight) for name, weight in _inward(model)}


@checks.arguments
def mask_sample(model: nn.Module, count: Count, dense: Any = None) -> dict[str, Any]:
    """`bits`, what is kept at `count` places drawn once and for all (all places where there are fewer), one bit each
    in base64; `sampled`, how many there are, of `places`; `kept`, the share of all places; `sha256` of all of them.

    `dense`, what `rows` gave of the model before it was cut, makes the places units.  ValueError where what is left are
    not rows of the dense model in its order.
    """
    parts = list(_weights(model) if dense is None else _units(model, dense))
    sizes = [part.size for part in parts]
    places = sum(sizes)
    drawn = np.unique(np.random.default_rng(0).integers(places, size=count)) if count < places else np.arange(places)
    starts = np.cumsum([0, *sizes])
    whole = hashlib.sha256()
    bits = []
    for part, start, end in zip(parts, starts[:-1], starts[1:], strict=True):
        whole.update(np.packbits(part).tobytes())
        bits.append(part[drawn[(drawn >= start) & (drawn < end)] - start])
    return {
        "bits": base64.b64encode(np.packbits(np.concatenate(bits)).tobytes()).decode(),
        "sampled": len(drawn),
        "places": places,
        "kept": float(sum(int(part.sum()) for part in parts) / places),
        "sha256": whole.hexdigest(),
    }


def agreement(one: Mapping[str, Any], other: Mapping[str, Any]) -> float | None:
    """The share of the places at which both keep, or both remove; None where their places are not the same."""
    if any(one[name] != other[name] for name in ("sampled", "places")):
        return None
    if one["sha256"] == other["sha256"]:
        return 1.0
    first, second = (np.unpackbits(np.frombuffer(base64.b64decode(it["bits"]), np.uint8)) for it in (one, other))
    return float((first == second)[: one["sampled"]].mean())


def _weights(model: nn.Module) -> Iterator[np.ndarray]:
    for _, _, weight in decoder_matrices(model):
        yield (weight != 0).flatten().cpu().numpy()


def _units(model: nn.Module, dense: Dense) -> Iterator[np.ndarray]:
    left = {name: _digests(weight) for name, weight in _inward(model)}
    if strange := sorted(left.keys() - dense.keys()):
        raise ValueError(f"{strange[0]} is not in the dense model, so what was cut is unknown.")
    for name, known in dense.items():
        yield _kept(name, known, left.get(name, []))


def _kept(name: str, known: Sequence[bytes], left: Sequence[bytes]) -> np.ndarray:
    """Which rows were kept; of equal ones, which nothing tells apart, as many as are left, the first that fit."""
    kept = np.zeros(len(known), dtype=bool)
    following = iter(enumerate(known))
    for row in left:
        place = next((place for place, one in following if one == row), None)
        if place is None:
            raise ValueError(f"The rows of {name} are not the dense model's, so what was cut is unknown.")
        kept[place] = True
    return kept


def _inward(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The matrices that read the residual stream, one block in place at a time."""
    for block in anatomy.blocks(model):
        with homes.held(block.module):
            for name in (*block.family.qkv, *block.family.inward):
                yield f"{block.name}.{name}", block.linear(name).weight.detach()


def _digests(weight: Tensor) -> list[bytes]:
    lines = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
    return [hashlib.blake2b(line.tobytes(), digest_size=DIGEST_BYTES).digest() for line in lines]
