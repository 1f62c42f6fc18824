"""Prune a little, retrain, prune more: iterative magnitude pruning, PERP's baseline.

Every cycle removes the same share of the weights that are left (Renda et al. 2020, arXiv:2003.02389), so after k of n
cycles a final sparsity S has reached 1 - (1 - S)^(k/n).  With one cycle this is one-shot pruning and retraining.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pruners
from pruners import anatomy, checks, inputs, select, storage
from pruners.checks import Share, Whole
from pruners.lazy import PreTrainedModel, nn
from pruners.magnitude import Magnitude
from pruners.matrices import Matrix
from pruners.retrain import state
from pruners.retrain.batches import Batches
from pruners.retrain.finetune import Retrained, finetune
from pruners.retrain.masks import BitMask
from pruners.retrain.schedule import Schedule, precision_for
from pruners.retrain.trainable import Trainable, untie

# What changes the result; with `reference`, `micro_batch_size` does so, too.
MOVING = ("steps", "learning_rate", "batch_size", "warmup", "clip", "seed", "precision", "shuffle", "reference")


@dataclass(frozen=True)
class Cycle:
    """One cycle: the method's repr, the sparsity it reached and how retraining went."""

    method: str
    sparsity: float
    retrained: Retrained


@checks.arguments
def magnitudes(sparsity: Share, cycles: Whole) -> tuple[Magnitude, ...]:
    """The methods of iterative magnitude pruning; ValueError for fewer than one cycle."""
    if cycles < 1:
        raise ValueError(f"Pruning takes at least one cycle; got {cycles}.")
    select.check_share("sparsity", sparsity)
    return tuple(Magnitude(sparsity=1 - (1 - sparsity) ** (done / cycles)) for done in range(1, cycles + 1))


def iterate(
    model: PreTrainedModel,
    methods: Sequence[Any],
    trainable: Trainable,
    examples: Any,
    *,
    windows: Any = None,
    folder: Path | None = None,
    **training: Any,
) -> list[Cycle]:
    """Prune with each method in turn and retrain after each, in place; masks only grow.

    `windows` are the methods' calibration, `training` the arguments of `finetune`.  With a `folder`, what a finished
    cycle left is kept there, and a killed run goes on within the cycle it was in.  Raises TypeError or ValueError,
    before anything is pruned, for arguments that are none, and ValueError where a method, or plain LoRA, brings back
    what was pruned.
    """
    model = inputs.language_model(model)
    checks.bound(finetune, model, trainable, examples, folder=folder, **training)
    _check(model, methods, trainable, windows, training)
    examples = list(examples) if isinstance(examples, Iterator) else examples  # every cycle reads them
    digest = Batches(examples, 1, 0, model.config).digest()
    if trainable.head and not training.get("reference"):
        untie(model)  # now, so that what a finished cycle left fits the model it is loaded into
    keeper = _Keeper(model, Path(folder) if folder else None, _mark(model, methods, trainable, digest, training))
    done = keeper.finished()
    for index, method in enumerate(methods[len(done) :], start=len(done)):
        before = {name: BitMask.of(linear.weight.data) for name, linear in _linears(model).items()}
        report = pruners.prune(model, method, windows)
        _refuse_return(method, before, _linears(model))
        retrained = finetune(model, trainable, examples, folder=keeper.inner(index), **training)
        done.append(Cycle(repr(method), report.achieved, retrained))
        keeper.keep(index, done)
    return done


def _check(
    model: PreTrainedModel, methods: Any, trainable: Trainable, windows: Any, training: Mapping[str, Any]
) -> None:
    """What the first pruning or retraining would refuse, once the model is changed."""
    about = {name: training[name] for name in ("batch_size", "warmup") if name in training}
    schedule = Schedule(training["steps"], training["learning_rate"], **about)
    schedule.checked(training.get("stop"))
    schedule.micro_batch_size(training.get("micro_batch_size"), training.get("reference", False))
    precision_for(training.get("precision"), model.dtype, model.device)
    if isinstance(methods, str) or not isinstance(methods, Sequence):
        raise TypeError(f"methods are several methods, one a cycle; got {checks.typed(methods)}.")
    for method in methods:
        pruners.check_method(method)
    if windows is not None:
        inputs.calibration(model, windows)
    if trainable.adapters and not trainable.adapters.keeps_sparsity:
        raise ValueError(f"{trainable.adapters!r} would fill what was pruned; use MaskLoRA, ScaleLoRA or LoRAPrune.")
    trainable.attach(model).detach()


@dataclass
class _Keeper:
    """What finished cycles left, in `folder`; nothing without one."""

    model: PreTrainedModel
    folder: Path | None
    mark: str

    def inner(self, index: int) -> Path | None:
        return self.folder / f"cycle_{index}" if self.folder else None

    def finished(self) -> list[Cycle]:
        """The finished cycles; the model is as the last of them left it."""
        path = self.folder / "cycles.safetensors" if self.folder else None
        found = state.load(path, self.mark) if path else None
        if found is None:
            return []
        tensors, about = found
        for name, p in self.model.named_parameters():
            p.data.copy_(tensors[name])
        return [Cycle(**{**cycle, "retrained": Retrained(**cycle["retrained"])}) for cycle in about["cycles"]]

    def keep(self, index: int, done: list[Cycle]) -> None:
        inner = self.inner(index)
        if self.folder and inner:
            about = {"fingerprint": self.mark, "cycles": [asdict(cycle) for cycle in done]}
            if state.save(self.folder / "cycles.safetensors", dict(self.model.named_parameters()), about):
                storage.remove(inner)


def _linears(model: nn.Module) -> dict[str, Matrix]:
    return {f"{b.name}.{name}": linear for b in anatomy.blocks(model) for name, linear in b.linears().items()}


def _mark(
    model: PreTrainedModel, methods: Sequence[Any], trainable: Trainable, digest: str, training: Mapping[str, Any]
) -> str:
    moving = [*MOVING, *(["micro_batch_size"] if training.get("reference") else [])]
    settings = {name: training[name] for name in moving if name in training}
    return state.fingerprint(model, list(methods), trainable, settings, digest)


def _refuse_return(method: Any, before: Mapping[str, BitMask], linears: Mapping[str, Matrix]) -> None:
    for name, mask in before.items():
        back = int(((linears[name].weight.data != 0) & mask.gone()).sum())
        if back:
            raise ValueError(
                f"{method!r} brought back {back:,} weights of {name} that an earlier cycle pruned. Use methods that "
                "only remove weights, of growing sparsity."
            )
