"""FLAP: remove the heads and channels whose outputs fluctuate least, and replace them by their mean, as a bias.

    S[i] = Var(x_i) * sum_o W[o, i]^2        WIFV: the fluctuation that input i of the last projection passes on
    S[i] = Var(x_i)                          IFV
    S[i] = mean_o |W[o, i]| * ||x_i||        WIFN
    z    = (S - mean S) / std S              within a block's attention or MLP, so that all share one threshold (AL)
    b   += W[:, pruned] @ mean(x)[pruned]    bias compensation: the mean output of what is removed

An et al. 2024, arXiv:2312.11983.  x are the inputs of the output projection (a head's score is the mean of z over its
channels) and of the MLP's last projection, on the dense model in one pass.  What is removed, by `structure`:

    AL-AM   one threshold over all heads and channels, where the removed parameters come closest to the ratio
    AL-MM   the `heads_removed` lowest query heads of the model; then channels of the model up to the ratio
    UL-UM   the ratio of each block's heads and of its channels
    UL-MM   heads_removed / blocks heads of each block (the reference rounds down); then its channels up to the ratio

The ratio is a share of the blocks' projections.  A head costs the parameters that it really holds, so any family, head
size and grouping works; KV heads go with their query heads.

`reference=True` is the released code's arithmetic, departures from the formulas above included: a running variance that
skips the first window, the attention metric squared, a head that costs 170 channels (512/3 as an integer) whatever its
size, the unit at the threshold removed too, means in float16, and no support for grouped-query attention (refused).
Units of one score are counted in order there, too, but in AL-AM; the released UL keeps all that tie at the threshold
and its AL-MM removes them (dead channels tie).  That variance is 0 after one window, so it needs two or more to rank
anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pruners import anatomy, calibrate, select
from pruners.anatomy import Block
from pruners.apply import KINDS, Kept
from pruners.calibrate import PLAIN, Execution, Moments
from pruners.interface import checks
from pruners.interface.checks import Flag, Number
from pruners.lazy import Bool, Float, Int, Tensor, nn, torch
from pruners.run.matrices import Matrix
from pruners.structured import Structured, by_unit, readers
from pruners.weights import homes

METRICS = ("WIFV", "IFV", "WIFN")
STRUCTURES = ("AL-AM", "AL-MM", "UL-UM", "UL-MM")
STATISTICS = ("mean", "variance", "mean_square", "released_fluctuation")


def score(
    metric: str, weight: Float[Tensor, "out inp"], fluctuation: Float[Tensor, " inp"], norm: Float[Tensor, " inp"]
) -> Float[Tensor, " inp"]:
    if metric == "IFV":
        return fluctuation
    if metric == "WIFV":
        return fluctuation * weight.float().square().sum(0)
    return (weight.float().abs() * norm).mean(0)


def standardised(score: Float[Tensor, " inp"]) -> Float[Tensor, " inp"]:
    """Zero mean and unit (unbiased) deviation; zero where all scores are equal."""
    deviation = score.std() if len(score) > 1 else score.new_zeros(())
    return (score - score.mean()) / deviation if deviation > 0 else torch.zeros_like(score)


def repair(
    weight: Float[Tensor, "out inp"], mean: Float[Tensor, " inp"], gone: Bool[Tensor, " inp"]
) -> Float[Tensor, " out"]:
    return weight.float()[:, gone] @ mean.float()[gone]


@dataclass(frozen=True)
class Flap(Structured):
    """`heads_removed` counts query heads of the whole model, for the MM structures; `bias` is bias compensation."""

    metric: str = "WIFV"
    structure: str = "AL-AM"
    heads_removed: Number | None = None
    bias: Flag = True
    reference: Flag = False

    statistics_key = {"kind": "moments"}  # noqa: RUF012  (all metrics, structures and ratios share them)

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.choice("metric", self.metric, METRICS)
        checks.choice("structure", self.structure, STRUCTURES)
        if (self.heads_removed is not None) != self.structure.endswith("MM"):
            said = (
                "needs heads_removed"
                if self.heads_removed is None
                else "chooses the number of heads itself; drop heads_removed"
            )
            raise ValueError(f"structure {self.structure} {said} (query heads of the whole model; AL-MM and UL-MM).")
        if self.reference and self.target_parameters is not None:
            raise ValueError("reference=True uses the released code's budget; give a ratio, or drop reference.")

    @property
    def walks(self) -> bool:
        return True

    def statistics_shapes(self, model: nn.Module) -> dict[str, tuple[int, ...]]:
        linears = {
            f"{block.name}.{name}": block.linear(name) for block in anatomy.blocks(model) for (name,) in readers(block)
        }
        return {f"{name}.{kind}": (linear.in_features,) for name, linear in linears.items() for kind in STATISTICS}

    def gather(
        self, model: nn.Module, windows: Int[Tensor, "count length"], how: Execution = PLAIN
    ) -> dict[str, Tensor]:
        """Moments of the inputs of each block's last projections, as `<projection>.<statistic>`, in float32."""
        found: dict[str, Tensor] = {}
        total = len(anatomy.blocks(model))
        for block, seen in calibrate.walk(model, windows, Moments, how, sequential=False, groups=readers):
            for name, moments in seen.items():
                for statistic in STATISTICS:
                    found[f"{block.name}.{name}.{statistic}"] = getattr(moments, statistic).float()
            how.report(block, total)
        return found

    def check(self, model: nn.Module) -> None:
        super().check(model)
        if self.reference and any(block.heads != block.kv_heads for block in anatomy.blocks(model)):
            raise ValueError(
                "The released code does not support grouped-query attention; drop reference=True for this model."
            )
        if self.heads_removed is not None:
            for part in self._parts(model):
                self._counts(model, part)

    def choose(
        self, model: nn.Module, windows: Tensor | None, dense: Mapping[str, Tensor], how: Execution = PLAIN
    ) -> list[Kept]:
        blocks = anatomy.blocks(model)
        scores = [self._scores(block, dense) for block in blocks]
        if self.structure.startswith("AL"):
            return self.ranked_together(model, scores, partial(self._gone_of_all, model))
        if self.structure == "UL-UM":
            per_block = self.even_counts(model)
        else:
            per_block = [self._counts(model, part) for part in self._parts(model)]
        return [self.lowest(*one) for one in zip(blocks, scores, per_block, strict=True)]

    def repairs(
        self, block: Block, kept: Kept, dense: Mapping[str, Tensor]
    ) -> list[tuple[Matrix, Float[Tensor, " out"]]]:
        found = []
        for kind in KINDS:
            part = block.reader(kind)
            linear = block.linear(part.projection)
            gone = torch.zeros(linear.in_features, dtype=torch.bool)
            gone[part.index[~kept[kind]].flatten()] = True
            if self.bias and gone.any():
                mean = dense[f"{block.name}.{part.projection}.mean"].to(linear.weight.device)
                found.append((linear, repair(linear.weight, mean.half() if self.reference else mean, gone)))
        return found

    def added_parameters(self, block: Block, kind: str) -> int:
        linear = block.linear(block.reader(kind).projection)
        return linear.out_features if self.bias and linear.bias is None else 0

    def _scores(self, block: Block, dense: Mapping[str, Tensor]) -> dict[str, Float[Tensor, " units"]]:
        with homes.held(block.module):
            return {kind: self._unit_scores(block, kind, dense) for kind in KINDS}

    def _unit_scores(self, block: Block, kind: str, dense: Mapping[str, Tensor]) -> Float[Tensor, " units"]:
        projection = block.reader(kind).projection
        weight, name = block.linear(projection).weight, f"{block.name}.{projection}"
        seen = {statistic: dense[f"{name}.{statistic}"].to(weight.device) for statistic in STATISTICS}
        fluctuation = seen["released_fluctuation" if self.reference else "variance"]
        found = score(self.metric, weight, fluctuation, seen["mean_square"].sqrt())
        if self.reference and kind == "attention":
            found = found.square()
        if self.structure.startswith("UL"):
            return by_unit(block, kind, found).sum(1)
        return by_unit(block, kind, standardised(found)).mean(1)

    def _gone_of_all(
        self, model: nn.Module, scores: Float[Tensor, " units"], costs: Int[Tensor, " units"]
    ) -> Bool[Tensor, " units"]:
        """What goes of all heads of the model, which come first, and all its channels."""
        heads = sum(block.units("attention") for block in anatomy.blocks(model))
        if self.structure == "AL-MM":
            counts = self._counts(model, anatomy.blocks(model))
            gone = select.lowest(scores[:heads], counts["attention"])
            if self.reference:
                return torch.cat([gone, select.lowest(scores[heads:], counts["mlp"])])
            left = self.budget(model) - int(costs[:heads][gone].sum())
            return torch.cat([gone, select.cheapest(scores[heads:], costs[heads:], left)])
        if self.reference:
            return scores <= released_threshold(scores, heads, self.asked)
        return select.cheapest(scores, costs, self.budget(model))

    def _parts(self, model: nn.Module) -> list[list[Block]]:
        """What shares a number of heads: each block (UL-MM), or all of them (AL-MM)."""
        blocks = anatomy.blocks(model)
        return [[block] for block in blocks] if self.structure == "UL-MM" else [blocks]

    def _counts(self, model: nn.Module, part: Sequence[Block]) -> dict[str, int]:
        """KV heads and channels that go from these blocks; ValueError where they have not so many."""
        blocks = anatomy.blocks(model)
        heads = self._heads(blocks, len(blocks) // len(part))
        if self.reference:
            channels = _released_channels(blocks[0], len(part), self.asked, heads)
        else:
            own, every = (sum(b.all_units_cost(kind) for b in some for kind in KINDS) for some in (part, blocks))
            left = self.budget(model) * own / max(every, 1) - self._cost_of_heads(part, heads)
            channels = _closest(left, _mean_cost(part, "mlp"), sum(self.refund(block, "mlp") for block in part))
        there = [sum(block.units(kind) for block in part) for kind in KINDS]
        if not (0 <= heads <= there[0] and 0 <= channels <= there[1]):
            raise ValueError(
                f"heads_removed={self.heads_removed} at {self.setting} means that {heads:,} of {there[0]:,} KV heads "
                f"and {channels:,} of {there[1]:,} channels are removed"
                f"{f' in {part[0].name}' if self.structure == 'UL-MM' else ''}; choose heads_removed so that both "
                "numbers are possible."
            )
        return {"attention": heads, "mlp": channels}

    def _cost_of_heads(self, part: Sequence[Block], count: int) -> float:
        """What so many KV heads take along, of one block; of several on the average."""
        costs = [self.in_order(block, "attention") for block in part]
        if len(costs) == 1:
            return int(costs[0][:count].sum())
        return float(count * torch.cat(costs).double().mean()) if count else 0.0

    def _heads(self, blocks: Sequence[Block], parts: int) -> int:
        """KV heads that go from each of so many parts of the model."""
        assert self.heads_removed is not None
        grouping = {block.queries for block in blocks if block.units("attention")} or {1}
        if len(grouping) > 1:
            told = " and ".join(map(str, sorted(grouping)))
            raise ValueError(
                f"structure {self.structure} counts query heads, and blocks of this model have {told} of them for a KV "
                "head; use AL-AM or UL-UM."
            )
        queries = grouping.pop()
        if self.heads_removed % (parts * queries) and not self.reference:
            raise ValueError(
                f"heads_removed is a multiple of {parts * queries} here ({queries} query heads for a KV head, "
                f"{self.structure}); got {self.heads_removed}."
            )
        return self.heads_removed // (parts * queries)


def _mean_cost(blocks: Sequence[Block], kind: str) -> float:
    return sum(block.all_units_cost(kind) for block in blocks) / max(sum(block.units(kind) for block in blocks), 1)


def _closest(left: float, cost: float, refund: int) -> int:
    """Of units of which the first costs `refund` less: how many cost closest to `left`, below 0 where that is."""
    count = round((left + refund) / cost) if cost else 0
    if count > 0 and abs(count * cost - refund - left) < abs(left):
        return count
    return min(round(left / cost), 0) if cost else 0


def released_threshold(flat: Float[Tensor, " units"], heads: int, ratio: float) -> Tensor:
    """The score at which the cumulative cost of what stays, best first, is closest to 1 - ratio; it goes itself.

    `flat` holds the scores of the `heads` heads first.  A head costs int(512 / 3) = 170 channels.
    """
    ordered, order = flat.sort(descending=True)
    cost = torch.ones_like(order)
    cost[order < heads] = 170
    return ordered[(cost.cumsum(0) - cost.sum() * (1 - ratio)).abs().argmin()]


def _released_channels(block: Block, blocks: int, ratio: float, heads: int) -> int:
    """Channels that are left to go once `heads` are gone, counting three matrices an MLP and square attention."""
    width, channels = block.linear(block.family.qkv[0]).in_features, block.channels
    wanted = blocks * ratio * (3 * channels * width + 4 * width * width)
    return int((wanted - 4 * width * heads * block.head_dim) / (3 * width))
