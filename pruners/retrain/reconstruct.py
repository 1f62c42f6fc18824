"""Block by block, bring a pruned block's outputs back to what the dense block makes of the same inputs.

    min over theta of  mean (block_pruned,theta(X) - block_dense(X))^2        Zimmer et al. 2023, arXiv:2312.15230

X are the calibration windows as the earlier blocks, pruned and rebuilt, pass them on.  theta is what `trainable`
selects within the block; only its gradients and moments exist at a time.  Windows are taken in order, again and again.

`reference=True` is the released code's arithmetic where this project's own is another:

    warm-up        a share of the steps is rounded down; else up, as in retraining
    a worse block  stays, and its error is that before adapters merge; else the block goes back to what pruning left
    dropout        the model's is on while a block trains; else off, as the outputs aimed at are made without it

Precision is this project's own either way: bfloat16, which skips no steps, in place of float16 with scaled losses.  An
error that is not finite stops the run, and a head, which no block holds, is refused; the released code passes it over.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pruners import anatomy
from pruners.anatomy import Block
from pruners.calibrate import Keeper, Passage
from pruners.interface import checks
from pruners.interface.checks import Count, Finite, Flag, Positive, Seed
from pruners.lazy import F, Int, Tensor, torch
from pruners.retrain import state
from pruners.retrain.finetune import Diverged
from pruners.retrain.schedule import Schedule, autocast, precision_for, seeded
from pruners.retrain.trainable import Attached, Trainable
from pruners.run import inputs
from pruners.run.stream import span


@dataclass(frozen=True)
class Rebuilt:
    """One block's mean squared errors, and whether training `lowered` them.

    Where it did not, the pruned block stayed and `final` is its error; with `reference` the trained one stayed.
    """

    block: str
    initial: float
    final: float
    lowered: bool
    seconds: float


@dataclass(frozen=True)
class Reconstruction:
    """`steps` of AdamW per block on `batch_size` windows each; `seed` starts the adapters and drops out.

    `reference` is the released code's arithmetic (see the module).
    Raises ValueError for what a block does not hold (head, embeddings) or cannot merge (plain LoRA).
    """

    trainable: Annotated[Trainable, checks.instance(Trainable, "a pruners.retrain.Trainable, what is trained")]
    steps: Count = 200
    learning_rate: Positive = 5e-4
    batch_size: Count = 2
    warmup: Finite = 0.1
    seed: Seed = 0
    reference: Flag = field(default=False, metadata={"since": "later"})

    needs_windows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.fields(self)
        self.trainable.check_within_blocks()

    @property
    def schedule(self) -> Schedule:
        rounded = self.warmup if self.warmup >= 1 or not self.reference else math.floor(self.steps * self.warmup)
        return Schedule(self.steps, self.learning_rate, self.batch_size, rounded)

    def start(
        self, model: Any, method: Any, windows: Int[Tensor, "count length"], folder: Path | None = None
    ) -> Rebuilder:
        """For a dense `model` about to be pruned; with a `folder` finished blocks are kept there and not done again.

        Raises ValueError for a model in whose blocks this cannot be trained, OtherRunError for a folder that holds
        blocks of another run.
        """
        if self.batch_size > len(windows):
            raise ValueError(
                f"Reconstruction takes {self.batch_size} windows a step; there are {len(windows)}. "
                "Use a smaller batch_size or more windows."
            )
        for block in anatomy.blocks(model):  # before the first of them is pruned
            self.trainable.check_block(block)
        mark = ""
        if folder:
            mark = state.fingerprint(model, method, self, hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest())
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
        pruned = {p: p.detach().clone() for p in self.settings.trainable.changing(block)}
        attached = self.settings.trainable.attach_to_block(block, self.settings.seed)
        try:
            with torch.enable_grad():
                self._train(block, attached, passage)
            unmerged = self._finite(block, passage.error(block)) if self.settings.reference else None
        except BaseException:
            attached.detach()
            raise
        attached.merge()
        final = passage.error(block) if unmerged is None else unmerged
        lower = final <= initial
        if not lower and unmerged is None:
            for p, before in pruned.items():
                p.data.copy_(before)
            final = initial
        seconds = round(time.perf_counter() - started, 3)
        self.blocks.append(Rebuilt(block.name, initial, final, lower, seconds))

    def _train(self, block: Block, attached: Attached, passage: Passage) -> None:
        if not attached.tensors:  # structured pruning has left nothing of this block
            return
        schedule, count = self.settings.schedule, len(passage.inputs)
        device = next(block.module.parameters()).device
        precision = precision_for(None, self.dtype, device)
        optimizer = schedule.optimizer(attached.tensors)
        with _dropping_out(block, self.settings.seed) if self.settings.reference else nullcontext():
            before: Tensor | None = None  # the error of the step before, read when a GPU has the next one to do
            for step in range(schedule.steps):
                rows = torch.arange(step * self.rebuild_batch, (step + 1) * self.rebuild_batch) % count
                with autocast(precision, device):
                    outputs = passage.run(block, rows)
                loss = F.mse_loss(outputs.float(), passage.targets[span(rows)].to(device).float())
                inputs.back(loss)
                attached.mask_gradients()
                if before is not None:
                    self._finite(block, before.item(), step - 1)
                schedule.step(optimizer, step)
                before = loss.detach()
            if before is not None:
                self._finite(block, before.item(), schedule.steps - 1)

    def _finite(self, block: Block, error: float, step: int | None = None) -> float:
        """The error before `step`, or after all of them; raises Diverged for one that is none."""
        steps, at = self.settings.steps, "after all" if step is None else f"at step {step + 1} of"
        if not math.isfinite(error):
            raise Diverged(
                f"Reconstruction of {block.name} diverged {at} {steps} steps: error {error:.4g}, learning rate "
                f"{self.settings.learning_rate:g}. Use a lower one."
            )
        return error

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


@contextmanager
def _dropping_out(block: Block, seed: int) -> Iterator[None]:
    """The block's own dropout on for a while, drawn by `seed` and the block's place."""
    device = next(block.module.parameters()).device
    with seeded(device, seed, block.index):
        block.module.train()
        try:
            yield
        finally:
            block.module.eval()
