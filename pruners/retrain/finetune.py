"""The training loop: next-token loss on what `Trainable` selects, AdamW without decay of weights, clipped gradients.

It stands in for transformers.Trainer, whose checkpoints are pickles and hold the frozen weights too: here a killed run
resumes from one small safetensors file and ends with the same bits, on a CPU, as one that was not killed.

PERP's released code (Zimmer et al. 2023, arXiv:2312.15230) trains through that trainer.  `reference=True` is its
arithmetic where this project's own is another:

    loss of a step    the mean of its micro-batches' means, so that a token of a short text weighs more; else the mean
                      over all tokens of the step, which no splitting moves
    head              its adapter merges into the matrix even where that is the embeddings', too; else a tied head is
                      given a matrix of its own first, for what the embeddings then do was never trained

Optimiser, clipping at norm 1, warm-up, decay, dropout, trained sets and adapters are the released ones either way.
LLM-Pruner's post-training loads, in the end, the best of its checkpoints by the loss on what is held out; so does this
with `held_out`, whose last step is a candidate, too.

What stays this project's own: a run's `seed` starts adapters and orders examples, where the released code shuffles by
42 whatever the seed; bfloat16, whose range needs no scaled losses and so skips no steps, in place of float16; and the
refusal to go on once the loss diverges.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pruners.calibrate import Progress
from pruners.interface import checks
from pruners.interface.checks import Count, Finite, Flag, Folder, Positive, Seed, Text, Whole
from pruners.lazy import PreTrainedModel, no_grad, torch
from pruners.retrain import state
from pruners.retrain.batches import Batches
from pruners.retrain.held_out import NotFiniteError, of_batches
from pruners.retrain.layouts import Replicated, Sharded, laid_out
from pruners.retrain.passes import Micro, Passes, dealt, share
from pruners.retrain.schedule import Diverged, Schedule, autocast, precision_for
from pruners.retrain.trainable import Attached, Trainable
from pruners.run import gradients, inputs, ranks
from pruners.run.ranks import Ranks
from pruners.run.statistic import is_finite
from pruners.run.stream import evaluating, modes_kept
from pruners.weights import homes

Watch = Annotated[Callable[[int, float, float], None], checks.FUNCTION]
BEST = "best"  # in front of a tensor's name in the state
SMOOTHED = 10  # steps whose mean loss is compared when looking for divergence


@dataclass
class Retrained:
    """What a retraining did.  `share` is of all parameters, adapters included; `losses` are by step, in nats a token.

    `merging` is the loss on the last batch, without dropout, before and after adapters were merged;
    `lost_by_merging` is LoRA-Prune's |s BA . (1 - M)| / |s BA|, 0 for exact merges.  `processes` shared each batch.
    Of `seconds`, the first `resumed_seconds` went into the steps up to `resumed_at`, in another process.
    With text held out, `checked` has the loss on it after steps, and `kept_step` is the step of the lowest.
    """

    trainable: str
    trained: int
    parameters: int
    share: float
    sparsity_before: float
    sparsity: float = 0.0
    losses: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    resumed_at: int = 0
    resumed_seconds: float = 0.0
    merging: tuple[float, float] | None = None
    lost_by_merging: float = 0.0
    untied: bool = False
    processes: int = 1
    checked: list[tuple[int, float]] = field(default_factory=list)
    kept_step: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what was held out is told where something was."""
        told = asdict(self)
        return told if self.checked else {k: v for k, v in told.items() if k not in ("checked", "kept_step")}

    def __str__(self) -> str:
        return (
            f"{100 * self.share:.3f} % trained, loss {self.losses[0]:.3f} to {self.losses[-1]:.3f} in "
            f"{len(self.losses)} steps, {self.tokens / self.seconds:.0f} tokens/s; sparsity {self.sparsity_before:.4f} "
            f"to {self.sparsity:.4f}"
        )


