"""What a cell of a table is: a `Run`, and a `Table` of them.

A Run's id hashes every field that can move the number and nothing else: where and how fast it runs stays outside.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any, ClassVar

from experiments.models import catalogue
from experiments.store.described import describe, digest
from pruners.interface import checks
from pruners.interface.checks import Count, Counts, Flag, Number, Rule, Seed, Text
from pruners.interface.suggest import UsageError

COLUMNS = Rule(
    "a tuple of columns, each a tuple that begins with its model, such as (('llama-7b',),)",
    (tuple, list),
    lambda columns: all(isinstance(one, tuple | list) and one and isinstance(one[0], str) for one in columns),
)
SAMPLING = ("documents", "stream", "sentences", "first", "dialogues")
DTYPES = ("float32", "bfloat16", "float16")
Metrics = Annotated[
    tuple[tuple[str, str], ...],
    Rule("a tuple of pairs of a task and its metric", (tuple,), lambda pairs: all(map(_is_pair, pairs))),
]


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, str) and part for part in value)


@dataclass(frozen=True)
class Windows:
    """Calibration tokens: `count` windows of `length` tokens of `corpus`.

    `sampling` is how the papers draw them: `documents` (Wanda, SparseGPT, GBLM, PERP: one window from a random
    document longer than the window), `stream` (FLAP: random windows of the joined text), `sentences` (LLM-Pruner:
    rows of at least `length` tokens, none twice), `first` (the head of the joined text, cut into windows) or
    `dialogues` (LLM-Pruner's ChatGLM: the first dialogues' first turn and the answer to it, padded).
    With an `order`, a seed, the same windows come shuffled, which says how far a number hangs on rounding alone.
    """

    corpus: Text
    count: Count
    length: Count
    seed: Seed = 0
    sampling: str = "documents"
    order: Seed | None = field(default=None, metadata={"since": "later"})

    def __post_init__(self) -> None:
        checks.fields(self)
        checks.choice("sampling", self.sampling, SAMPLING)

    def told(self) -> dict[str, Any]:
        """As plain JSON values, the order only where there is one."""
        return {name: value for name, value in asdict(self).items() if name != "order" or value is not None}


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over non-overlapping windows of `window` tokens; `limit` keeps the first so many windows."""

    corpus: Text
    window: Annotated[int, checks.whole(2)]
    limit: Count | None = None

    shown: ClassVar[tuple[str, ...]] = ("perplexity",)

    def __post_init__(self) -> None:
        checks.fields(self)

    @property
    def key(self) -> str:
        """The protocol key, e.g. `wikitext2/test@128` or, limited, `wikitext2/test@128[:16]`."""
        return f"{self.corpus}@{self.window}{_head(self.limit)}"

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that a table shows."""
        return (self.key,)

    @classmethod
    def of(cls, key: str) -> Perplexity:
        """What a protocol key means; ValueError for one of another form."""
        if not (parts := re.fullmatch(r"(.+)@(\d+)(?:\[:(\d+)\])?", key)):
            raise ValueError(f"{key!r} is not a protocol key of a perplexity, such as wikitext2/test@2048[:16].")
        corpus, window, limit = parts.groups()
        return cls(corpus, int(window), int(limit) if limit else None)


@dataclass(frozen=True)
class ZeroShot:
    """Accuracy on lm-eval's tasks with `examples` in the prompt; `limit` keeps each task's first so many documents.

    `metrics` pairs each task with the metric that a table shows (acc and acc_norm are always stored).  A `convention`
    names the paper whose unweighted mean it is; without one there is no mean.  `protocols.zero_shot` makes them.
    Without `detail` a table shows the mean alone.  `released_marks` asks ChatGLM as LLM-Pruner's released harness does,
    with its marks behind every choice, too.
    """

    convention: Text | None
    metrics: Metrics
    limit: Count | None = None
    detail: Flag = field(default=True, metadata={"result": False})
    examples: Number = field(default=0, metadata={"since": "later"})
    released_marks: Flag = field(default=False, metadata={"since": "later"})

    shown: ClassVar[tuple[str, ...]] = ("score",)

    def __post_init__(self) -> None:
        checks.fields(self)

    @property
    def key(self) -> str:
        """Of the mean, e.g. `mean.wanda@0shot[:100]`, or of what all tasks share, `tasks@0shot`."""
        what = f"mean.{self.convention}" if self.convention else "tasks"
        return f"{what}@{self._how}"

    def task_key(self, task: str, metric: str) -> str:
        """E.g. `boolq.acc@0shot`."""
        return f"{task}.{metric}@{self._how}"

    @property
    def _how(self) -> str:
        return f"{self.examples}shot{'+marks' * self.released_marks}{_head(self.limit)}"

    @property
    def keys(self) -> tuple[str, ...]:
        tasks = tuple(self.task_key(task, metric) for task, metric in self.metrics) if self.detail else ()
        return (*tasks, self.key) if self.convention else tasks


@dataclass(frozen=True)
class Efficiency:
    """Parameters, MACs and bytes, and the latency of every batch size at every prompt length (in tokens).

    `semi_structured` also times 2:4 weights in the kernels made for them, where the device has those.
    """

    batch_sizes: Counts = (1,)
    lengths: Counts = (64,)
    new_tokens: Count = 16
    repetitions: Count = 5
    semi_structured: Flag = False

    def __post_init__(self) -> None:
        checks.fields(self)

    @property
    def shown(self) -> tuple[str, ...]:
        counts = ("parameters", "macs", "weight_bytes")
        return (*counts, "tokens_per_second") if self.batch_sizes and self.lengths else counts

    @property
    def key(self) -> str:
        """Batch x length of each timing and the tokens decoded after it, e.g. `efficiency@1x64+16`."""
        shapes = ",".join(f"{batch}x{length}" for batch in self.batch_sizes for length in self.lengths)
        return f"efficiency@{shapes}+{self.new_tokens}" if shapes else "efficiency"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)


@dataclass(frozen=True)
class Generation:
    """What the model writes after fixed prompts, greedily and sampled with `seed`."""

    new_tokens: Count = 64
    seed: Seed = 0

    shown: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        checks.fields(self)

    @property
    def key(self) -> str:
        return f"generation@{self.new_tokens}, seed {self.seed}"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)


@dataclass(frozen=True)
class MaskPatterns:
    """How far rows and columns of the masks stay or go together, and maps of the masks of one block, from 0."""

    block: Number = 0

    shown: ClassVar[tuple[str, ...]] = ("column_dispersion",)

    def __post_init__(self) -> None:
        checks.fields(self)

    @property
    def key(self) -> str:
        return f"mask patterns, block {self.block}"

    @property
    def keys(self) -> tuple[str, ...]:
        return (self.key,)


@dataclass(frozen=True)
class Run:
    """One cell: a model, a method (None is the dense model), its calibration and what is measured.

    `recovery` follows pruning: a `recovery.Retraining`, or a `retrain.Reconstruction` block by block.  `quantised`: the
    weights are then put into 8 bits by LLM.int8, before anything is measured.  With a `tuning`, a `rates.Tuning`, the
    learning rate of `recovery` is chosen from its grid, and the one that `recovery` names counts for nothing.
    A `rehearsal` is none of the table's numbers.
    `model` is a name of the catalogue, a local folder, or NAME=FOLDER for a folder that is a model of the catalogue;
    `identity` is filled in by `experiments.models` (hub id and revision, or a fingerprint of the folder), so that two
    models never share an id.  Raises TypeError or ValueError for fields that make no cell, such as two measures of one
    key; tasks that are asked in the same way become one measure.
    """

    model: Text
    method: Any
    windows: Annotated[Windows, checks.instance(Windows, "the calibration Windows")] | None
    measures: Annotated[tuple[Any, ...], checks.instance(tuple, "a tuple of measures")]
    dtype: str = "float32"
    recovery: Any = None
    quantised: Flag = False
    tuning: Any = None
    rehearsal: Flag = False

    def __post_init__(self) -> None:
        checks.fields(self)
        checks.choice("dtype", self.dtype, DTYPES)
        for name in ("method", "recovery", "tuning"):
            if isinstance(value := getattr(self, name), type | str):
                raise TypeError(f"Run: {name} is made with its settings, or None; got {checks.typed(value)}.")
        if self.tuning and not hasattr(self.recovery, "learning_rate"):
            raise ValueError("Run: tuning chooses the learning rate of a recovery, and there is none.")
        if _twice(self.measures):
            object.__setattr__(self, "measures", _merged(self.measures))
        if twice := _twice(self.measures):
            raise ValueError(
                f"Run: {len(twice)} measures have the key {_key(twice[0])!r}, under which a record holds one "
                "result; make one measure of them, or leave out all but one."
            )

    @property
    def model_name(self) -> str:
        """What a reader calls the model."""
        return catalogue.called(self.model)

    @property
    def is_of_catalogue(self) -> bool:
        """Whether the model is one of the papers', and not a folder that may be called like one."""
        return catalogue.split(self.model)[0] is not None

    @property
    def calibrates(self) -> bool:
        """Whether `windows` are read."""
        readers = (self.method, self.recovery)
        return self.windows is not None and any(getattr(reader, "needs_windows", False) for reader in readers)

    def spec(self, identity: dict[str, Any] | None = None) -> dict[str, Any]:
        """Every field that can move the number, as plain JSON values."""
        recovery = {"recovery": self._recovery()} if self.recovery else {}
        return {
            "model": {"name": self.model_name, **(identity or {})},  # where a folder lies moves nothing
            "method": describe(self.method),
            "windows": self.windows.told() if self.windows and self.calibrates else None,
            "measures": [describe(measure) for measure in self.measures],
            "dtype": self.dtype,
            **recovery,
            **({"quantised": "LLM.int8"} if self.quantised else {}),
            **({"tuning": describe(self.tuning)} if self.tuning else {}),
            **({"rehearsal": True} if self.rehearsal else {}),
        }

    def _recovery(self) -> dict[str, Any]:
        """Without a learning rate where that is chosen."""
        chosen = self.tuning or any(getattr(what, "chooses_rate", False) for what in self.measures)
        told = describe(self.recovery) or {}
        return {name: value for name, value in told.items() if name != "learning_rate" or not chosen}

    def id(self, identity: dict[str, Any] | None = None) -> str:
        return digest(self.spec(identity))


