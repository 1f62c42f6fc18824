"""The decoder blocks of a model, their projections, and the units that structured pruning removes as one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from pruners.families import FAMILIES, Family, family, known
from pruners.lazy import Int, Tensor, nn, torch
from pruners.run import matrices
from pruners.run.matrices import Matrix

__all__ = ["FAMILIES", "Block", "Family", "Part", "blocks", "family", "known"]


@dataclass(frozen=True)
class Part:
    """What each unit takes of a projection: rows with their biases, or columns, by their indices."""

    projection: str
    index: Int[Tensor, "units size"]
    rows: bool

    @property
    def size(self) -> int:
        return self.index.shape[1]


@dataclass(frozen=True)
class Follower:
    """A norm of queries or keys, of which each unit takes entries, or children, one a head, by their indices.

    `over_all_heads`: what it divides by is a mean over all heads.
    """

    norm: str
    index: Int[Tensor, "units size"]
    children: bool
    over_all_heads: bool


@dataclass(frozen=True)
class Block:
    """One decoder block: `name` is its dotted name in the model, e.g. `model.layers.3`.

    In a `multi_query` model, all of whose query heads share one KV head, a unit of attention is a query head.
    """

    index: int
    name: str
    module: nn.Module
    family: Family
    config: Any
    multi_query: bool = False

    def linear(self, projection: str) -> Matrix:
        """TypeError for a layer that is no plain linear one, or whose weight or bias is computed from others."""
        if projection in self._of_experts:
            number, which = projection.split(".")[-2:]
            return matrices.of_expert(self.module.get_submodule(self.family.experts), int(number), which)
        return matrices.matrix(self.module.get_submodule(projection), f"{self.name}.{projection}")

    def linears(self) -> dict[str, Matrix]:
        """Every projection of the block by its name within the block."""
        return {name: self.linear(name) for names in self._groups for name in names}

    def parameter(self, projection: str) -> tuple[str, nn.Parameter]:
        """The parameter that holds the projection, and its name within the block."""
        name = f"{projection}.weight"
        if projection in self._of_experts:
            name = f"{self.family.experts}.{matrices.EXPERT[projection.rpartition('.')[2]][0]}"
        return name, self.module.get_parameter(name)

    @property
    def experts(self) -> Any | None:
        """The module that holds the block's routed experts."""
        name = self.family.experts
        return self.module.get_submodule(name) if name and name in dict(self.module.named_modules()) else None

    @cached_property
    def _of_experts(self) -> frozenset[str]:
        return frozenset(name for names in self.expert_groups for name in names)

    @cached_property
    def expert_groups(self) -> tuple[tuple[str, ...], ...]:
        """Experts' projections, grouped by the input that they share: gate and up, then down, expert by expert."""
        if self.experts is None:
            return ()
        found: list[tuple[str, ...]] = []
        for expert in range(len(self.experts.down_proj)):
            name = f"{self.family.experts}.{expert}"
            found += [(f"{name}.gate", f"{name}.up"), (f"{name}.down",)]
        return tuple(found)

    @property
    def _groups(self) -> tuple[tuple[str, ...], ...]:
        family = self.family
        mlp = self.expert_groups or (family.inward, (family.outward,))
        return (family.qkv, (family.output,), *mlp)

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Projections grouped by the input that they share, in the order in which the block runs them.

        Those that structured pruning has left nothing of are left out.
        """
        return tuple(names for names in self._groups if all(self.linear(name).weight.numel() for name in names))

    @property
    def attention(self) -> Any:
        return self.module.get_submodule(self.family.attention)

    @property
    def head_dim(self) -> int:
        """Width of one head, in channels."""
        from pruners.attention_pruned import head_width

        return head_width(self.attention)

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.linear(self.family.output).in_features // self.head_dim

    @property
    def kv_heads(self) -> int:
        if self.family.layout == "separate":
            return self.linear(self.family.qkv[1]).out_features // self.head_dim
        return (self.linear(self.family.qkv[0]).out_features // self.head_dim - self.heads) // 2

    @property
    def queries(self) -> int:
        """Query heads that go as one: those of a KV head, one alone in a multi-query model."""
        return 1 if self.multi_query else self.heads // max(self.kv_heads, 1)

    @property
    def channels(self) -> int:
        """Neurons of the MLP."""
        return self.linear(self.family.outward).in_features

    @property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """What structured pruning removes as one: a KV head with its query heads; a neuron of the MLP."""
        return {"attention": self._attention_parts(), "mlp": self._mlp_parts()}

    def _attention_parts(self) -> tuple[Part, ...]:
        query, key, value = self._rows()
        names = self.family.qkv * (3 // len(self.family.qkv))
        parts = [Part(name, index, rows=True) for name, index in zip(names, (query, key, value), strict=True)]
        width = self.queries * self.head_dim
        output = Part(
            self.family.output,
            torch.arange(self.heads * self.head_dim).view(self.units("attention"), width),
            rows=False,
        )
        return (parts[0], output) if self.multi_query else (*parts, output)

    def _rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Where the units' queries, and the KV heads' keys and values, lie in their matrices: [units, size] each."""
        heads, kv_heads, width = self.heads, self.kv_heads, self.head_dim
        if kv_heads and heads % kv_heads:
            raise ValueError(
                f"{self.name} has {heads} query heads for {kv_heads} KV heads, which is not a multiple; "
                "structured pruning needs the same number of query heads for every KV head."
            )
        grouped = heads // max(kv_heads, 1)
        query = torch.arange(heads * width).view(self.units("attention"), self.queries * width)
        key = torch.arange(kv_heads * width).view(kv_heads, width)
        if self.family.layout == "separate":
            return query, key, key
        if self.family.layout == "stacked" or self.multi_query:
            return query, key + heads * width, key + (heads + kv_heads) * width
        group = torch.arange(kv_heads)[:, None] * (grouped + 2) * width  # where each KV head begins
        return tuple(
            group + torch.arange(first * width, last * width)
            for first, last in ((0, grouped), (grouped, grouped + 1), (grouped + 1, grouped + 2))
        )  # type: ignore[return-value]

    def _mlp_parts(self) -> tuple[Part, ...]:
        names, channels = self.family.inward, torch.arange(self.channels)[:, None]
        inward = [Part(name, channels, rows=True) for name in names]
        if len(names) == 1 and self.linear(names[0]).out_features == 2 * len(channels) > 0:  # gate over up
            inward.append(Part(names[0], channels + len(channels), rows=True))
        return (*inward, Part(self.family.outward, channels, rows=False))

    @property
    def last_parts(self) -> tuple[Part, ...]:
        """What belongs to no unit and goes with the last one: the keys and values of a multi-query model."""
        if not self.multi_query:
            return ()
        _, key, value = (index.reshape(1, -1) for index in self._rows())
        names = self.family.qkv * (3 // len(self.family.qkv))
        return Part(names[1], key, rows=True), Part(names[2], value, rows=True)

    @property
    def followers(self) -> tuple[Follower, ...]:
        """Norms of queries and keys that have a weight for every channel or every head."""
        family = self.family
        found = [self._follower(family.query_norm, self.heads, self.queries)]
        if not self.multi_query:
            found.append(self._follower(family.key_norm, self.kv_heads, min(self.kv_heads, 1)))
        return tuple(follower for follower in found if follower is not None)

    def _follower(self, name: str, heads: int, together: int) -> Follower | None:
        norm = dict(self.module.named_modules()).get(name) if name else None
        if norm is None:
            return None
        units = self.units("attention")
        by_head = torch.arange(heads).view(units, together)
        weight = norm._parameters.get("weight")
        if weight is None:
            return Follower(name, by_head, children=True, over_all_heads=False)
        if weight.ndim > 1:
            return Follower(name, by_head, children=False, over_all_heads=False)
        index = torch.arange(heads * self.head_dim).view(units, together * self.head_dim)
        return Follower(name, index, children=False, over_all_heads=True)

    def reader(self, kind: str) -> Part:
        """The units' part in the projection that reads what they put out."""
        return self.parts[kind][-1]

    def units(self, kind: str) -> int:
        """How many units of that kind (`attention` or `mlp`) the block has."""
        if kind == "mlp":
            return self.channels
        return self.heads if self.multi_query else self.kv_heads

    def unit_cost(self, kind: str) -> int:
        """Parameters that one unit holds: its rows, columns and biases, and what follows them."""
        cost = sum(self._held(part) for part in self.parts[kind])
        if kind == "attention" and self.units(kind):
            cost += sum(self._followed(follower) for follower in self.followers)
        return cost

    def all_units_cost(self, kind: str) -> int:
        """Parameters that all units of that kind hold together."""
        return self.units(kind) * self.unit_cost(kind) + self.last_cost(kind)

    def lost(self, kind: str, kept: Tensor) -> int:
        """Parameters that cutting leaves fewer, where `kept` says which units of that kind stay."""
        return int((~kept).sum()) * self.unit_cost(kind) + (0 if kept.any() else self.last_cost(kind))

    def last_cost(self, kind: str) -> int:
        """What goes with the last unit beside its own: the keys and values that all heads of multi-query share."""
        return sum(map(self._held, self.last_parts)) if kind == "attention" and self.units(kind) else 0

    def _held(self, part: Part) -> int:
        linear = self.linear(part.projection)
        return part.size * (linear.in_features + (linear.bias is not None) if part.rows else linear.out_features)

    def _followed(self, follower: Follower) -> int:
        norm, size = self.module.get_submodule(follower.norm), follower.index.shape[1]
        if follower.children:
            (listed,) = norm.children()
            return size * sum(p.numel() for p in next(listed.children()).parameters())
        return size * sum(p[0].numel() for p in norm.parameters(recurse=False))


def modules(model: nn.Module) -> list[nn.Module]:
    """The decoder blocks' modules in order, whatever stands in the place of their projections."""
    return list(model.get_submodule(family(model).blocks).children())


def blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks in order; ValueError if a block holds matrices that the family's entry does not name."""
    kind, config = family(model), getattr(model, "config", None)
    found = [Block(i, f"{kind.blocks}.{i}", module, kind, config) for i, module in enumerate(modules(model))]
    for block in found:
        _check_named(block)
    one_for_all = max((b.kv_heads for b in found), default=0) == 1 < max(b.heads for b in found)
    return [replace(block, multi_query=True) for block in found] if one_for_all else found


def _check_named(block: Block) -> None:
    """ValueError for projections that are not there, and for matrices and stacks of matrices that no entry names."""
    try:
        linears = block.linears()
    except AttributeError as error:
        raise ValueError(
            f"{block.name} does not match its family's entry in pruners/families.py ({error}); correct the "
            "entry, or use another model."
        ) from None
    named = {block.parameter(name)[0] for name in linears} | {f"{block.family.router}.weight"}
    norms = tuple(f"{name}." for name in (block.family.query_norm, block.family.key_norm) if name)
    strangers = [
        name
        for name, parameter in block.module.named_parameters()
        if parameter.ndim > 1 and name not in named and not name.startswith(norms)
    ]
    if strangers:
        raise ValueError(
            f"{block.name} has matrices that pruners/families.py does not list: {', '.join(sorted(strangers))}. Add "
            "them to the family's entry, or merge adapters first."
        )
