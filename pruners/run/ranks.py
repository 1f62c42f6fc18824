"""The ranks of one launch, which run the same program: one process alone, or those that `torchrun` started.

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
MEETING = timedelta(minutes=5)  # for all to be started
ERROR_PATIENCE = timedelta(seconds=30)  # for the others to meet an error that one has met
WAY_OUT = "start all of them with torchrun, or unset WORLD_SIZE for one process"
LOG = "LLM_PRUNING_LOG"  # names the file that has what all ranks say, where that is not the terminal
STARTED = ("RANK", "MASTER_ADDR", "MASTER_PORT")  # what torchrun says beside WORLD_SIZE
_STORE: list[Any] = []  # by which the ranks have met; it answers where sums and messages would wait


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
                f"A batch of {len(batch) * each} cannot be split evenly among {self.count} processes"
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
                f"The {self.count} processes do not run the same work: model, examples, settings or "
                "checkpoint differ. Start all of them with the same command on the same files."
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
            self._told(json.dumps({"failed": _described(error)}).encode())
            raise
        self._told(said.encode())
        same: T = json.loads(said)["answer"]
        return same

    def each(self, work: Callable[[], T]) -> list[T]:
        """What `work` returns on every rank, in their order; plain JSON values (tuples arrive as lists).

        What it raises on one rank is raised on every rank, of the first of them where several fail.
        """
        if self.count == 1:
            return [work()]
        own: Exception | None = None
        try:
            said: dict[str, Any] = {"answer": work()}
        except Exception as error:  # noqa: BLE001  (raised below, on every rank)
            own, said = error, {"failed": _described(error)}
        told = [json.loads(text) for text in self._gathered(json.dumps(said).encode())]
        for rank, one in enumerate(told):
            if "failed" in one:
                raise own if own is not None and rank == self.rank else _rebuilt(*one["failed"])
        return [one["answer"] for one in told]

    def split(self, work: Callable[[Sequence[int]], list[T]], count: int) -> list[T]:
        """What `work(numbers)` makes of every number below `count`, one answer each, in order; dealt out in turns."""
        parts = self.each(lambda: work(range(self.rank, count, self.count)))
        return [parts[number % self.count][number // self.count] for number in range(count)]

    def deal(self, work: Callable[[int], T], count: int, progress: Callable[[int, int], None] | None = None) -> list[T]:
        """As `split`, one number at a time; `progress` is told as if all ranks were as far as this one."""

        def mine(numbers: Sequence[int]) -> list[T]:
            made: list[T] = []
            for number in numbers:
                made.append(work(number))
                if progress:
                    progress(min(len(made) * self.count, count), count)
            return made

        return self.split(mine, count)

    def reach(self, place: str) -> None:
        """Say that this rank is there, without waiting for the others."""
        with explained():
            _STORE[0].set(f"{place}/{self.rank}", "")

    def met(self, place: str) -> bool:
        """Whether every rank says that it is at this place, soon: after an error that others may not have met."""
        if self.count == 1:
            return True
        self.reach(place)
        try:
            _STORE[0].wait([f"{place}/{rank}" for rank in range(self.count)], ERROR_PATIENCE)
        except RuntimeError:  # nobody keeps the store any more, or the time is over
            return False
        return True

    def tell(self, source: int, tensor: Tensor) -> Tensor:
        """The tensor of rank `source`; on the others `tensor` says shape and dtype, and is overwritten."""
        if self.count == 1:
            return tensor
        tensor = tensor.contiguous()
        with explained():
            torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), src=source)
        return tensor

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

    def _gathered(self, said: bytes) -> list[bytes]:
        """What every rank says, on every rank."""
        lengths = torch.zeros(self.count, dtype=torch.long, device=self.device)
        lengths[self.rank] = len(said)
        self.add_up([lengths])
        mine = torch.zeros(int(lengths.max()), dtype=torch.uint8, device=self.device)
        mine[: len(said)] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
        texts = [torch.empty_like(mine) for _ in range(self.count)]
        with explained():
            torch.distributed.all_gather(texts, mine)
        return [text[:length].cpu().numpy().tobytes() for text, length in zip(texts, lengths.tolist(), strict=True)]

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


def here(device: torch.device | str = "cpu", patience: timedelta | None = None) -> Ranks:
    """Joins the process group that the environment describes, if there is one.

    A rank that the others wait for longer than `patience` (half an hour) counts as lost.  Raises ValueError where the
    environment speaks of others but not of how to meet them, ConnectionError where they do not meet.
    """
    if launched() == 1 and not _initialised():
        return Ranks()
    device = torch.device(device)
    if not _initialised():
        _join(device, patience or PATIENCE)
    return Ranks(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def launched() -> int:
    """How many processes were launched together; ValueError for a WORLD_SIZE that is no such number."""
    return _number("WORLD_SIZE", "1", least=1)


def rank() -> int:
    """Which of the processes that were launched together this is, from 0; of one alone 0."""
    return _number("RANK", "0", least=0)


def local_rank() -> int:
    """Which of the processes of this machine this is, from 0."""
    return _number("LOCAL_RANK", "0", least=0)


def leave(lost: bool = False) -> None:
    """The ranks part, once all have come here, unless one is `lost`; nothing where they never met."""
    if _STORE and _initialised() and not lost:
        here().met("gone")
        torch.distributed.destroy_process_group()
    _STORE.clear()


def _initialised() -> bool:
    return "torch" in sys.modules and torch.distributed.is_available() and torch.distributed.is_initialized()


def _join(device: torch.device, patience: timedelta) -> None:
    if absent := [name for name in STARTED if name not in os.environ]:
        verb = "is" if len(absent) == 1 else "are"
        raise ValueError(f"WORLD_SIZE is {launched()} but {', '.join(absent)} {verb} not set; {WAY_OUT}.")
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(torch.distributed.rendezvous("env://", timeout=MEETING))
        torch.distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",  # messages go by the CPU, tensors by where they are
            store=torch.distributed.PrefixStore("group", store),
            rank=rank,
            world_size=size,
            timeout=patience,
            device_id=device if on_gpu else None,
        )
    except (RuntimeError, ValueError) as error:
        first = str(error).partition("\n")[0]
        raise ConnectionError(
            f"The {launched()} processes of WORLD_SIZE cannot connect to each other ({first}); {WAY_OUT}."
        ) from error
    _STORE[:] = [torch.distributed.PrefixStore("ranks", store)]


def _number(name: str, default: str, least: int) -> int:
    said = os.environ.get(name, default)
    if not said.isdecimal() or int(said) < least:
        raise ValueError(f"{name} is {said!r}, not a number from {least} on; {WAY_OUT}.")
    return int(said)


@contextmanager
def explained() -> Iterator[None]:
    """Of what is done together: RankLostError for what a lost rank makes torch.distributed raise."""
    try:
        yield
    except RuntimeError as error:
        if not _of_a_lost_rank(error):
            raise
        log = os.environ.get(LOG)
        said = re.sub(r"^\[\S*\] ", "", str(error).partition("\n")[0]).partition(". ")[0]  # without gloo's place
        raise RankLostError(
            f"Another process of this launch has ended or does not answer ({said}); see its output"
            f"{f' in {log}' if log else ''}. The same command resumes from the last saved state."
        ) from error


def _of_a_lost_rank(error: RuntimeError) -> bool:
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)  # which raises plain RuntimeErrors


def _described(error: Exception) -> tuple[str, str, str]:
    return type(error).__module__, type(error).__qualname__, str(error)


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
