"""What a method's own functions return, and what they leave of the weights: one sentence where it is of no use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from pruners import select
from pruners.anatomy import Block
from pruners.apply import KINDS, Kept
from pruners.interface import checks
from pruners.lazy import Bool, Float, Tensor, torch
from pruners.run import matrices
from pruners.run.matrices import Matrix
from pruners.run.statistic import InputNorm, Moments, is_finite


def score(method: Any, name: str, found: Any, weight: Tensor) -> Float[Tensor, "out inp"]:
    """The score itself; ValueError for one that ranks no weights: of another shape, or not a number."""
    of = f"{type(method).__name__}'s score of {name}"
    if not isinstance(found, Tensor) or found.shape != weight.shape:
        told = f"is {list(found.shape)}" if isinstance(found, Tensor) else f"is {checks.typed(found)}"
        raise ValueError(f"{of} {told}; it is one number for each of its weights, {list(weight.shape)}.")
    select.refuse_nan(found, of)
    return found


def unit_score(method: Any, block: Block, kind: str, found: Any) -> Float[Tensor, " units"]:
    """The score itself; ValueError for one that ranks no units: of another shape, or not a number."""
    units = {"attention": "heads", "mlp": "channels"}[kind]
    of = f"{type(method).__name__}'s score of the {units} of {block.name}"
    if not isinstance(found, Tensor) or found.shape != (block.units(kind),):
        raise ValueError(f"{of} is {_told(found)}; it is one number for each of them, [{block.units(kind)}].")
    select.refuse_nan(found, of)
    return found


def mask(method: Any, name: str, found: Any, weight: Tensor) -> Bool[Tensor, "out inp"]:
    """What `gone` condemns, where the weight is; ValueError for what does not say of each weight whether it goes.

    It may say so of whole rows or columns, as torch broadcasts.
    """
    if isinstance(found, Tensor):
        with suppress(RuntimeError):  # told below
            found = found.expand(weight.shape)
    if not _is_mask(found, tuple(weight.shape)):
        raise ValueError(
            f"{type(method).__name__}'s gone returned {_told(found)} for {name}; it returns True for each weight that "
            f"goes and False for the others, a torch.bool tensor {list(weight.shape)}."
        )
    return found.to(weight.device)


def kept(method: Any, blocks: Sequence[Block], found: Any) -> list[Kept]:
    """What `choose` leaves of each block, on the CPU; ValueError for anything but a mask of the units of each."""
    name = type(method).__name__
    if not isinstance(found, list | tuple) or [isinstance(one, Kept) for one in found] != [True] * len(blocks):
        raise ValueError(
            f"{name}'s choose returned {_told(found)}; it returns a list of one pruners.apply.Kept for each of the "
            f"{len(blocks)} blocks."
        )
    for block, keep in zip(blocks, found, strict=True):
        for kind in KINDS:
            if not _is_mask(keep[kind], (block.units(kind),)):
                raise ValueError(
                    f"{name}'s choose returned {_told(keep[kind])} as Kept.{kind} of {block.name}; it says of each of "
                    f"its {block.units(kind)} units whether it stays, as a torch.bool tensor [{block.units(kind)}]."
                )
        if not isinstance(keep.rounding, int) or keep.rounding < 0:
            raise ValueError(
                f"{name}'s choose returned {checks.typed(keep.rounding)} as Kept.rounding of {block.name}; it is how "
                "many channels stay only to round the width, 0 or more."
            )
    return [replace(keep, attention=keep.attention.cpu(), mlp=keep.mlp.cpu()) for keep in found]


def repairs(method: Any, block: Block, found: Any) -> list[tuple[Matrix, Float[Tensor, " out"]]]:
    """The biases themselves; ValueError for one that is not finite or not one number for each output of a matrix."""
    name = type(method).__name__
    pairs = list(found) if isinstance(found, Iterable) else [found]
    if any(not isinstance(one, list | tuple) or len(one) != 2 for one in pairs):
        raise ValueError(
            f"{name}'s repairs returned {_told(found)} for {block.name}; it returns a list of pairs, "
            "(block.linear(name), bias)."
        )
    own = {projection: matrices.owner(linear) for projection, linear in block.linears().items()}
    for linear, bias in pairs:
        projection = next((name for name, owner in own.items() if owner is getattr(linear, "module", linear)), None)
        if projection is None:
            raise ValueError(
                f"{name}'s repairs returned a bias for {checks.typed(linear)}, which is no projection of "
                f"{block.name}; it names one by block.linear(name)."
            )
        outputs = linear.weight.shape[0]
        fits = isinstance(bias, Tensor) and tuple(bias.shape) == (outputs,)
        if not fits or not is_finite(bias.to(linear.weight)):
            raise ValueError(
                f"{name}'s repairs returned {'NaN or inf' if fits else _told(bias)} as bias of "
                f"{block.name}.{projection}; it is one finite number for each of its {outputs} outputs."
            )
    return [(linear, bias) for linear, bias in pairs]


@contextmanager
def read_only(method: Any, name: str, weight: Tensor, x: Any) -> Iterator[None]:
    """ValueError where a method writes over a weight that it scores, or over what was seen of its inputs.

    A statistic of its own kind may compute in place, and a Hessian be taken, which it refuses itself a second time.
    """
    seen = vars(x) if type(x) in (InputNorm, Moments) else {}
    tensors = {f"{name}'s statistic {which}": value for which, value in seen.items() if isinstance(value, Tensor)}
    with _unwritten(method, {name: weight} | tensors):
        yield


@contextmanager
def shared(method: Any, dense: Mapping[str, Tensor]) -> Iterator[None]:
    """ValueError where a method writes over dense statistics, which its other settings share."""
    known = dense if isinstance(dense, dict) else {}  # others read each tensor anew
    tensors = {f"the dense statistic {name}": value for name, value in known.items() if isinstance(value, Tensor)}
    with _unwritten(method, tensors, " Gather the statistics again."):
        yield


@contextmanager
def _unwritten(method: Any, tensors: Mapping[str, Tensor], then: str = "") -> Iterator[None]:
    """By torch's own count of changes: reads no value and takes no memory."""
    before = {what: tensor._version for what, tensor in tensors.items() if not tensor.is_inference()}
    yield
    for what, version in before.items():
        if tensors[what]._version != version:
            raise ValueError(
                f"{type(method).__name__} wrote over {what}; it computes in a new tensor, e.g. weight.abs() in place "
                f"of weight.abs_() (of float32, weight.float() is the weight itself).{then}"
            )