@dataclass(frozen=True)
class Table:
    """A paper's table: `run(method, *column)` for every row and column gives the cells (None: no such cell).

    A column begins with its model.
    `published` names the paper's own table, e.g. `wanda: table 23, table 24`, in the CSV under `analysis/published`.
    `label` gives a run the paper's printed words for its method and setting: the keys by which published values and
    claims find their cell.  Readers see them, or what `titles` has in the place of any of them.  `rates` says how the
    learning rates were chosen that the table names itself.
    """

    name: Text
    title: str
    rows: Annotated[tuple[Any, ...], Rule("a tuple of rows, such as methods, None for the dense model", (tuple, list))]
    columns: Annotated[tuple[tuple[Any, ...], ...], COLUMNS]
    run: Annotated[Callable[..., Run | None], checks.FUNCTION]
    published: str | None = None
    label: Annotated[Callable[[Run], tuple[str, str]], checks.FUNCTION] | None = None
    rates: str | None = None
    titles: Mapping[str, str] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checks.fields(self)
        checks.mapping("Table: titles", self.titles, "words for readers by the paper's")

    @property
    def called(self) -> str:
        """With the file of its cells, for a reader who is to mend it."""
        file = getattr(getattr(self.run, "__code__", None), "co_filename", "")
        return f"The table {self.name}{f' ({file})' if file else ''}"

    def title_of(self, words: tuple[str, str]) -> tuple[str, str]:
        """What readers see of a method and a setting."""
        method, setting = (self.titles.get(word, word) for word in words)
        return method, setting

    def runs(self, model: str | None = None) -> list[Run]:
        """The table's runs in reading order, each once; `model` asks for the same experiment on another model.

        Windows that nobody reads are left out, so that a method without data is one run whatever the seeds.
        UsageError, with the row and the column, where `run` does not take them or gives what is no cell.
        """
        takes = inspect.signature(self.run)
        cells = [self._cell(takes, row, model or name, *rest) for row in self.rows for name, *rest in self.columns]
        runs = [run if run.calibrates else replace(run, windows=None) for run in cells if run is not None]
        try:
            return list(dict.fromkeys(runs))
        except TypeError as error:
            why = f"a cell is found by all that it holds, and here is an {error}; use tuples in the place of it."
            raise UsageError(f"{self.called}: {why}") from error

    def _cell(self, takes: inspect.Signature, row: Any, *column: Any) -> Run | None:
        try:
            takes.bind(row, *column)
        except TypeError as error:
            raise UsageError(f"{self._at(row, column)}: run does not take them: {error}.") from error
        try:
            run = self.run(row, *column)
        except UsageError:
            raise
        except (ValueError, TypeError) as error:
            told = f"{self._at(row, column)}: {error}"
            if isinstance(error, ValueError):
                raise UsageError(told) from error
            raise TypeError(told).with_traceback(error.__traceback__) from error  # told with the line in its own code
        if run is not None and not isinstance(run, Run):
            raise UsageError(f"{self._at(row, column)}: run gives a Run, or None for no cell; got {checks.typed(run)}.")
        for what in run.measures if run else ():
            if isinstance(what, type) or not hasattr(what, "key"):
                raise UsageError(f"{self._at(row, column)}: {checks.typed(what)} is no measure, as a Perplexity is.")
        return run

    def _at(self, row: Any, column: tuple[Any, ...]) -> str:
        return f"{self.called}, row {checks.shown(row)}, column {checks.shown(column)}"


