"""Block by block, bring a pruned block's outputs back to what the dense block makes of the same inputs.

    min over theta of  mean (block_pruned,theta(X) - block_dense(X))^2        Zimmer et al. 2023, arXiv:2312.15230

X are the calibration windows as the earlier blocks, pruned and rebuilt, pass them on.  theta is what `trainable`
selects within the block; only its gradients and moments exist at a time.  Windows are taken in order, again and again.

After Wagner et al. 2025, arXiv:2510.14444, also in other steps (see pruners.retrain.units): `granularity` is

    matrix          each matrix alone: a least-squares problem where all weights train; norms belong to none
    attention_mlp   attention, then the MLP, each with the norms in front of it
    block           one block
    two_blocks, four_blocks   so many blocks in a row, pruned one after the other and then trained together

and with `inputs` "dense", not "pruned", X is what the dense model passes on.  Pruning itself goes by the pruned model's
inputs either way.  Single matrices need the least memory; the others one unit's activations.

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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pruners import anatomy
from pruners.anatomy import Block
from pruners.calibrate import Keeper, Passage
from pruners.interface import checks
from pruners.interface.checks import Count, Finite, Flag, Positive, Seed, Text
from pruners.lazy import F, Int, Tensor, nn, torch
from pruners.retrain import state, units
from pruners.retrain.schedule import Diverged, Schedule, autocast, precision_for, seeded
from pruners.retrain.trainable import Attached, Trainable
from pruners.retrain.units import Unit
from pruners.run import inputs

INPUTS = ("pruned", "dense")


@dataclass(frozen=True)
class Rebuilt:
    """The mean squared errors of one block, or of what is rebuilt at once, and whether training `lowered` them.

    Where it did not, what was pruned stayed and `final` is its error; with `reference` the trained one stayed.
    """

    block: str
    initial: float
    final: float
    lowered: bool
    seconds: float


@dataclass(frozen=True)
class Reconstruction:
    """`steps` of AdamW per block on `batch_size` windows each; `seed` starts the adapters and drops out.

    `granularity` says what takes the place of a block, `inputs` ("pruned" or "dense") whose hidden states it gets, and
    `reference` is the released code's arithmetic, which knows blocks and pruned inputs alone (see the module).
    Raises ValueError for what a block does not hold (head, embeddings), a matrix does not hold (norms) or cannot merge
    (plain LoRA).
    """

    trainable: Annotated[Trainable, checks.instance(Trainable, "a pruners.retrain.Trainable, what is trained")]
    steps: Count = 200
    learning_rate: Positive = 5e-4
    batch_size: Count = 2
    warmup: Finite = 0.1
    seed: Seed = 0
    reference: Flag = field(default=False, metadata={"since": "later"})
    granularity: Text = field(default="block", metadata={"since": "later"})
    inputs: Text = field(default="pruned", metadata={"since": "later"})

    needs_windows: ClassVar[bool] = True

    def __post_init__(self) -> None:
        checks.fields(self)
        self.trainable.check_within_blocks()
        checks.choice("granularity", self.granularity, units.GRANULARITIES)
        checks.choice("inputs", self.inputs, INPUTS)
        if self.granularity == "matrix" and self.trainable.norms:
            raise ValueError("Norms belong to no matrix; drop norms= here, or use granularity='attention_mlp'.")
        if self.reference and (self.granularity, self.inputs) != ("block", "pruned"):
            raise ValueError(
                "The released code rebuilds blocks on pruned inputs; drop reference=, or granularity= and inputs=."
            )

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
            if self.granularity == "matrix" and block.expert_groups:
                raise ValueError(
                    f"The experts of {block.name} lie in stacked parameters, which hold no matrix alone; use "
                    "granularity='attention_mlp' or a coarser one."
                )
        mark = ""
        if folder:
            mark = state.fingerprint(model, method, self, hashlib.sha256(windows.cpu().numpy().tobytes()).hexdigest())
            for path in Path(folder).glob("block_*.safetensors"):  # now, while the model is as it was given
                state.refuse_other_at(path, mark)
        return Rebuilder(self, model.dtype, mark, folder)


class Rebuilder(Keeper):
    """One run of a Reconstruction; `blocks` tells what became of every block, or of what was rebuilt in its place."""

    def __init__(self, settings: Reconstruction, dtype: torch.dtype, mark: str, folder: Path | None) -> None:
        self.settings, self.dtype, self.mark, self.folder = settings, dtype, mark, folder
        self.rebuild_batch = settings.batch_size
        self.rebuilds_at_once = units.GRANULARITIES[settings.granularity]
        self.dense_inputs = settings.inputs == "dense"
        self.blocks: list[Rebuilt] = []
        self._last: tuple[list[Block], list[Rebuilt]] = ([], [])  # rebuilt at once, the last time
        self._found: dict[str, Tensor] | None = None
        self._dense: dict[nn.Parameter, Tensor] = {}

    def restore(self, block: Block) -> bool:
        path = self._path(block)
        if block.index % self.rebuilds_at_once == 0:
            found = state.load(path, self.mark) if path else None
            self._found = found and found[0]
            self.blocks += [Rebuilt(**told) for told in found[1]["rebuilt"]] if found else []
        if self._found is None:
            return False
        for name, p in block.module.named_parameters(block.name):
            p.data.copy_(self._found[name])
        return True

    def remember(self, block: Block) -> None:
        if self.settings.granularity in ("matrix", "attention_mlp"):
            self._dense = {p: p.detach().clone() for p in block.module.parameters()}

    def rebuild(self, passage: Passage) -> None:
        before = len(self.blocks)
        how = self.settings
        for unit in units.of(passage, how.granularity, self._dense, self.dense_inputs, self.rebuild_batch):
            with units.holding(unit.meanwhile):
                self._rebuild(unit)
        self._dense = {}
        self._last = [*passage.blocks], self.blocks[before:]

    def _rebuild(self, unit: Unit) -> None:
        started, initial = time.perf_counter(), unit.error()
        pruned = {p: p.detach().clone() for p in unit.changing(self.settings.trainable)}
        attached: list[Attached] = []
        try:
            for one in unit.attach(self.settings.trainable, self.settings.seed):
                attached.append(one)  # one by one: those before an error have to be detached
            with torch.enable_grad():
                self._train(unit, attached)
            unmerged = self._finite(unit, unit.error()) if self.settings.reference else None
        except BaseException:
            for one in attached:
                one.detach()
            raise
        for one in attached:
            one.merge()
        final = unit.error() if unmerged is None else unmerged
        lower = final <= initial
        if not lower and unmerged is None:
            for p, before in pruned.items():
                p.data.copy_(before)
            final = initial
        seconds = round(time.perf_counter() - started, 3)
        self.blocks.append(Rebuilt(unit.name, initial, final, lower, seconds))

    def _train(self, unit: Unit, attached: Sequence[Attached]) -> None:
        tensors = {f"{place}.{name}": p for place, one in enumerate(attached) for name, p in one.tensors.items()}
        if not tensors:  # structured pruning has left nothing of this block, or no bias is here
            return
        schedule, count, device = self.settings.schedule, len(unit.passage.inputs), unit.passage.device
        precision = precision_for(None, self.dtype, device)
        optimizer = schedule.optimizer(tensors)
        with _dropping_out(unit.blocks[0], self.settings.seed) if self.settings.reference else nullcontext():
            before: Tensor | None = None  # the error of the step before, read when a GPU has the next one to do
            for step in range(schedule.steps):
                rows = torch.arange(step * self.rebuild_batch, (step + 1) * self.rebuild_batch) % count
                with autocast(precision, device):
                    outputs, aims = unit.pair(rows)
                loss = F.mse_loss(outputs.float(), aims.float())
                inputs.back(loss)
                for one in attached:
                    one.mask_gradients()
                if before is not None:
                    self._finite(unit, before.item(), step - 1)
                schedule.step(optimizer, step)
                before = loss.detach()
            if before is not None:
                self._finite(unit, before.item(), schedule.steps - 1)

    def _finite(self, unit: Unit, error: float, step: int | None = None) -> float:
        """The error before `step`, or after all of them; raises Diverged for one that is none."""
        steps, at = self.settings.steps, "after all" if step is None else f"at step {step + 1} of"
        if not math.isfinite(error):
            raise Diverged(
                f"Reconstruction of {unit.name} diverged {at} {steps} steps: error {error:.4g}, learning rate "
                f"{self.settings.learning_rate:g}. Use a lower one."
            )
        return error

    def keep(self, block: Block) -> None:
        together, rebuilt = self._last
        path = self._path(block)
        if path and block is together[-1]:
            tensors = {name: p for one in together for name, p in one.module.named_parameters(one.name)}
            state.save(path, tensors, {"fingerprint": self.mark, "rebuilt": [asdict(one) for one in rebuilt]})

    def _path(self, block: Block) -> Path | None:
        """One file for what is rebuilt at once."""
        first = block.index - block.index % self.rebuilds_at_once
        return Path(self.folder) / f"block_{first:03}.safetensors" if self.folder else None


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
