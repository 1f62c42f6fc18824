"""Block by block, bring a pruned block's outputs back to what the dense block makes of the same inputs.

    min over theta of  mean (block_pruned,theta(X) - block_dense(X))^2        Zimmer et al. 2023, arXiv:2312.15230

X are the calibration windows as the earlier blocks, pruned and rebuilt, pass them on.  theta is what `trainable`
selects within the block; only its gradients and moments exist at a time.  Windows are taken in order, again and again.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from pruners import checks
from pruners.anatomy import Block
from pruners.calibrate import Keeper, Passage
from pruners.checks import Count, Finite, Positive, Seed
from pruners.retrain import state
from pruners.retrain.finetune import Diverged
from pruners.retrain.schedule import Schedule, autocast, precision_for
from pruners.retrain.trainable import Attached, Trainable


@dataclass(frozen=True)
class Rebuilt:
    """One block's mean squared errors; what training has not `lowered` is the pruned block's, which then stayed."""

    block: str
    initial: float
    final: float
    lowered: bool
    seconds: float


@dataclass(frozen=True)
class Reconstruction:
    """`steps` of AdamW per block on `batch_size` windows each; `seed` starts the adapters.

    Raises ValueError for what a block does not hold (head, embeddings) or cannot merge (plain LoRA).
    """

    trainable: Annotated[Trainable, checks.instance(Trainable, "a pruners.retrain.Trainable, what is trained")]
    steps: Count = 200
    learning_rate: Positive = 5e-4
    batch_size: Count = 2
    warmup: Finite = 0.1
    seed: Seed = 0

    needs_windows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.fields(self)

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.steps, self.learning_rate, self.batch_size, self.warmup)

    def start(
        self, model: Any, method: Any, windows: Int[Tensor, "count length"], folder: Path | None = None
    ) -> Rebuilder:
        """For a dense `model` about to be pruned; with a `folder` finished blocks are kept there and not done again.

        Raises OtherRunError for a folder that holds blocks of another run.
        """
        if self.batch_size > len(windows):
            raise ValueError(
                f"Reconstruction takes {self.batch_size} windows a step; there are {len(windows)}. "
                "Use a smaller batch_size or more windows."
            )
        mark = ""
        if folder:
            mark = state.fingerprint(model, method, self, hashlib.sha256(windows.numpy().tobytes()).hexdigest())
            for path in Path(folder).glob("block_*.safetensors"):  # now, while the model is as it was given
                state.refuse_other_at(path, mark)
        return Rebuilder(self, model.dtype, mark, folder)


class Rebuilder(Keeper):
    """One run of a Reconstruction; `blocks` tells what became of every block."""

    def __init__(self, settings: Reconstruction, dtype: torch.dtype, mark: str, folder: Path | None) -> None:
        self.settings, self.dtype, self.mark, self.folder = settings, dtype, mark, folder
        self.rebuild_batch = settings.batch_size
        self.blocks: list[Rebuilt] = []

    def restore(self, block: Block) -> bool:
        path = self._path(block)
        found = state.load(path, self.mark) if path else None
        if found is None:
            return False
        tensors, about = found
        for name, p in block.module.named_parameters():
            p.data.copy_(tensors[name])
        self.blocks.append(Rebuilt(**about["rebuilt"]))
        return True

    def rebuild(self, block: Block, passage: Passage) -> None:
        started, initial = time.perf_counter(), passage.error(block)
        pruned = {name: p.detach().clone() for name, p in block.module.named_parameters()}
        attached = self.settings.trainable.attach_to_block(block, self.settings.seed)
        try:
            self._train(block, attached, passage)
        except BaseException:
            attached.detach()
            raise
        attached.merge()
        final = passage.error(block)
        lower = final <= initial
        if not lower:
            for name, p in block.module.named_parameters():
                p.data.copy_(pruned[name])
        seconds = round(time.perf_counter() - started, 3)
        self.blocks.append(Rebuilt(block.name, initial, final if lower else initial, lower, seconds))

    @torch.enable_grad()
    def _train(self, block: Block, attached: Attached, passage: Passage) -> None:
        if not attached.tensors:  # structured pruning has left nothing of this block
            return
        schedule, count = self.settings.schedule, len(passage.inputs)
        precision = precision_for(None, self.dtype, passage.inputs.device)
        optimizer = schedule.optimizer(attached.tensors)
        for step in range(schedule.steps):
            rows = torch.arange(step * self.rebuild_batch, (step + 1) * self.rebuild_batch) % count
            with autocast(precision, passage.inputs.device):
                outputs = passage.run(block, passage.inputs[rows])
            loss = F.mse_loss(outputs.float(), passage.targets[rows].float())
            if not loss.isfinite():
                raise Diverged(
                    f"Reconstruction of {block.name} diverged at step {step + 1} of {schedule.steps}: error "
                    f"{loss.item():.4g}, learning rate {schedule.learning_rate:g}. Use a lower one."
                )
            loss.backward()
            attached.mask_gradients()
            schedule.step(optimizer, step)

    def keep(self, block: Block) -> None:
        path = self._path(block)
        if path:
            state.save(
                path,
                dict(block.module.named_parameters()),
                {"fingerprint": self.mark, "rebuilt": asdict(self.blocks[-1])},
            )

    def _path(self, block: Block) -> Path | None:
        return Path(self.folder) / f"block_{block.index:03}.safetensors" if self.folder else None
