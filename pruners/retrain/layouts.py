"""Where weights are while several ranks train a model: whole on every rank, or sharded (FSDP2).

Every rank takes its part of each batch, and gradients are summed; since losses are divided by the whole batch's tokens,
the sum is the whole batch's gradient.  A model in place is sharded block by block by torch.distributed.fsdp: a rank
keeps its rows of every parameter, of their gradients and of AdamW's moments, and the whole of one block at a time.
`fully_shard` changes the classes of modules and the parameters in them for good, so it gets modules of their own that
share the model's tensors: the model itself stays what it is, and gets its values back in the end.

Bytes that a rank keeps of n trained parameters and m frozen ones of s bytes each, on N ranks, where blocks have p:

    shards      (16 n + s m) / N         float32 with gradient and two moments
    masks       n / (8 N), with adapters m / 8 of the matrices that they sit on
    whole       parameters of the largest two groups (a block and the one fetched ahead, or embeddings and head) and
                one's gradients, 4 bytes each where they are trained
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pruners import anatomy
from pruners.lazy import Tensor, nn, no_grad, torch
from pruners.retrain import state
from pruners.retrain.masks import BitMask, refuse_back
from pruners.retrain.trainable import Attached
from pruners.run.ranks import Ranks
from pruners.weights import homes

Saved = tuple[dict[str, Tensor], dict[str, Any]]


class Replicated:
    """Every rank has all weights: one process alone, or weights that each rank brings from home for itself.

    `model` is what goes through passes, `tensors` what is trained, by name.
    """

    spread = False

    def __init__(self, attached: Attached, ranks: Ranks) -> None:
        self.attached, self.ranks = attached, ranks
        self.model: Any = attached.root
        self.tensors: dict[str, nn.Parameter] = attached.tensors

    def collect(self, loss: Tensor) -> None:
        """Loss and gradients of the whole batch, in place; none for pruned weights."""
        gradients = [p.grad for p in self.tensors.values() if p.grad is not None] if self.ranks.count > 1 else []
        self.ranks.add_up([loss, *gradients])
        self.attached.mask_gradients()

    def clip(self, most: float) -> Tensor:
        """Shorten the gradient to that norm; returns the norm that it had."""
        return torch.nn.utils.clip_grad_norm_(list(self.tensors.values()), most)

    def bring_back(self) -> None:
        """The trained values into the model; nothing can be trained any more."""

    def save(self, path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        if self.ranks.rank == 0:
            state.save(path, tensors, about)
        self.ranks.wait()

    def load(self, path: Path, mark: str) -> Saved | None:
        """What `save` has left there, by whichever number of ranks."""
        return state.load(path, mark, self.ranks)


class Sharded:
    """Every rank has its rows of each parameter; the model's own are placeholders until `bring_back`.

    `tensors` are this rank's rows.  An error meanwhile leaves a model of placeholders, which no rank can mend alone.
    """

    spread = True

    def __init__(self, attached: Attached, ranks: Ranks) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        self.attached, self.ranks = attached, ranks
        root: Any = attached.root
        self.model: Any = _with_modules_of_its_own(root)
        self._device: torch.device = root.device
        self._mesh = init_device_mesh(root.device.type, (ranks.count,))
        self._sharded: dict[nn.Parameter, Any] = {}
        for block in anatomy.modules(self.model):
            block.forward = _owning(block.forward)
        for module in (*anatomy.modules(self.model), self.model):
            self._shard(module, root.device)
        self._summed = {name: self._sharded[p] for name, p in attached.tensors.items()}
        self.tensors = {name: nn.Parameter(p.to_local().detach()) for name, p in self._summed.items()}
        trained = {p: name for name, p in attached.tensors.items()}
        matrices = {
            name: trained[p] for name, p in attached.matrices.items() if p in trained and name in attached.masks
        }
        self._masks = {ours: BitMask.of(self.tensors[ours].data) for ours in matrices.values()}
        for name in matrices:  # of all rows
            del attached.masks[name]

    def _shard(self, module: nn.Module, device: torch.device) -> None:
        """One group: gathered at once when the module runs."""
        from torch.distributed.fsdp import fully_shard

        places = {p: (inner, name) for inner in module.modules() for name, p in _whole(inner)}
        empty = {p for p in places if not p.numel()}  # what structured pruning has left nothing of
        for p in places:
            p.data = self.attached.widened(p).contiguous()
        group = fully_shard(module, mesh=self._mesh, reshard_after_forward=True, ignored_params=empty)
        group.set_gradient_divide_factor(1.0)  # the losses are divided already
        group.set_force_sum_reduction_for_comms(True)  # which gloo has
        group.set_reduce_scatter_unused_params(True)
        for p, (inner, name) in places.items():
            if p in empty:
                continue
            self._sharded[p] = inner._parameters[name]
            p.data = homes.placeholder(p, device)

    def collect(self, loss: Tensor) -> None:
        """The whole batch's loss, and this rank's rows of its gradients; none for pruned weights."""
        self.ranks.add_up([loss])
        for name, p in self.tensors.items():
            summed = self._summed[name]
            p.grad, summed.grad = None if summed.grad is None else summed.grad.to_local(), None
            if name in self._masks and p.grad is not None:
                self._masks[name].apply(p.grad)

    def clip(self, most: float) -> Tensor:
        """Shorten the whole gradient to that norm; returns the norm that it had."""
        gradients = [p.grad for p in self.tensors.values() if p.grad is not None]
        squared = torch.nn.utils.get_total_norm(gradients).square()
        self.ranks.add_up([squared])
        norm = squared.sqrt()
        torch.nn.utils.clip_grads_with_norm_(list(self.tensors.values()), most, norm)
        return norm

    @no_grad
    def bring_back(self) -> None:
        """The values of all ranks' rows into the model, whole on every rank and in its own dtypes.

        Raises AssertionError, on every rank, if a pruned weight is not zero.
        """
        counts = [mask.back(self.tensors[name]) for name, mask in self._masks.items()]
        back = torch.tensor(counts, device=self._device)
        self.ranks.add_up([back])
        for name, count in zip(self._masks, back.tolist(), strict=True):
            refuse_back(name, count)
        for p, sharded in self._sharded.items():
            p.data = self.attached.narrowed(p, sharded.full_tensor())
            sharded.to_local().untyped_storage().resize_(0)

    def save(self, path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
        """Every rank its rows."""
        lengths = {name: len(self._summed[name.partition("/")[2] or name]) for name in tensors}
        state.save_rows(path, tensors, about, self.ranks, lengths)

    def load(self, path: Path, mark: str) -> Saved | None:
        """This rank's rows of what `save` has left there, by whichever number of ranks."""
        return state.load(path, mark, self.ranks, state.Rows(self.ranks.rank, self.ranks.count))


def laid_out(attached: Attached, ranks: Ranks) -> Replicated | Sharded:
    """As fits what is attached: weights in place are sharded where there are several ranks."""
    return Sharded(attached, ranks) if attached.spread else Replicated(attached, ranks)


def _owning(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A view that a block returns becomes a tensor of its own: writing to it would lose what fully_shard hangs on."""

    @functools.wraps(forward)
    def owned(*args: Any, **kwargs: Any) -> Any:
        made = forward(*args, **kwargs)
        if isinstance(made, tuple):
            return tuple(map(_owned, made))
        return _owned(made)

    return owned


def _owned(made: Any) -> Any:
    return made.clone() if isinstance(made, Tensor) and made._is_view() else made


def _whole(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Its own parameters that are not sharded yet."""
    from torch.distributed.tensor import DTensor

    own = module.named_parameters(recurse=False)
    return [(name, p) for name, p in own if not isinstance(p, DTensor)]


def _with_modules_of_its_own(model: nn.Module) -> Any:
    """A copy that shares every parameter and buffer."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
