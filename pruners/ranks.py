"""The processes of one launch that run the same program: one alone, or the ranks that `torchrun` started.

Rank 0 takes the decisions that depend on the disk, the clock or a lock, and every rank hears them (`first`).  Work is
shared by dealing it out in turns; what the ranks made of it is summed.  A rank that is lost ends the others with one
sentence.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from pruners.lazy import Tensor, torch

T = TypeVar("T")
PATIENCE = timedelta(minutes=30)  # for a rank that does not come to where the others wait


class RankLostError(ConnectionError):
    """A rank has ended or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """This process is rank `rank` of `count`; `device` is where what they tell each other is kept meanwhile."""

    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    def share(self, batch: Sequence[T], each: int = 1) -> Sequence[T]:
        """This rank's part of a batch of examples, or of micro-batches of `each` of them.

        Raises ValueError where it does not divide.
        """
        if len(batch) % self.count:
            raise ValueError(
                f"A batch of {len(batch) * each} cannot be shared evenly by {self.count} processes"
                f"{f' in micro-batches of {each}' if each > 1 else ''}; "
                f"use a batch_size that is a multiple of {self.count * each}."
            )
        return batch[self.rank :: self.count]

    def agree(self, what: str) -> None:
        """ValueError unless every rank says the same: sums over different models would look like training."""
        if self.count == 1:
            return
        lowest = torch.tensor(list(hashlib.sha256(what.encode()).digest()), device=self.device)
        highest = lowest.clone()
        with explained():
            torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        if not torch.equal(lowest, highest):
            raise ValueError(
                f"The {self.count} processes do not run the same: model, examples, settings or checkpoint differ "
                "between them. Start them all with the same command on the same files."
            )

    def first(self, work: Callable[[], T]) -> T:
        """What `work` returns on rank 0, which alone calls it; plain JSON values (tuples arrive as lists).

        What it raises is raised on every rank, of the same class where that takes a message.
        """
        if self.count == 1:
            return work()
        if self.rank:
            told = json.loads(self._told(b""))
            if "failed" in told:
                raise _rebuilt(*told["failed"])
            answer: T = told["answer"]
            return answer
        try:
            said = json.dumps({"answer": work()})
        except Exception as error:
            kind = type(error)
            self._told(json.dumps({"failed": [kind.__module__, kind.__qualname__, str(error)]}).encode())
            raise
        self._told(said.encode())
        same: T = json.loads(said)["answer"]
        return same

    def add_up(self, tensors: Iterable[Tensor]) -> None:
        """Sum each of these over the ranks, in place."""
        if self.count > 1:
            with explained():
                for handle in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
                    handle.wait()

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        told = torch.tensor([float(here)], device=self.device)
        self.add_up([told])
        return bool(told)

    def wait(self) -> None:
        """Until every rank has come here."""
        if self.count > 1:
            with explained():
                torch.distributed.barrier()

    def _told(self, said: bytes) -> bytes:
        """What rank 0 says, on every rank."""
        length = torch.tensor([len(said)], device=self.device)
        with explained():
            torch.distributed.broadcast(length, src=0)
            if self.rank:
                text = torch.empty(int(length), dtype=torch.uint8, device=self.device)
            else:
                text = torch.frombuffer(bytearray(said), dtype=torch.uint8).to(self.device)
            torch.distributed.broadcast(text, src=0)
        return text.cpu().numpy().tobytes()


def here(device: torch.device | str = "cpu", patience: timedelta = PATIENCE) -> Ranks:
    """Joins the process group that the environment describes, if there is one.

    A rank that the others wait for longer than `patience` counts as lost.  Raises RankLostError where they do not meet.
    """
    device = torch.device(device)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        with explained():
            torch.distributed.init_process_group(
                "nccl" if on_gpu else "gloo", timeout=patience, device_id=device if on_gpu else None
            )
    if not torch.distributed.is_initialized():
        return Ranks()
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


@contextmanager
def explained() -> Iterator[None]:
    """Of what is done together: RankLostError for what a lost rank makes torch.distributed raise."""
    try:
        yield
    except RuntimeError as error:
        if not _of_a_lost_rank(error):
            raise
        said = re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0]).partition(". ")[0]  # without gloo's place
        raise RankLostError(
            f"A process that was to work along has ended or does not answer ({said}); see what it said. The same "
            "command goes on from the last state that was kept."
        ) from error


def _of_a_lost_rank(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)  # which raises plain RuntimeErrors


def _rebuilt(module: str, name: str, message: str) -> Exception:
    """The error of rank 0; ConnectionError where its class takes more than a message or is none of a module's own."""
    kind: Any = getattr(sys.modules.get(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, Exception)):
        kind = ConnectionError
    try:
        error: Exception = kind(message)
    except TypeError:
        error = ConnectionError(message)
    return error if str(error) == message else ConnectionError(message)