@contextmanager
def in_place(method: Any, linears: Mapping[str, Matrix]) -> Iterator[None]:
    """ValueError where a `remove` of one's own leaves a matrix of another shape or dtype, or numbers not finite."""
    before = {name: (linear.weight.shape, linear.weight.dtype) for name, linear in linears.items()}
    yield
    for name, (shape, dtype) in before.items():
        weight = linears[name].weight
        if weight.shape != shape or weight.dtype != dtype or not is_finite(weight):
            same = weight.shape == shape and weight.dtype == dtype
            found = f"NaN or inf in {name}" if same else f"{_told(weight)} of {name}"
            small = ", of which numbers may be too large: load the model in bfloat16 or float32"
            raise ValueError(
                f"{type(method).__name__}'s remove left {found}; it prunes in place, and what is left is finite, "
                f"{dtype} {list(shape)}{small if same and dtype == torch.float16 else ''}."
            )


def _is_mask(found: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(found, Tensor) and found.dtype == torch.bool and tuple(found.shape) == shape


def _told(found: Any) -> str:
    if isinstance(found, Tensor):
        return f"a {found.dtype} tensor {list(found.shape)}"
    if isinstance(found, list | tuple):
        kinds = ", ".join(sorted({type(one).__name__ for one in found})) or "none"
        return f"a {type(found).__name__} of {len(found)} ({kinds})"
    return checks.typed(found)
