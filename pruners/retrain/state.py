"""The state of a retraining as a safetensors file: trained tensors, AdamW's moments, step and losses.

Ranks that share the tensors leave files of rows beside it, one each, which it names; any number of ranks goes on from
them.  (torch.distributed.checkpoint would keep what is where in a pickle, and no checksum.)

No pickle, so a checkpoint can be shared; nothing frozen, so it is small; written beside its place and renamed, so it
is whole; under a checksum that covers all of it and its name, so a damaged one is begun anew.
"""

from __future__ import annotations

import glob
import hashlib
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pruners.lazy import Tensor, nn, torch
from pruners.run.ranks import Ranks
from pruners.weights import homes, storage

MOMENTS = ("exp_avg", "exp_avg_sq")
BITS = {1: "int8", 2: "int16", 4: "int32", 8: "int64"}
CHUNK = 2**20  # of a tensor whose bits are summed up at once: four numbers of 8 bytes each
logger = logging.getLogger(__name__)


class OtherRunError(ValueError):
    """A state belongs to a run of another model, other data or settings."""


@dataclass(frozen=True)
class Rows:
    """Rows of every tensor: part `part` of `parts` equal ones, of which the last are shorter, as FSDP2 deals them."""

    part: int = 0
    parts: int = 1

    def span(self, length: int) -> tuple[int, int]:
        """The first row and the one behind the last, of a tensor with so many."""
        each = -(-length // self.parts)
        return min(self.part * each, length), min((self.part + 1) * each, length)


def fingerprint(model: nn.Module, *settings: object) -> str:
    """Of the settings' reprs and of every parameter's bits, summed up plainly and weighted by their places."""
    found = {name: (list(p.shape), _sums(p.detach())) for part in homes.each(model) for name, p in part.items()}
    sums = [(name, *found[name]) for name, _ in model.named_parameters()]
    return hashlib.sha256(repr((settings, sums)).encode()).hexdigest()


def _sums(tensor: Tensor) -> tuple[int, int]:
    """Modulo 2^64."""
    plain, weighted = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for index, chunk in enumerate(tensor.contiguous().view(-1).split(CHUNK)):
        bits = chunk.view(getattr(torch, BITS[chunk.element_size()])).long()
        places = torch.arange(1, len(bits) + 1, device=bits.device) + index * CHUNK
        plain, weighted = plain + bits.sum(), weighted + (bits * places).sum()
    return int(plain) % 2**64, int(weighted) % 2**64


def save(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bool:
    """Whole or not at all; `about` is plain JSON.  False, and one warning, where the disk refuses: work can go on."""
    kept = _written(path, tensors, about)
    _tidy(path, about.get("parts", []) if kept else None)
    return kept


def save_rows(
    path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any], ranks: Ranks, lengths: Mapping[str, int]
) -> bool:
    """Every rank its rows of tensors that have so many in all; the file at `path` names them once all are there."""
    step = about["step"]
    names = [f"{path.stem}.{step}.{rank + 1}-of-{ranks.count}{path.suffix}" for rank in range(ranks.count)]
    part = path.with_name(names[ranks.rank])
    told = {"fingerprint": about["fingerprint"], "step": step, "part": ranks.rank, "parts": ranks.count}
    if ranks.any(not _written(part, tensors, {**told, "lengths": dict(lengths)})):
        storage.remove(part)
        return False
    return ranks.first(lambda: save(path, {}, {**about, "parts": names}))


def _written(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bool:
    try:
        for leftover in storage.leftovers(path.parent, path.name):  # of a killed writer: a run has its folder to itself
            storage.remove(leftover)
        storage.write_tensors(path, tensors, {**about, "name": path.name})
    except storage.StorageError as error:
        logger.warning("%s The state for resuming is not saved.", error)
        return False
    return True


def _tidy(path: Path, used: Sequence[str] | None) -> None:
    """Remove files of rows that the one at `path` does not name; None: as what it says itself."""
    if used is None:
        try:
            used = storage.read_about(path).get("parts", [])
        except (storage.DamagedError, OSError):
            used = []
    for other in path.parent.glob(f"{glob.escape(path.stem)}.*-of-*{path.suffix}"):
        if other.name not in used:
            storage.remove(other)


def load(
    path: Path, mark: str, ranks: Ranks | None = None, rows: Rows | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Those rows of every tensor, by default all; None where there is nothing, or nothing that can be trusted on every
    one of the ranks, which is reported.

    Raises OtherRunError if the file belongs to a run of another `fingerprint`.
    """
    ranks = ranks or Ranks()
    if not ranks.first(path.exists):
        return None
    found = None
    try:
        found = _read(path, rows or Rows())
    except (storage.DamagedError, OSError) as error:
        logger.warning("Starting over, as %s cannot be used: %s.", path, error)
    if ranks.any(found is None):
        if ranks.rank == 0:
            with suppress(OSError):  # what it says of its step would keep the new state from taking its place
                path.unlink(missing_ok=True)
        ranks.wait()
        return None
    assert found is not None  # on no rank
    _refuse_other(path, found[1], mark)
    return found


def _read(path: Path, rows: Rows) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, about = _named(path)
    if "parts" in about:
        return _joined(path, about, rows), about
    return {name: _cut(tensor, 0, rows.span(len(tensor))) for name, tensor in tensors.items()}, about


def _named(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, about = storage.read_tensors(path)
    if about.get("name") != path.name:
        raise storage.DamagedError(f"it was written as {about.get('name')}")
    return tensors, about


def _joined(path: Path, about: Mapping[str, Any], rows: Rows) -> dict[str, Tensor]:
    """From the files of rows that hold some of these, one after the other."""
    pieces: dict[str, list[Tensor]] = {}
    for name in about["parts"]:
        file = path.with_name(name)
        told = storage.read_about(file)
        if (told["fingerprint"], told["step"]) != (about["fingerprint"], about["step"]):
            raise storage.DamagedError(f"{name} belongs to another state")
        theirs = Rows(told["part"], told["parts"])
        wanted = {key: (*theirs.span(length), *rows.span(length)) for key, length in told["lengths"].items()}
        if pieces and all(min(end, until) <= max(start, at) for start, end, at, until in wanted.values()):
            continue
        tensors, _ = _named(file)
        for key, tensor in tensors.items():
            start, _, at, until = wanted[key]
            pieces.setdefault(key, []).append(_cut(tensor, start, (at, until)))
    return {key: torch.cat(those) for key, those in pieces.items()}


def _cut(tensor: Tensor, start: int, span: tuple[int, int]) -> Tensor:
    """The rows of `span` that are in a tensor whose first row is number `start`."""
    first, end = (min(max(row - start, 0), len(tensor)) for row in span)
    return tensor if end - first == len(tensor) else tensor[first:end].clone()


def refuse_other_at(path: Path, mark: str) -> None:
    """As `load` refuses, from what the file says about itself; what cannot be read is left to `load`."""
    try:
        about = storage.read_about(path)
    except (storage.DamagedError, OSError):
        return
    _refuse_other(path, about, mark)


def _refuse_other(path: Path, about: Mapping[str, Any], mark: str) -> None:
    if about.get("fingerprint") != mark:
        raise OtherRunError(
            f"{path} belongs to another run: its model, data or settings differ from this one's. Choose "
            "another folder, or delete it to start over."
        )


def step_in(path: Path, mark: str) -> int:
    """The step that the state of this fingerprint has reached at `path`; 0 where there is none."""
    try:
        about = storage.read_about(path)
    except (storage.DamagedError, OSError):  # `save` then replaces what lies there
        return 0
    return int(about["step"]) if about.get("fingerprint") == mark else 0


def of_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {
        f"{moment}/{name}": optimizer.state[p][moment]
        for name, p in tensors.items()
        if p in optimizer.state
        for moment in MOMENTS
    }


def restore(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor], step: int
) -> None:
    """Trained tensors and moments as they were after `step` steps."""
    for name, p in tensors.items():
        p.data.copy_(saved[name])
        if f"exp_avg/{name}" in saved:
            moments = {moment: saved[f"{moment}/{name}"].to(p.device) for moment in MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