def _key(what: Any) -> Any:
    return getattr(what, "key", repr(what))


def _twice(measures: Sequence[Any]) -> list[Any]:
    """The first measures that share a key; empty where none do."""
    keys = [_key(what) for what in measures]
    shared = [key for key in keys if keys.count(key) > 1]
    return [what for what, key in zip(measures, keys, strict=True) if key in shared[:1]]


def _merged(measures: Sequence[Any]) -> tuple[Any, ...]:
    """The measures, each once; tasks that are asked in the same way as one measure, since they have one key."""
    found: list[Any] = []
    for what in dict.fromkeys(measures):
        same = [at for at, other in enumerate(found) if isinstance(what, ZeroShot) and _fit(other, what)]
        if same:
            before = found[same[0]]
            pairs = tuple(dict.fromkeys((*before.metrics, *what.metrics)))
            found[same[0]] = replace(before, metrics=pairs, detail=before.detail or what.detail)
        else:
            found.append(what)
    return tuple(found)


def _fit(one: Any, other: ZeroShot) -> bool:
    """Whether one measure can say what both do: two means of a name need two."""
    if not isinstance(one, ZeroShot) or one.key != other.key:
        return False
    return one.convention is None or one.metrics == other.metrics


def needs_windows(method: Any) -> bool:
    return method is not None and method.needs_windows


def _head(limit: int | None) -> str:
    return f"[:{limit}]" if limit else ""
