"""LLM-Pruner: remove the groups of coupled weights that raise the loss least, by a Taylor expansion.

    vector        | sum_k w_k g_k |                    g = gradient of the mean next-token loss over all windows
    element1      sum_k | w_k g_k |                    h = mean over windows of that window's gradient squared
    element2      sum_k | w_k^2 h_k |
    element_mix   sum_k | w_k g_k - w_k^2 h_k / 2 |    k runs over the unit's row or column of one matrix
    squared       sum_k (w_k g_k)^2                    of the released ChatGLM pruner alone
    l1, l2        sum_k |w_k|, sum_k w_k^2             no data
    random        uniform numbers from `seed`          no data, no weights

Ma, Fang & Wang 2023, arXiv:2305.11627.  A group is what must be removed together: row c of gate and up and column c
of down; a head's rows of q, k, v and columns of o.  Its matrices' scores are combined by `reduction` (sum, mean, max,
prod; first is q or gate, last is o or down), index by index; a head's score is the sum over its channels.  With
grouped queries a group is a KV head with its own query heads, whose scores are added first, and `first` is k; the
released code adds up the scores of query heads that belong to other KV heads (h, h + 8, h + 16, ... for KV head h).

`granularity` says what is removed:

    block     heads of `attention_blocks` and channels of `mlp_blocks`, half-open ranges; `ratio` of each block's
              (scope "local") or of all of them ranked together, each counting one (scope "global").  The paper's
              "20 %" of LLaMA-7B is ratio 0.25 in blocks 4..29, its "50 %" 0.6 in blocks 3..30
    channel   `ratio` of the residual stream's channels, in the whole model, embeddings included; a matrix that is
              embedding and head at once counts as both, and an embedding has sum_k | w_k g_k | for vector, too
    layer     the last blocks; 1 - ratio of them stay

With `steps` above 1 the ratio is reached in equal steps, scored again on the model pruned so far with the same windows
and fresh gradients (the released code draws new windows and clears no gradient).  The released l1 and l2 always average
the matrices' scores; give reduction="mean" for that, which only matters with scope "global".  Gradients are reduced to
scores as backward produces them: memory is the weights and one gradient, for element_mix also the squares h.

The released commands score a float16 model in float32 on a CPU and evaluate it in float16 (`--device cpu --eval_device
cuda`); `score_dtype` "float32" does that, wherever the model is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from pruners import anatomy, apply, select
from pruners.anatomy import Block
from pruners.apply import KINDS, Kept
from pruners.calibrate import PLAIN, Execution, Progress
from pruners.interface import checks
from pruners.interface.checks import Count, Rule, Seed, Text
from pruners.lazy import Float, Int, Tensor, nn, torch
from pruners.run import gradients, inputs, matrices
from pruners.run.report import Report, Size, State, Structure
from pruners.structured import Scores, Structured
from pruners.weights import aside, dtypes, homes

TOKENS_AT_ONCE = {"cpu": 640}  # in a backward pass: the papers' 10 x 64, as more takes memory there and saves no time
TOKENS_AT_MOST = 2048  # on other devices
TAYLOR = ("vector", "element1", "element2", "element_mix", "squared")
IMPORTANCES = (*TAYLOR, "l1", "l2", "random")
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda scores: scores.sum(0),
    "mean": lambda scores: scores.mean(0),
    "max": lambda scores: scores.amax(0),
    "prod": lambda scores: scores.prod(0),
    "first": lambda scores: scores[0],
    "last": lambda scores: scores[-1],
}
Range = Annotated[
    Sequence[int], checks.several(Rule("", (int,)), "the first block and the one after the last, as numbers", count=2)
]


def score(
    importance: str, weight: Tensor, dim: int, gradient: Any = None, squares: Any = None
) -> Float[Tensor, " index"]:
    """How much each row (dim 0) or column (dim 1) of a matrix matters, or each entry of a vector, in float32."""
    weight = weight.float()
    salience: dict[str, Callable[[], Any]] = {
        "vector": lambda: weight * gradient,
        "element1": lambda: weight * gradient,
        "element2": lambda: weight.square() * squares,
        "element_mix": lambda: weight * gradient - weight.square() * squares / 2,
        "squared": lambda: (weight * gradient).square(),
        "l1": lambda: weight,
        "l2": weight.square,
    }
    parts = salience[importance]().transpose(0, dim).flatten(1) if weight.ndim > 1 else salience[importance]()[:, None]
    return parts.sum(1).abs() if importance == "vector" else parts.abs().sum(1)


def index_scores(
    model: nn.Module,
    windows: Int[Tensor, "count length"] | None,
    importance: str,
    dims: Mapping[str, int],
    progress: Progress | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, Float[Tensor, " index"]]:
    """Scores by parameter name along its dimension in `dims`, on the CPU; a tied matrix has one under every name.

    Gradients are those of the model in `dtype`; None: in its own.
    """
    names: dict[Tensor, list[str]] = {}
    for name in dims:
        names.setdefault(model.get_parameter(name), []).append(name)
    weights = {same[0]: weight for weight, same in names.items()}
    squares: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}

    def add(name: str, **terms: Any) -> None:
        for alias in names[weights[name]]:
            part = score(_rule(model, alias, importance), weights[name].data, dims[alias], **terms)
            found[alias] = found[alias] + part if alias in found else part

    def second_order(name: str, gradient: Tensor, scale: float) -> None:
        square = (gradient.float() / scale).square() / len(windows)  # type: ignore[arg-type]
        if importance == "element_mix":
            squares[name] = squares[name] + square if name in squares else square
        else:
            add(name, squares=square)

    def first_order(name: str, gradient: Tensor, scale: float) -> None:
        own = squares.pop(name, None)
        add(name, gradient=gradient, squares=None if own is None else own.to(gradient.device))

    def keep_squares(block: Block) -> None:
        for name in squares:
            if name.startswith(f"{block.name}."):
                squares[name] = aside.put(model, squares[name])

    if importance not in TAYLOR:
        for part in homes.each(model):
            for name in weights.keys() & part.keys():
                add(name)
        return {name: found[name].cpu() for name in dims}
    assert windows is not None  # pruners.prune has checked them
    with dtypes.widened(model, dtype):
        if importance in ("element2", "element_mix"):
            gradients.backward(model, windows, weights, second_order, progress=progress, left=keep_squares)
        if importance != "element2":
            device = next((weight.device.type for weight in weights.values()), "cpu")  # none where nothing is left
            at_once = _at_once(model, windows, device)
            gradients.of_mean_loss(model, windows, weights, first_order, at_once=at_once, progress=progress)
    return {name: part.cpu() for name, part in found.items()}


def _at_once(model: nn.Module, windows: Int[Tensor, "count length"], device: str) -> int:
    """Windows in a backward pass: all of them where they predict unlike numbers of tokens, as the loss is one mean over
    all tokens, and else what the device takes."""
    predicted = (inputs.labels(model.config, windows)[:, 1:] != inputs.IGNORED).sum(1)
    if (predicted != predicted[0]).any():
        return len(windows)
    return max(1, tokens_at_once(device) // windows.shape[1])


def tokens_at_once(device: str) -> int:
    """In a backward pass on that kind of device, e.g. `cpu`."""
    return TOKENS_AT_ONCE.get(device, TOKENS_AT_MOST)


def _rule(model: nn.Module, name: str, importance: str) -> str:
    """Released code sums |w g| over an embedding's tokens for vector, too."""
    is_embedding = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
    return "element1" if importance == "vector" and is_embedding else importance


