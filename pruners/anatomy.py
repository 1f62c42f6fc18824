"""Where each decoder family keeps its blocks, heads and projections: one entry a family, told apart by `model_type`.

attention   query, key, value share one input; output reads the heads' concatenation
MLP         inward projections (gate and up, or fc1) share one input; outward reads the neurons
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pruners.lazy import nn
from pruners.suggest import unknown


@dataclass(frozen=True)
class Family:
    """Dotted names: of the list of blocks within the model, of everything else within a block."""

    blocks: str
    query: str
    key: str
    value: str
    output: str
    inward: tuple[str, ...]
    outward: str
    attention: str = "self_attn"

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """Projections grouped by the input that they share, in the order in which a block runs them."""
        return ((self.query, self.key, self.value), (self.output,), self.inward, (self.outward,))


LLAMA = Family(
    blocks="model.layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.o_proj",
    inward=("mlp.gate_proj", "mlp.up_proj"),
    outward="mlp.down_proj",
)
OPT = Family(
    blocks="model.decoder.layers",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    inward=("fc1",),
    outward="fc2",
)
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "opt": OPT}
FAMILIES |= {f"pruned_{name}": kind for name, kind in FAMILIES.items()}  # what pruners.checkpoint saves


@dataclass(frozen=True)
class Part:
    """What one unit takes of a projection: `size` consecutive rows with their biases, or as many columns."""

    projection: str
    size: int
    rows: bool


@dataclass(frozen=True)
class Block:
    """One decoder block: `name` is its dotted name in the model, e.g. `model.layers.3`."""

    index: int
    name: str
    module: nn.Module
    family: Family

    def linear(self, projection: str) -> nn.Linear:
        """TypeError for a layer that is no plain linear one, or whose weight or bias is computed from others."""
        linear, name = self.module.get_submodule(projection), f"{self.name}.{projection}"
        computed = {"weight", "bias"} - linear._parameters.keys() if isinstance(linear, nn.Linear) else set()
        if computed or nn.utils.parametrize.is_parametrized(linear):
            raise TypeError(
                f"{name} computes its {min(computed, default='weight')} anew in every forward pass, which would undo "
                "pruning; make it permanent first, with torch.nn.utils.prune.remove, "
                "torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm."
            )
        if type(linear) is not nn.Linear:
            kind = type(linear)
            raise TypeError(
                f"{name} is a {kind.__module__}.{kind.__qualname__}; pruning needs a plain torch.nn.Linear. "
                "Merge adapters and load the model unquantised first."
            )
        return linear

    def linears(self) -> dict[str, nn.Linear]:
        """Every projection of the block by its name within the block."""
        return {name: self.linear(name) for names in self.family.shared_inputs for name in names}

    @property
    def shared_inputs(self) -> tuple[tuple[str, ...], ...]:
        """The family's, less the projections that structured pruning has left nothing of."""
        groups = self.family.shared_inputs
        return tuple(names for names in groups if all(self.linear(name).weight.numel() for name in names))

    @property
    def attention(self) -> Any:
        return self.module.get_submodule(self.family.attention)

    @property
    def head_dim(self) -> int:
        """Width of one head, in channels."""
        return self.attention.head_dim

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.linear(self.family.query).out_features // self.head_dim

    @property
    def kv_heads(self) -> int:
        return self.linear(self.family.key).out_features // self.head_dim

    @property
    def channels(self) -> int:
        """Neurons of the MLP."""
        return self.linear(self.family.outward).in_features

    @property
    def parts(self) -> dict[str, tuple[Part, ...]]:
        """What structured pruning removes as one: a KV head with its query heads; a neuron of the MLP."""
        family, width = self.family, self.head_dim
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(
                f"{self.name} shares {self.kv_heads} KV heads among {self.heads} query heads, which does not divide; "
                "structured pruning needs the same number of query heads for every KV head."
            )
        queries = width * (self.heads // max(self.kv_heads, 1))
        return {
            "attention": (
                Part(family.query, queries, rows=True),
                Part(family.key, width, rows=True),
                Part(family.value, width, rows=True),
                Part(family.output, queries, rows=False),
            ),
            "mlp": (*(Part(name, 1, rows=True) for name in family.inward), Part(family.outward, 1, rows=False)),
        }

    def reader(self, kind: str) -> Part:
        """The units' part in the projection that reads what they put out."""
        return self.parts[kind][-1]

    def units(self, kind: str) -> int:
        """How many units of that kind (`attention` or `mlp`) the block has."""
        return {"attention": self.kv_heads, "mlp": self.channels}[kind]

    def unit_cost(self, kind: str) -> int:
        """Parameters that one unit holds: its rows, columns and biases."""
        cost = 0
        for part in self.parts[kind]:
            linear = self.linear(part.projection)
            cost += part.size * (linear.in_features + (linear.bias is not None) if part.rows else linear.out_features)
        return cost


def family(model: nn.Module) -> Family:
    """The model's entry; ValueError says what to add where there is none.

    TypeError for what wraps a model (adapters of peft, data parallelism) and for a model without its head.
    """
    _refuse_wrapped(model)
    model_type = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if model_type not in FAMILIES:
        raise ValueError(
            f"{unknown('decoder family', model_type, FAMILIES)} "
            "To add one, name its blocks and projections in FAMILIES of pruners/anatomy.py."
        )
    kind = FAMILIES[model_type]
    try:
        model.get_submodule(kind.blocks)
    except AttributeError:
        raise TypeError(
            f"A {type(model).__name__} has no {kind.blocks}; pruning needs the whole language model, as "
            "transformers.AutoModelForCausalLM loads it."
        ) from None
    return kind


def _refuse_wrapped(model: nn.Module) -> None:
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if hasattr(model, "merge_and_unload"):
        raise TypeError(f"Got a {kind}; merge its adapters first: model = model.merge_and_unload().")
    if not hasattr(model, "config") and isinstance(getattr(model, "module", None), nn.Module):
        raise TypeError(f"Got a {kind} around a {type(model.module).__name__}; give what it wraps: model.module.")


def blocks(model: nn.Module) -> list[Block]:
    """The decoder blocks in order; ValueError if a block holds linear layers that the family's entry does not name."""
    kind = family(model)
    found = [
        Block(index, f"{kind.blocks}.{index}", module, kind)
        for index, module in enumerate(model.get_submodule(kind.blocks).children())
    ]
    for block in found:
        strangers = {name for name, m in block.module.named_modules() if isinstance(m, nn.Linear)} - set(
            block.linears()
        )
        if strangers:
            raise ValueError(
                f"{block.name} holds linear layers that pruners/anatomy.py does not name: "
                f"{', '.join(sorted(strangers))}. Add them to the family's entry, or merge adapters first."
            )
    return found
