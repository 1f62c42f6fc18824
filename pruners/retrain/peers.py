"""The processes that train together: one alone, or those that `torchrun` or `accelerate launch` started.

Every process holds the same model and takes its part of each batch; gradients are summed once per step, after
accumulation.  Since the loss is divided by the whole batch's tokens, the sum is the whole batch's gradient.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True)
class Peers:
    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls, device: torch.device) -> Peers:
        """Joins the process group that the environment describes, if there is one."""
        if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not distributed.is_initialized():
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        if not distributed.is_initialized():
            return cls()
        return cls(distributed.get_rank(), distributed.get_world_size())

    def share(self, indices: Sequence[int]) -> Sequence[int]:
        """This process's part of a batch; ValueError where it does not divide."""
        if len(indices) % self.count:
            raise ValueError(
                f"A batch of {len(indices)} cannot be shared evenly by {self.count} processes; "
                f"use a batch_size that is a multiple of {self.count}."
            )
        return indices[self.rank :: self.count]

    def add_up(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> None:
        """Sum loss and gradients over the processes, in place."""
        if self.count > 1:
            work = [loss, *(p.grad for p in parameters if p.grad is not None)]
            for handle in [distributed.all_reduce(tensor, async_op=True) for tensor in work]:
                handle.wait()

    def wait(self) -> None:
        if self.count > 1:
            distributed.barrier()
