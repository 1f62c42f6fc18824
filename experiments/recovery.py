"""The recovery stage of a Run: what is retrained on which text.  Reconstruction belongs to pruning itself."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from experiments.spec import Run, Windows
from pruners.interface import checks
from pruners.interface.checks import Count, Finite, Flag, Number, Positive, Rule, Seed, Text
from pruners.retrain import LoRA, Reconstruction, Trainable
from pruners.retrain.schedule import Schedule


@dataclass(frozen=True)
class Documents:
    """The corpus's first `count` documents, each cut to `length` tokens and padded in its batch: PERP's form."""

    corpus: Text
    count: Count
    length: Count

    def __post_init__(self) -> None:
        checks.fields(self)


@dataclass(frozen=True)
class Instructions:
    """Records of an instruction corpus with loss on the answers, cut to `length` tokens: LLM-Pruner's form.

    `held_out` records, drawn by `seed` as `datasets` draws them, are kept back; the loss on them is taken before and
    after training, which costs LLM-Pruner's post-training 1 % more.
    """

    corpus: Text
    length: Count = 256
    held_out: Number = 2000
    seed: Seed = 42

    def __post_init__(self) -> None:
        checks.fields(self)


TEXTS = Rule("the Windows, Documents or Instructions to train on", (Windows, Documents, Instructions))


@dataclass(frozen=True)
class Retraining:
    """`steps` of `batch_size` examples of `text` for what `trainable` selects; the fields are those of `finetune`.

    `micro_batch_size` examples go through the model at once; that moves a number only by PERP's released arithmetic,
    `reference`.  With `stop`, the schedule of `steps` is stopped after that many steps.  `keep` "best" ends with the
    model whose loss on what is held out was the lowest, taken every `check_every` steps and after the last one: on
    the windows `held_out`, or else on the records that `text` keeps back.  "last" is the model after the last step.
    """

    trainable: Annotated[Trainable, checks.instance(Trainable, "a pruners.retrain.Trainable, what is trained")]
    text: Annotated[Windows | Documents | Instructions, TEXTS]
    steps: Count
    learning_rate: Positive
    batch_size: Count = 2
    warmup: Finite = 0.1
    seed: Seed = 0
    micro_batch_size: Count | None = field(default=None, metadata={"result": "reference"})
    stop: Count | None = field(default=None, metadata={"since": "later"})
    reference: Flag = field(default=False, metadata={"since": "later"})
    keep: Text = field(default="last", metadata={"since": "later"})
    check_every: Count = field(default=200, metadata={"result": "checks"})
    held_out: Annotated[Windows, checks.instance(Windows, "the Windows on which losses are taken")] | None = field(
        default=None, metadata={"since": "later"}
    )

    def __post_init__(self) -> None:
        checks.fields(self)
        checks.choice("keep", self.keep, ("last", "best"))
        if self.checks and not self.held_out and not getattr(self.text, "held_out", 0):
            raise ValueError("keep='best' goes by text held out; give held_out= windows, or Instructions with some.")
        if self.held_out and not self.checks:
            raise ValueError("held_out= is what keep='best' goes by; give both, or none.")
        schedule = Schedule(self.steps, self.learning_rate, self.batch_size, self.warmup)
        schedule.checked(self.stop)
        schedule.micro_batch_size(self.micro_batch_size, self.reference)

    @property
    def shared(self) -> int:
        """How many parts of a batch processes can share: examples, or by `reference` whole micro-batches."""
        return self.batch_size // (self.micro_batch_size or self.batch_size) if self.reference else self.batch_size

    @property
    def checks(self) -> bool:
        """Whether the loss on what is held out decides which step's model is kept."""
        return self.keep == "best"

    @property
    def corpora(self) -> tuple[str, ...]:
        return (self.text.corpus, *([self.held_out.corpus] if self.held_out else []))

    @property
    def taken(self) -> int:
        """Steps that are really taken."""
        return self.stop or self.steps


# LLM-Pruner's post-training on the 49,760 records of Alpaca-cleaned that are not held out: 2 epochs.
POST_TRAINING = Retraining(
    Trainable(adapters=LoRA(rank=8, alpha=16, dropout=0.05, merge=True)),
    Instructions("alpaca/train"),
    steps=1556,
    learning_rate=1e-4,
    batch_size=64,
    warmup=100,
    micro_batch_size=4,
)
# On the 2,583,615 records of LaMini-instruction that are not held out: 3 epochs.  The authors' command names no batch
# size; 64 is that of Alpaca.
MORE_DATA = replace(POST_TRAINING, text=Instructions("lamini/train"), steps=121_107, learning_rate=5e-5)


def schedule(run: Run) -> Run | None:
    """What runs have in common that stop the same schedule, each at its step; None for one that does not stop."""
    if not isinstance(run.recovery, Retraining) or run.recovery.stop is None:
        return None
    return replace(run, measures=(), recovery=replace(run.recovery, stop=None))


def training_tokens(recovery: Retraining) -> int:
    """Rough work of the steps that are taken, in tokens through the model; a backward pass counts as two."""
    return 3 * recovery.taken * recovery.batch_size * recovery.text.length


def work_tokens(recovery: Any, windows: Windows | None) -> float:
    """Rough work in tokens through the model; a backward pass counts as two."""
    if isinstance(recovery, Retraining):
        kept_back = recovery.text.held_out * recovery.text.length if isinstance(recovery.text, Instructions) else 0
        by = recovery.held_out.count * recovery.held_out.length if recovery.held_out else kept_back
        checks = -(-recovery.taken // recovery.check_every) if recovery.checks else 0
        return training_tokens(recovery) + 2 * kept_back + checks * by
    if isinstance(recovery, Reconstruction) and windows:
        passes = 4 if recovery.granularity == "matrix" else 3  # every matrix needs what lies before it in the block
        return passes * recovery.steps * recovery.batch_size * windows.length + 2 * windows.count * windows.length
    return 0


def text(recovery: Any) -> str:
    """What retraining reads, e.g. `c4/train 60 x 512 tokens`; empty for a stage that reads the calibration text."""
    if not isinstance(recovery, Retraining):
        return ""
    told = [f"{recovery.text.corpus} {_size(recovery.text)}"]
    if recovery.held_out:
        told.append(f"best step by {recovery.held_out.corpus} {_size(recovery.held_out)}")
    return ", ".join(told)


def _size(text: Windows | Documents | Instructions) -> str:
    if isinstance(text, Instructions):
        return f"records of up to {text.length} tokens"
    return f"{text.count} x {text.length} tokens"


SAID = {"attention_mlp": "attention, MLP"}  # of granularities


def label(recovery: Any) -> str:
    """E.g. ` + MaskLoRA, norms` or ` + reconstruction (MaskLoRA, norms)`; empty for none."""
    if recovery is None:
        return ""
    what: Trainable = recovery.trainable
    named = [name for name in ("norms", "biases", "head", "embeddings") if getattr(what, name)]
    adapters = [type(what.adapters).__name__] if what.adapters else []
    parts = "all weights" if what == Trainable.full() else ", ".join(adapters + named + ["weights"] * what.weights)
    if isinstance(recovery, Reconstruction):
        by = "" if recovery.granularity == "block" else f" by {SAID.get(recovery.granularity, recovery.granularity)}"
        return f" + reconstruction ({parts})" + by.replace("_", " ") + ", dense inputs" * (recovery.inputs == "dense")
    best = f", best of every {recovery.check_every} steps" if recovery.checks else ""
    return f" + {parts}{best}" + (f", step {recovery.stop} of {recovery.steps}" if recovery.stop else "")
