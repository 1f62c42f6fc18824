"""The processes that train together: one alone, or those that `torchrun` started.

Every process holds the same model and takes its part of each batch; gradients are summed once per step, after
accumulation.  Since the loss is divided by the whole batch's tokens, the sum is the whole batch's gradient.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from pruners.lazy import Tensor, nn, torch

T = TypeVar("T")


class PeerLostError(ConnectionError):
    """A process that trains along has ended or does not answer."""


@dataclass(frozen=True)
class Peers:
    rank: int = 0
    count: int = 1
    device: torch.device | None = None

    @classmethod
    def here(cls, device: torch.device) -> Peers:
        """Joins the process group that the environment describes, if there is one."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
            on_gpu = device.type == "cuda"
            with _explained():
                torch.distributed.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None)
        if not torch.distributed.is_initialized():
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)

    def share(self, batch: Sequence[T], each: int = 1) -> Sequence[T]:
        """This process's part of a batch of examples, or of micro-batches of `each` of them.

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
        """ValueError unless every process says the same: sums over different models would look like training."""
        if self.count == 1:
            return
        lowest = torch.tensor(list(hashlib.sha256(what.encode()).digest()), device=self.device)
        highest = lowest.clone()
        with _explained():
            torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
            torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        if not torch.equal(lowest, highest):
            raise ValueError(
                f"The {self.count} processes do not train the same: model, examples, settings or checkpoint differ "
                "between them. Start them all with the same command on the same files."
            )

    def add_up(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> None:
        """Sum loss and gradients over the processes, in place."""
        if self.count > 1:
            work = [loss, *(p.grad for p in parameters if p.grad is not None)]
            with _explained():
                for handle in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in work]:
                    handle.wait()

    def wait(self) -> None:
        if self.count > 1:
            with _explained():
                torch.distributed.barrier()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        said = str(error).partition("\n")[0]
        raise PeerLostError(
            f"A process that was to train along has ended or does not answer ({said}); see what it said. The same "
            "command goes on from the last state that was kept."
        ) from error