@checks.arguments
@inputs.plain_torch()
def finetune(
    model: PreTrainedModel,
    trainable: Annotated[Trainable, checks.instance(Trainable, "a pruners.retrain.Trainable, what is trained")],
    examples: Any,
    *,
    steps: Count,
    learning_rate: Positive,
    batch_size: Count = 2,
    warmup: Finite = 0.1,
    clip: Positive = 1.0,
    seed: Seed = 0,
    micro_batch_size: Count | None = None,
    precision: Text | None = None,
    checkpointing: Flag = False,
    folder: Folder | None = None,
    save_every: Count = 100,
    stop: Whole | None = None,
    shuffle: Flag = True,
    reference: Flag = False,
    held_out: Any = None,
    check_every: Count = 200,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Retrained:
    """Train `model` in place and merge the adapters.

    `examples` are packed windows [count, length], or records of `input_ids` and `labels`; a step takes `batch_size` of
    them, `micro_batch_size` at once.  `seed` shuffles them, or without `shuffle` they come in their order again and
    again; it also starts the adapters and drops out.  `reference` is PERP's released arithmetic, in which
    `micro_batch_size`, a divisor of `batch_size`, moves the loss (see the module).  With a `folder`, the state is kept
    there every `save_every` steps and a killed run goes on from it, as does one that is to `stop` the same schedule
    after more steps.  Of `held_out` examples the loss is taken every `check_every` steps and after the last; the model
    then is that of the lowest, and of equal ones the first.  After every step `progress(step, stop or steps)` and
    `watch(step, loss, tokens a second)` are called.

    Under torchrun every rank calls this with the same model and examples, whole; they share each batch, which is a
    multiple of their number or divides it, and each keeps its part of weights, gradients and moments meanwhile (see
    pruners.retrain.layouts).  Where a rank is lost the others raise RankLostError, and the model's weights are
    gone; the state in `folder` fits any number of ranks.

    Raises TypeError or ValueError for a model, examples, settings or checkpoints that do not fit, before anything is
    trained, and Diverged where the loss does, or where a weight has become too large for float16.  Interrupted in a
    step, it takes its adapters out and leaves what else was trained as it is then.
    """
    model = inputs.language_model(model)
    refuse_away(model, trainable)
    schedule = Schedule(steps, learning_rate, batch_size, warmup)
    stop = schedule.checked(stop)
    micro_batch_size = schedule.micro_batch_size(micro_batch_size, reference)
    batches = Batches(examples, batch_size, seed, model.config, shuffle)
    cast = precision_for(precision, model.dtype, model.device)
    unusual = [f"means of {micro_batch_size}"] * reference + ["in order"] * (not shuffle)
    kept_back = None if held_out is None else Batches(held_out, micro_batch_size, 0, model.config)
    if kept_back:
        unusual.append(f"best of {kept_back.digest()} every {check_every}")
    mark = state.fingerprint(model, schedule, trainable, clip, seed, cast, batches.digest(), *unusual)
    path = Path(folder) / "retrain.safetensors" if folder else None
    together = ranks.here(model.device)
    refuse_layerdrop(model, together.count)
    share(together, list(range(batch_size)), micro_batch_size, reference)  # refused now if at all
    together.agree(f"{mark} {stop} {micro_batch_size} {save_every} {checkpointing} {folder is None}")
    spread = together.count > 1 and homes.of(model) is None
    if path and spread:  # while the model is whole on every rank
        together.first(lambda: state.refuse_other_at(path, mark))
    attached = trainable.attach(model, seed, untie=not reference, spread=spread)
    report = Retrained(repr(trainable), attached.trained, attached.parameters, attached.share, attached.sparsity)
    try:
        loop = _Loop(
            ranks=together,
            model=model,
            attached=attached,
            schedule=schedule,
            stop=stop,
            batches=batches,
            clip=clip,
            precision=cast,
            micro_batch_size=micro_batch_size,
            reference=reference,
            held_out=kept_back,
            check_every=check_every,
            path=path,
            mark=mark,
            report=report,
        )
        with ranks.explained():
            loop.run(save_every, checkpointing, progress, watch)
            loop.bring_back()
    except BaseException as error:
        if not isinstance(error, Diverged) and not spread:
            attached.detach()
        raise
    loop.merge()
    refuse_infinite(model, steps)
    return report


@dataclass(kw_only=True)
class _Loop:
    ranks: Ranks
    model: PreTrainedModel
    attached: Attached
    schedule: Schedule
    stop: int
    batches: Batches
    clip: float
    precision: torch.dtype | None
    micro_batch_size: int
    reference: bool
    held_out: Batches | None
    check_every: int
    path: Path | None
    mark: str
    report: Retrained

    def __post_init__(self) -> None:
        self.layout: Replicated | Sharded = laid_out(self.attached, self.ranks)
        self.optimizer = self.schedule.optimizer(self.layout.tensors)
        trained = list(self.layout.tensors.values())
        self.passes = Passes(self.layout.model, self.batches, self.precision, trained, self.layout.spread)
        self.unmerged = 0.0
        self.report.processes = self.ranks.count
        self.good: tuple[int, dict[str, torch.Tensor]] = (0, {})
        self.best: dict[str, torch.Tensor] = {}  # what was trained, at the step that the report names

    def run(self, save_every: int, checkpointing: bool, progress: Progress | None, watch: Watch | None) -> None:
        self._resume()
        self.ranks.agree(f"{self.mark} from step {self.report.resumed_at}")
        model = self.layout.model
        with ExitStack() as stack:
            stack.enter_context(modes_kept(model))
            stack.enter_context(self.passes.drawing())
            if checkpointing and homes.of(model) is None:  # else blocks are recomputed as they come
                cast = partial(autocast, self.passes.precision, self.passes.device, not self.passes.sharded)
                stack.enter_context(gradients.checkpointed(model, cast))
            model.train()
            for step in range(len(self.report.losses), self.stop):
                if step and step % self.check_every == 0:
                    self._check(step)
                if step % save_every == 0 or step == self.report.resumed_at:
                    self._keep(step)
                self._step(step)
                if progress:
                    progress(step + 1, self.stop)
                if watch:
                    watch(step + 1, self.report.losses[-1], self.report.tokens / self.report.seconds)
            self._keep(self.stop)
            self._check(self.stop)  # no part of the state: one that stops later may not check here

    def _step(self, step: int) -> None:
        started = time.perf_counter()
        indices = self.batches.indices(step)
        mine = dealt(self.batches, indices, self.micro_batch_size, self.reference, self.ranks)
        loss = self.passes.backward(step, mine)
        self.layout.collect(loss)
        norm = self.layout.clip(self.clip)
        self._refuse_divergence(step, float(loss), float(norm))
        self.schedule.step(self.optimizer, step)
        self.report.losses.append(float(loss))
        self.report.tokens += sum(len(self.batches.examples[index][0]) for index in indices)
        self.report.seconds += time.perf_counter() - started

    def _refuse_divergence(self, step: int, loss: float, norm: float) -> None:
        losses = [*self.report.losses, loss]
        first, last = losses[:SMOOTHED], losses[-SMOOTHED:]
        rising = step >= 2 * SMOOTHED and sum(last) > 2 * sum(first) + SMOOTHED  # one nat a token more than double
        if math.isfinite(loss) and math.isfinite(norm) and not rising:
            return
        self._diverged(
            f"at step {step + 1} of {self.schedule.steps}: loss {loss:.4g} after {losses[0]:.4g} at the start, "
            f"gradient norm {norm:.4g}"
        )

    def _diverged(self, how: str) -> NoReturn:
        step_kept, tensors = self.good
        for name, p in self.layout.tensors.items():
            p.data.copy_(tensors[name])
        self.layout.bring_back()
        self.attached.merge()
        raise Diverged(
            f"Retraining diverged {how}, learning rate {self.schedule.learning_rate:g}. The model is restored to its "
            f"state after step {step_kept}; use a lower learning rate or a longer warm-up."
        )

    def _check(self, step: int) -> None:
        """The loss on what is held out after so many steps, unless it is known; the lowest one's tensors are kept."""
        report, device = self.report, self.passes.device
        if self.held_out is None or step in dict(report.checked):
            return
        told: list[Any] = [0.0, ""]
        try:
            with autocast(self.precision, device, not self.layout.spread):
                told[0] = of_batches(self.layout.model, self.held_out, whole=self.layout.spread)
        except NotFiniteError as error:
            told[1] = str(error).partition(":")[0].replace("The", "the", 1)
        loss, why = self.ranks.first(lambda: told)  # rank 0's, lest a last bit have others keep another step
        if why:
            self._diverged(f"after step {step} of {self.schedule.steps}: {why}")
        if loss < min((before for _, before in report.checked), default=math.inf):
            self.best = {name: p.detach().cpu().clone() for name, p in self.layout.tensors.items()}
            report.kept_step = step
        report.checked.append((step, loss))

    def _keep(self, step: int) -> None:
        tensors = {name: p.detach().cpu().clone() for name, p in self.layout.tensors.items()}
        self.good = (step, tensors)
        if (path := self.path) is None:
            return
        # a run of the same schedule that stops later may have overtaken this one
        if self.ranks.first(lambda: step > state.step_in(path, self.mark)):
            moments = state.of_optimizer(self.optimizer, self.layout.tensors)
            told = ("losses", "tokens", "seconds") + ("checked", "kept_step") * (self.held_out is not None)
            about = {name: getattr(self.report, name) for name in told}
            best = {f"{BEST}/{name}": tensor for name, tensor in self.best.items()}
            self.layout.save(path, {**tensors, **moments, **best}, {"fingerprint": self.mark, "step": step, **about})

    def _resume(self) -> None:
        if self.path and (found := self.layout.load(self.path, self.mark)):
            saved, about = found
            if about["step"] > self.stop:  # of a run that went further; it stays
                return
            state.restore(self.optimizer, self.layout.tensors, saved, about["step"])
            self.report.losses, self.report.tokens = about["losses"], about["tokens"]
            self.report.resumed_seconds, self.report.resumed_at = about["seconds"], about["step"]
            self.report.seconds = about["seconds"]
            self.report.checked = [(step, loss) for step, loss in about.get("checked", [])]
            self.report.kept_step = about.get("kept_step")
            if self.report.checked:
                self.best = {name: saved[f"{BEST}/{name}"] for name in self.layout.tensors}

    @no_grad
    def bring_back(self) -> None:
        """What was trained into the model, adapters in place; the moments are dropped first."""
        for name, tensor in self.best.items():
            self.layout.tensors[name].data.copy_(tensor)
        if self.attached.merges:
            self.unmerged = self._last_loss(self.passes, self.precision)
        self.optimizer.state.clear()
        self.layout.bring_back()

    @no_grad
    def merge(self) -> None:
        report, attached = self.report, self.attached
        report.lost_by_merging = attached.lost_by_merging()
        if home := homes.of(self.model):
            home.source.enter("retrained")
        attached.merge()
        if attached.merges:
            plain = Passes(self.model, self.batches, None, [])
            report.merging = (self.unmerged, self._last_loss(plain, None))
        report.sparsity, report.untied = attached.sparsity, attached.untied

    def _last_loss(self, passes: Passes, precision: torch.dtype | None) -> float:
        indices = self.batches.indices(self.stop - 1)[: self.micro_batch_size]
        with evaluating(passes.model):
            return float(passes.loss(Micro(indices, self.batches.predicted(indices), 0), precision))


def refuse_away(model: PreTrainedModel, trainable: Trainable) -> None:
    """ValueError for the training of all weights of a model whose weights are away from home."""
    if trainable.weights and homes.of(model) is not None:
        size = 1e-9 * sum(p.numel() for p in model.parameters())
        raise ValueError(
            f"Training all weights needs them, their gradients and moments on the device, {16 * size:.1f} GB, "
            "and they are offloaded; load the model whole, or train norms, biases or adapters."
        )


def refuse_layerdrop(model: PreTrainedModel, ranks: int) -> None:
    """ValueError for blocks that drop out whole, where they come one by one or are spread over ranks."""
    if getattr(model.config, "layerdrop", None) and (ranks > 1 or homes.of(model) is not None):
        raise ValueError(
            f"layerdrop is {model.config.layerdrop}, which drops whole blocks in training, and this model's are "
            f"{'shared by several ranks' if ranks > 1 else 'offloaded and come one by one'}; set "
            "model.config.layerdrop = 0, or train the model whole, in one process."
        )


def refuse_infinite(model: PreTrainedModel, steps: int) -> None:
    """Diverged, naming the first, for a weight that training has made too large for float16."""
    if model.dtype != torch.float16:
        return
    for held in homes.each(model):
        for name, weight in held.items():
            if not weight.is_meta and not is_finite(weight):
                raise Diverged(
                    f"Training for {steps} steps made a number in {name} too large for torch.float16; the model has to "
                    "be loaded again. Use a lower learning rate, or load it in bfloat16 or float32."
                )
