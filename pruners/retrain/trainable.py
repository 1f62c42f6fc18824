"""What is trained, and the tensors of one model that this selects.

Zimmer et al. 2023, arXiv:2312.15230 (PERP): on OPT-2.7B to 30B, biases are 0.03 to 0.01 % of all parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from pruners import anatomy
from pruners.anatomy import Block
from pruners.interface import checks
from pruners.interface.checks import Flag
from pruners.interface.suggest import unknown
from pruners.lazy import Tensor, nn, torch
from pruners.retrain.adapters import Adapter, LoRA, LoRAPrune, LowRank
from pruners.retrain.masks import BitMask
from pruners.run.matrices import Matrix
from pruners.weights import homes

ADAPTERS = "pruners.retrain.LoRA, LoRAPrune, ScaleLoRA or MaskLoRA with its rank"
SHARED = ("rank", "alpha", "dropout")  # one setting for the head and the blocks
HEAD = LoRA(rank=16, alpha=32, dropout=0.0, merge=True)  # PERP's released defaults


@dataclass(frozen=True)
class Trainable:
    """What is trained; the rest is frozen.

    `biases`: those of linear layers and of layer norms.  `norms`: weights and biases of every norm.  `head`: plain
    LoRA on the output matrix, of the adapters' rank and alpha; 16 and 32 where they have none.  `embeddings`: tokens
    and positions, and with them a head that is tied.  `adapters`: LoRA, LoRAPrune, ScaleLoRA or MaskLoRA in the decoder
    blocks.  `weights`: all else, linear layers and the routers of experts, pruned weights held at zero; within one
    decoder block routers stay, as no gradient says which expert a token should go to.  Raises ValueError where adapters
    would sit on weights that are trained anyway.
    """

    biases: Flag = False
    norms: Flag = False
    head: Flag = False
    embeddings: Flag = False
    adapters: Annotated[LowRank, checks.instance(LowRank, ADAPTERS)] | None = None
    weights: Flag = False

    def __post_init__(self) -> None:
        checks.fields(self)
        if self.weights and (self.adapters or self.head):
            raise ValueError("weights=True already trains everything; drop adapters= and head=.")

    @classmethod
    def full(cls) -> Trainable:
        """Every parameter, under the mask."""
        return cls(biases=True, norms=True, embeddings=True, weights=True)

    def attach(self, model: nn.Module, seed: int = 0, untie: bool = True, spread: bool = False) -> Attached:
        """Freeze `model` but for what is selected, adapters in place; `seed` starts the adapters.

        With `untie`, a head that shares the embeddings' matrix gets one of its own when its adapter merges.  What is
        to be `spread` over ranks becomes float32 when it is, part by part.
        Raises ValueError where nothing is selected, a projection does not exist or a rank is too large.
        """
        attached = self._attach(model, {f"{block.name}.": block for block in anatomy.blocks(model)}, seed, "", spread)
        attached.unties = untie
        if not attached.tensors:
            attached.detach()
            raise ValueError(
                f"{self!r} selects nothing: {type(model).__name__} has no such parameter. LLaMA has no biases, for "
                "example; select norms or adapters."
            )
        return attached

    def attach_to_block(self, block: Block, seed: int = 0, among: Collection[nn.Parameter] | None = None) -> Attached:
        """The same within one decoder block, which holds no head and no embeddings, or `among` some of its parameters.

        Nothing may be selected there, nor in a block that structured pruning has left nothing of.
        """
        self.check_block(block)
        return self._attach(block.module, {"": block}, seed, f"{block.name}.", among=among)

    def check_within_blocks(self) -> None:
        """ValueError for what no decoder block holds, or cannot take in."""
        if self.head or self.embeddings:
            raise ValueError("Decoder blocks have no head and no embeddings; drop head= and embeddings= here.")
        if isinstance(self.adapters, LoRA) and not self.adapters.merge:
            raise ValueError("Block-wise reconstruction needs adapters that can be merged, e.g. MaskLoRA.")

    def check_block(self, block: Block) -> None:
        """ValueError for a block that `attach_to_block` would refuse; no value of its weights is read."""
        self.check_within_blocks()
        targets = list(self._targets(block.linears()))
        for name, linear in targets:
            full = f"{block.name}.{name}"
            if self.adapters:
                self.adapters.check(full, _plain(full, linear))
        matrices = {p for _, p in map(block.parameter, block.linears())}
        trained = (self.adapters and targets) or _selected(self, block.module, matrices)
        if not trained and block.shared_inputs:
            raise ValueError(f"{self!r} selects nothing in {block.name}. Select norms or adapters.")

    def changing(self, block: Block) -> set[nn.Parameter]:
        """What training moves within a decoder block: the parameters that are selected, and what adapters sit on."""
        linears = block.linears()
        adapted: set[Any] = {linear.weight for _, linear in self._targets(linears)} if self.adapters else set()
        return {*_selected(self, block.module, {p for _, p in map(block.parameter, linears)}).values(), *adapted}

    def _attach(
        self,
        root: nn.Module,
        blocks: Mapping[str, Block],
        seed: int,
        prefix: str,
        spread: bool = False,
        among: Collection[nn.Parameter] | None = None,
    ) -> Attached:
        """To what `blocks`, by what stands in front of their names within `root`, hold."""
        required = {p: p.requires_grad for p in root.parameters()}
        linears = {where + name: linear for where, block in blocks.items() for name, linear in block.linears().items()}
        matrices = {where: dict(map(block.parameter, block.linears())) for where, block in blocks.items()}
        inside = {where + name: p for where, named in matrices.items() for name, p in named.items()}
        selected = _selected(self, root, set(inside.values()), routers=not prefix)
        targets = {name: _plain(prefix + name, linear) for name, linear in self._targets(linears) if self.adapters}
        if among is not None:
            selected = {name: p for name, p in selected.items() if p in among}
            targets = {name: linear for name, linear in targets.items() if linear.weight in among}
        changing = {*selected.values(), *(linear.weight for linear in targets.values())}
        masks: dict[str, BitMask] = {}
        adapters: list[Adapter] = []
        for where, block in blocks.items():
            with homes.held(block.module):
                here = {where + name: p for name, p in matrices[where].items() if p in changing}
                masks |= {name: BitMask.of(p.data) for name, p in here.items()}
                for name in block.linears():
                    if self.adapters and (linear := targets.get(where + name)) is not None:
                        mask = masks[f"{where}{name}.weight"]
                        adapters.append(self.adapters.attach(prefix + where + name, linear, mask, seed))
        if self.head:
            head: Any = root.get_output_embeddings()  # type: ignore[operator]
            with homes.held(head):
                adapters.append(self._on_head().attach("head", head, BitMask.of(head.weight.data), seed))
        return Attached(root, blocks, inside, selected, adapters, masks, required, spread)

    def _on_head(self) -> LoRA:
        given = {name: getattr(self.adapters, name) for name in SHARED if hasattr(self.adapters, name)}
        return replace(HEAD, **given)

    def _targets(self, linears: Mapping[str, Matrix]) -> Iterator[tuple[str, Matrix]]:
        wanted = self.adapters.targets if self.adapters else None
        known = {part for name in linears for part in (name.rsplit(".", 1)[-1], ".".join(name.split(".")[-2:]))}
        for target in wanted or ():
            if target not in known:
                raise ValueError(unknown("projection", target, known))
        for name, linear in linears.items():
            asked = wanted is None or any(f".{name}".endswith(f".{target}") for target in wanted)
            if asked and linear.weight.numel():  # structured pruning may have left nothing of a projection
                yield name, linear


@dataclass
class Attached:
    """The trained tensors of `root`, in float32, by name; over with `merge` or `detach`, whichever comes first.

    `blocks` are those of `root`, by what stands in front of their names, and `matrices` theirs; `masks` the survivors
    of the matrices that training changes, when it started; `required` the gradient flags before it.  `parameters`
    counts the model's, a tied head once, and the adapters'.
    """

    root: nn.Module
    blocks: Mapping[str, Block]
    matrices: Mapping[str, nn.Parameter]
    tensors: dict[str, nn.Parameter]
    adapters: list[Adapter]
    masks: dict[str, BitMask]
    required: dict[nn.Parameter, bool]
    spread: bool = False
    unties: bool = True
    untied: bool = False
    _dtypes: dict[nn.Parameter, torch.dtype] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.parameters = sum(p.numel() for p in self.required)
        self._dtypes = {p: p.dtype for p in self.tensors.values()}
        homes.stay(self.root, self._dtypes)
        for p in self.required:
            p.requires_grad_(p in self._dtypes)
        for p in () if self.spread else self._dtypes:
            p.data = self.widened(p)
        for adapter in self.adapters:
            _replace(self.root, adapter.linear, adapter.module)
            self.tensors |= {f"{adapter.name}.A": adapter.a, f"{adapter.name}.B": adapter.b}
            self.parameters += adapter.a.numel() + adapter.b.numel()
            homes.add(self.root, (adapter.a, adapter.b))

    @property
    def trained(self) -> int:
        return sum(p.numel() for p in self.tensors.values())

    @property
    def share(self) -> float:
        """Trained parameters as a share of all."""
        return self.trained / self.parameters

    @property
    def sparsity(self) -> float:
        """The zeros' share of the blocks' matrices."""
        zeros = weights = 0
        for where, block in self.blocks.items():
            with homes.held(block.module):
                matrices = [p.detach() for name, p in self.matrices.items() if name.startswith(where)]
                zeros += sum(int((p == 0).sum()) for p in matrices)
                weights += sum(p.numel() for p in matrices)
        return zeros / weights if weights else 0.0

    @property
    def merges(self) -> bool:
        return any(_merges(adapter) for adapter in self.adapters)

    @property
    def keeps_sparsity(self) -> bool:
        """Whether pruned weights stay zero; plain LoRA that merges fills them."""
        return all(a.kind.keeps_sparsity or a.on_head or not _merges(a) for a in self.adapters)

    def widened(self, p: nn.Parameter) -> Tensor:
        """A parameter's value in the type in which it goes through training."""
        return p.data.float() if p in self._dtypes else p.data

    def narrowed(self, p: nn.Parameter, value: Tensor) -> Tensor:
        """`value` in the type that the parameter had before."""
        return value.to(self._dtypes.get(p, value.dtype))

    def mask_gradients(self) -> None:
        """No gradient, hence no step, for pruned weights."""
        for name, mask in self.masks.items():
            gradient = self.matrices[name].grad
            if gradient is not None:
                mask.apply(gradient)

    def lost_by_merging(self) -> float:
        """|s BA . (1 - M)| / |s BA|: what LoRA-Prune trains and merging drops; 0 for the other kinds."""
        sizes = [adapter.dropped() for adapter in self.adapters if isinstance(adapter.kind, LoRAPrune)]
        lost, whole = (sum(size[which] for size in sizes) for which in (0, 1))
        return (lost / whole) ** 0.5 if whole else 0.0

    def merge(self) -> None:
        """Adapters into their matrices, dtypes and gradient flags as before; plain LoRA stays unless it is to merge.

        Raises AssertionError if a weight that was pruned is not zero.
        """
        self._end(list(filter(_merges, self.adapters)), merging=True)

    def detach(self) -> None:
        """Without merging: what the adapters learned is lost."""
        self._end(self.adapters, merging=False)

    def _end(self, leaving: Sequence[Adapter], merging: bool) -> None:
        """Of these adapters and of what is trained, part by part of the model."""
        left = set(self.required)
        for where, block in self.blocks.items():
            here, mine = set(block.module.parameters()), [a for a in leaving if a.name.startswith(f"{block.name}.")]
            with homes.held(block.module, changes=bool(mine) or not here.isdisjoint(self._dtypes)):
                self._out(mine, merging)
                self._restore(left & here)
                for name, mask in self.masks.items() if merging and self.keeps_sparsity else ():
                    if name.startswith(where):
                        mask.check(name, self.matrices[name])
            left -= here
        around = homes.around_the_blocks(self.root)
        mine = [a for a in leaving if a.on_head]
        with homes.held(*around, changes=bool(mine) or not left.isdisjoint(self._dtypes)):
            self._out(mine, merging)
            self._restore(left)

    def _out(self, adapters: Sequence[Adapter], merging: bool) -> None:
        for adapter in adapters:
            _replace(self.root, adapter.module, adapter.linear)
            if merging and adapter.on_head and self.unties:  # what is merged into the head must not reach embeddings
                self.untied = untie(self.root)
            if merging:
                adapter.merge()
            homes.go(self.root, (adapter.a, adapter.b))

    def _restore(self, parameters: set[nn.Parameter]) -> None:
        for p in parameters:
            p.data = self.narrowed(p, p.data)
            p.requires_grad_(self.required[p])
            p.grad = None
        homes.go(self.root, parameters)