@dataclass(frozen=True)
class LLMPruner(Structured):
    """`score_dtype` is that of weights and gradients while groups are scored: float32, or None for the model's own.

    ValueError for block ranges outside the model, for `steps` with another granularity than `block`, and for a
    `score_dtype` where no gradient is taken.
    """

    importance: str = "element1"
    reduction: str = "sum"
    granularity: str = "block"
    attention_blocks: Range = (4, 30)
    mlp_blocks: Range = (4, 30)
    scope: str = "local"
    steps: Count = 1
    seed: Seed = 42
    score_dtype: Text | None = field(default=None, metadata={"since": "later"})

    DEFAULT_RATIO: ClassVar[float] = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("importance", self.importance, IMPORTANCES)
        checks.choice("reduction", self.reduction, tuple(REDUCTIONS))
        checks.choice("granularity", self.granularity, ("block", "channel", "layer"))
        checks.choice("scope", self.scope, ("local", "global"))
        for name in ("attention_blocks", "mlp_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.steps > 1 and self.granularity != "block":
            raise ValueError(f"steps is 1 unless granularity is 'block'; got {self.steps}.")
        if self.score_dtype is not None:
            checks.choice("score_dtype", self.score_dtype, ("float32",))
            if not self.needs_windows:
                raise ValueError("score_dtype is that of gradients, and none are taken here; leave it out.")

    @property
    def needs_windows(self) -> bool:
        return self.importance in TAYLOR and self.granularity != "layer"

    @property
    def statistics_key(self) -> dict[str, str] | None:
        if not self.needs_windows:
            return None
        key = {"kind": "group_scores", "importance": self.importance, "granularity": self.granularity}
        return key if self.score_dtype is None else {**key, "dtype": self.score_dtype}

    @property
    def needs_all_weights(self) -> bool:
        return self.granularity == "channel"

    @property
    def setting(self) -> str:
        if self.target_parameters is not None or self.granularity != "block":
            return f"{super().setting} by {self.granularity}"
        heads, channels = (f"{first}..{last - 1}" for first, last in (self.attention_blocks, self.mlp_blocks))
        return f"{super().setting} of the heads of blocks {heads} and of the channels of blocks {channels}"

    @property
    def reads_weights(self) -> bool:
        return self.importance != "random" and self.granularity != "layer"

    def statistics_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        return {name: (model.get_parameter(name).shape[dim],) for name, dim in self._dims(model).items()}

    def gather(self, model: nn.Module, windows: Tensor, how: Execution = PLAIN) -> dict[str, Tensor]:
        """Scores of the dense model by parameter, one a row or column, for every ratio, reduction, range and scope.

        Backward passes take `tokens_at_once`, or all windows where these predict unlike numbers of tokens.
        """
        return self._index_scores(model, windows, how.progress)

    def check(self, model: nn.Module) -> None:
        super().check(model)
        count = len(anatomy.blocks(model))
        for name in ("attention_blocks", "mlp_blocks") if self.granularity == "block" else ():
            first, last = getattr(self, name)
            if not 0 <= first <= last <= count:
                raise ValueError(
                    f"{name}=({first}, {last}) is not a half-open range within the model's {count} blocks, 0 "
                    f"to {count}."
                )
        ranges = (self.attention_blocks, self.mlp_blocks)
        if self.granularity == "block" and all(first == last for first, last in ranges):
            raise ValueError(
                f"attention_blocks={ranges[0]} and mlp_blocks={ranges[1]} select none of the model's {count} blocks."
            )

    def prune(
        self,
        model: Any,
        windows: Int[Tensor, "count length"] | None,
        dense: Mapping[str, Tensor],
        how: Execution = PLAIN,
    ) -> Report:
        if self.granularity == "block":
            return super().prune(model, windows, dense, how)
        started = time.perf_counter()
        self.refuse(model)
        if self.granularity == "layer":
            return self.reported(_shorten(self, model, how.cut), started)
        scores = self._channel_scores(model, dense)
        return self.reported(_narrow(self, model, scores, how.cut), started)

    def open(self, block: Block, kind: str) -> bool:
        first, last = self.attention_blocks if kind == "attention" else self.mlp_blocks
        return first <= block.index < last

    def share_of(self, block: Block, kind: str, stage: float) -> int:
        """Whole units within width - int(width * (1 - ratio)) channels, as released."""
        size = block.head_dim if kind == "attention" else 1
        width = block.units(kind) * size
        return (width - int(width * (1 - stage * self.asked))) // size

    def choose(
        self, model: nn.Module, windows: Tensor | None, dense: Mapping[str, Tensor], how: Execution = PLAIN
    ) -> list[Kept]:
        blocks = anatomy.blocks(model)
        kept = [Kept.all(block) for block in blocks]
        random = torch.Generator().manual_seed(self.seed)
        for step in range(1, self.steps + 1):
            by_index = dense if step == 1 and dense else self._index_scores(model, windows, how.progress)
            scores = [self._scores(*one, by_index, random) for one in zip(blocks, kept, strict=True)]
            kept = self._next(model, scores, step / self.steps)
            if step < self.steps:
                for block, keep in zip(blocks, kept, strict=True):
                    with homes.held(block.module, changes=True):
                        apply.zero(block, keep)
        return kept

    def _next(self, model: nn.Module, scores: Sequence[Scores], stage: float) -> list[Kept]:
        """What stays once `stage` of what is asked has gone."""
        if self.scope == "local":
            counts = self.even_counts(model, stage)
            return [self.lowest(*one) for one in zip(anatomy.blocks(model), scores, counts, strict=True)]

        def lowest(every: Tensor, costs: Tensor) -> Tensor:
            if self.target_parameters is not None:
                return select.cheapest(every, costs, stage * self.budget(model))
            return select.lowest(every, len(every) - int(len(every) * (1 - stage * self.asked)))

        return self.ranked_together(model, scores, lowest)

    def _scores(
        self, block: Block, kept: Kept, by_index: Mapping[str, Tensor], random: torch.Generator
    ) -> dict[str, Float[Tensor, " units"]]:
        """Group scores of a block's units; those gone already come lowest."""
        scores = {kind: self._group_scores(block, kind, by_index, random) for kind in KINDS}
        return {kind: score.masked_fill(~kept[kind], -torch.inf) for kind, score in scores.items()}

    def _group_scores(
        self, block: Block, kind: str, by_index: Mapping[str, Tensor], random: torch.Generator
    ) -> Float[Tensor, " units"]:
        parts, units = block.parts[kind], block.units(kind)
        if units == 0:
            return torch.zeros(0)
        size = min(part.size for part in parts)
        if self.importance == "random":
            return torch.rand(units, size, generator=random, dtype=torch.float32).sum(1)
        if parts[0].size > size:  # with grouped queries the keys are the group's root
            parts = (parts[1], parts[0], *parts[2:])
        names = [f"{block.name}.{block.parameter(part.projection)[0]}" for part in parts]
        held = [by_index[name][part.index] for name, part in zip(names, parts, strict=True)]
        found = [scores.reshape(units, -1, size).sum(1) for scores in held]
        return REDUCTIONS[self.reduction](torch.stack(found).double()).sum(1)

    def _channel_scores(self, model: Any, dense: Mapping[str, Tensor]) -> Float[Tensor, " width"]:
        width = model.config.hidden_size
        if self.importance == "random":
            return torch.rand(width, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float32)
        by_index = dense or self._index_scores(model, None, None)
        scores = torch.stack(list(by_index.values())).double()
        if self.reduction == "prod":
            return scores.log().sum(0)  # of the same order; the product of hundreds of factors is 0
        return REDUCTIONS[self.reduction](scores)

    def _index_scores(
        self, model: nn.Module, windows: Tensor | None, progress: Progress | None
    ) -> dict[str, Float[Tensor, " index"]]:
        if self.importance == "random":
            return {}
        dtype = None if self.score_dtype is None else getattr(torch, self.score_dtype)
        return index_scores(model, windows, self.importance, self._dims(model), progress, dtype)

    def _dims(self, model: nn.Module) -> dict[str, int]:
        """The dimension along which each matrix holds parts of the groups."""
        if self.granularity == "channel":
            return {name: dim for name, dim in apply.residual(model).items() if "bias" not in name}
        return {
            f"{block.name}.{block.parameter(part.projection)[0]}": matrices.dimension(linear, part.rows)
            for block in anatomy.blocks(model)
            for parts in block.parts.values()
            for part in parts
            if (linear := block.linear(part.projection)).weight.numel()
        }


def _narrow(method: LLMPruner, model: Any, scores: Float[Tensor, " width"], cut: bool) -> Structure:
    """Remove the lowest-scored channels of the residual stream from every parameter that holds them."""
    before, cost, width = State.of(model), _channel_cost(model), len(scores)
    if method.target_parameters is None:
        asked, gone = cost.times(method.asked * width), width - int(width * (1 - method.asked))
    else:
        share = method.asked * getattr(before.size, method.target_of) / getattr(cost, method.target_of)
        asked, gone = cost.times(share), round(share)
    _check_budget(method, asked, cost.times(width - 1))
    rounded = method.rounded(width, gone)
    keep = ~select.lowest(scores, rounded)
    if rounded:
        (apply.narrow if cut else apply.zero_narrow)(model, keep)
        if cut:
            apply.describe(model)
    after = State(before.size.less(cost.times(rounded)), before.blocks, width - rounded)
    return Structure(method.setting, asked, cost.times(gone - rounded).model, before, after)


def _shorten(method: LLMPruner, model: Any, cut: bool) -> Structure:
    """Remove the last blocks."""
    before, blocks = State.of(model), anatomy.blocks(model)
    sizes = [sum(p.numel() for p in block.module.parameters()) for block in blocks]
    if method.target_parameters is None:
        asked, most = round(method.asked * sum(sizes)), round(sum(sizes) * (len(blocks) - 1) / len(blocks))
        gone = int(method.asked * len(blocks) + 1e-9)  # a share of the blocks, however uneven they are
    else:
        asked, most = round(method.asked * getattr(before.size, method.target_of)), sum(sizes[1:])
        lost = torch.tensor([0, *sizes[::-1]]).cumsum(0)
        gone = int((lost - asked).abs().argmin())
    stays = len(blocks) - gone
    _check_budget(method, Size(asked, asked), Size(most, most))
    if cut:
        apply.keep_first(model, stays)
    else:
        for block in blocks[stays:]:
            with homes.held(block.module, changes=True):
                apply.silence(block)
    lost_now = sum(sizes[stays:])
    after = State(before.size.less(Size(lost_now, lost_now)), before.blocks[:stays], before.hidden_size)
    return Structure(method.setting, Size(asked, asked), 0, before, after)


def _channel_cost(model: Any) -> Size:
    """Parameters that one channel of the residual stream holds."""
    inside = tuple(f"{block.name}." for block in anatomy.blocks(model))
    dims, named = apply.residual(model), dict(model.named_parameters())  # tied parameters once
    each = {name: named[name].numel() // named[name].shape[dim] for name, dim in dims.items() if name in named}
    return Size(sum(each.values()), sum(cost for name, cost in each.items() if name.startswith(inside)))


def _check_budget(method: LLMPruner, asked: Size, most: Size) -> None:
    if asked.model > most.model:
        raise ValueError(
            f"{method.setting} is {asked.model:,} parameters, and at most {most.model:,} can be removed; use "
            "a lower ratio."
        )