def untie(model: Any) -> bool:
    """Give a head that shares the embeddings' weight one of its own; False where it has one already."""
    head = model.get_output_embeddings()
    if head.weight is not model.get_input_embeddings().weight:
        return False
    head.weight = nn.Parameter(head.weight.data.clone())
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return True


def _merges(adapter: Adapter) -> bool:
    return getattr(adapter.kind, "merge", True)


def _plain(name: str, linear: Matrix) -> nn.Linear:
    if isinstance(linear, nn.Linear):
        return linear
    raise ValueError(
        f"{name} is not a torch.nn.Linear, which adapters need; train biases, norms or all weights instead."
    )


def _selected(
    wanted: Trainable, root: nn.Module, matrices: set[nn.Parameter], routers: bool = False
) -> dict[str, nn.Parameter]:
    """By name, each once; `matrices` are those of the blocks, `routers` whether those of experts are weights."""
    chosen: set[nn.Parameter] = set(matrices) if wanted.weights else set()
    for module in root.modules():
        norm = _is_norm(module)
        for name, parameter in module.named_parameters(recurse=False):
            if name == "bias":
                takes = wanted.biases or (wanted.norms and norm)
            else:
                takes = wanted.norms if norm else wanted.weights and (routers or isinstance(module, nn.Linear))
            if takes:
                chosen.add(parameter)
    embeddings: set[Any] = {module.weight for module in root.modules() if isinstance(module, nn.Embedding)}
    chosen = chosen | embeddings if wanted.embeddings else chosen - embeddings
    return {name: p for name, p in root.named_parameters() if p in chosen and p.numel()}


def _is_norm(module: nn.Module) -> bool:
    """By its one-dimensional weight, or its name: Cohere's norms of queries and keys have a row for each head."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and (weight.ndim == 1 or type(module).__name__.endswith("Norm"))


def _replace(root: nn.Module, old: nn.Module, new: nn.Module) -> None:
    name = next(name for name, module in root.named_modules() if module is old)
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, new)
