"""Makes a language model smaller: `prune(model, method, windows)` and the methods.

import pruners
report = pruners.prune(model, pruners.Wanda(sparsity=0.5), windows)
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

from pruners import anatomy, apply
from pruners.calibrate import NOTHING, Execution, Keeper, Progress
from pruners.flap import Flap
from pruners.gblm import GBLM, Gradient
from pruners.interface import checks, returned
from pruners.interface.checks import Count, Flag, Folder
from pruners.lazy import PreTrainedModel, Tensor, torch
from pruners.llm_pruner import LLMPruner
from pruners.magnitude import Magnitude, Random
from pruners.run import inputs
from pruners.run.report import Report
from pruners.run.statistic import is_finite
from pruners.sparsegpt import SparseGPT
from pruners.structured import Structured
from pruners.structured_baselines import MagnitudeSP, WandaSP
from pruners.unstructured import Unstructured
from pruners.wanda import Wanda
from pruners.weights import homes

if TYPE_CHECKING:
    from pruners import chatglm, checkpoint

METHODS: dict[str, type[Any]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "gblm": GBLM,
    "gradient": Gradient,
    "random": Random,
    "flap": Flap,
    "wanda_sp": WandaSP,
    "magnitude_sp": MagnitudeSP,
    "llm_pruner": LLMPruner,
}

__all__ = [
    "GBLM",
    "METHODS",
    "Flap",
    "Gradient",
    "LLMPruner",
    "Magnitude",
    "MagnitudeSP",
    "Random",
    "Report",
    "SparseGPT",
    "Wanda",
    "WandaSP",
    "chatglm",
    "check",
    "checkpoint",
    "gather",
    "method",
    "prune",
]


def method(name: str, **hyperparameters: Any) -> Any:
    """The method of that name; ValueError with the nearest names for an unknown one."""
    checks.choice("method", name, METHODS)
    return METHODS[name](**hyperparameters)


@checks.arguments
def gather(
    model: PreTrainedModel,
    method: Any,
    windows: Tensor | None,
    *,
    batch_size: Count = 8,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Mapping[str, Tensor]:
    """The dense model's statistics that `method` needs, for methods of the same `statistics_key` to share.

    The arguments are those of `prune`.
    """
    with inputs.plain_torch():
        check_method(method)
        model = inputs.language_model(model, method.reads_weights)
        _check_family(model, method)
        _check_saved(model)
        windows = _calibration(model, method, windows, needed=method.statistics_key is not None)
        with homes.lent(model, _place(model, method, device)):
            return (
                {} if method.statistics_key is None else method.gather(model, windows, Execution(batch_size, progress))
            )


@checks.arguments
def prune(
    model: PreTrainedModel,
    method: Any,
    windows: Tensor | None = None,
    *,
    cut: Flag = True,
    statistics: Mapping[str, Tensor] | None = None,
    reconstruct: Any = None,
    folder: Folder | None = None,
    keeper: Keeper | None = None,
    batch_size: Count = 8,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Prune `model` in place.

    Structured methods cut heads and channels out, or with `cut=False` zero them and keep the dense shapes; the logits
    are the same.  Unstructured methods zero single weights either way.  Of OLMo 2 and 3, whose norms are over all
    heads, `checkpoint.save` refuses zeroed heads, once they are: cut what is to be saved.

    `windows` are calibration tokens [count, length] (None for methods that need none); `statistics` what `gather`
    returned for them, computed here if absent; `batch_size` windows (on a GPU more short ones) go through a block at
    once and change no result; `device` holds one block at a time (None: where the model is); `progress(done, total)` is
    called per block.
    Backward passes work in batches of their own.
    `reconstruct`, a retrain.Reconstruction, trains every block after it was pruned to give the dense block's outputs;
    finished blocks are kept in `folder`, if given, and an interrupted run resumes from there.  Without it `keeper`
    keeps the blocks of unstructured methods that read inputs.

    Raises TypeError or ValueError, with the model as it was, for invalid arguments, windows or statistics that
    do not fit the model, NaN or inf in weights, an unknown family, a model that checkpoint.save could not save;
    ValueError for NaN or inf in activations.  After that and whatever else breaks the pruning off, a model whose
    weights are at home on the disk has those and the widths that it was opened with, whatever it had lost since; one in
    memory may be pruned in part: load it again.
    """
    with inputs.plain_torch(), torch.no_grad():
        check_method(method)
        if folder is not None and reconstruct is None:
            raise ValueError("folder= stores the blocks of a reconstruction; drop it, or give reconstruct=.")
        model = inputs.language_model(model, method.reads_weights)
        _check_family(model, method)
        _check_saved(model)
        if method.reads_weights:
            inputs.refuse_non_finite(model)
        windows = _calibration(model, method, windows, needed=method.needs_windows or reconstruct is not None)
        place = _place(model, method, device)
        how = Execution(batch_size, progress, NOTHING if keeper is None else keeper, cut)
        if statistics is not None:
            _check_statistics(model, method, statistics)
        rebuilder = None if reconstruct is None else _rebuilder(reconstruct, model, method, windows, folder)
        with homes.lent(model, place), homes.intact(model):
            report = _timed(model, method, windows, statistics, replace(how, keeper=rebuilder) if rebuilder else how)
        if rebuilder:
            report.reconstruction = [asdict(block) for block in rebuilder.blocks]
        return report


def _timed(
    model: PreTrainedModel, method: Any, windows: Any, statistics: Mapping[str, Tensor] | None, how: Execution
) -> Report:
    started = time.perf_counter()
    gathers = method.statistics_key is not None and statistics is None
    dense = method.gather(model, windows, how) if gathers else statistics or {}
    checks.mapping(f"{type(method).__name__}: what gather returns", dense, "statistics by name")
    gathered = time.perf_counter() - started
    with returned.shared(method, dense):
        report = method.prune(model, windows, dense, how)
    if not isinstance(report, Report):
        raise TypeError(f"{type(method).__name__}'s prune returns a pruners.Report; got {checks.typed(report)}.")
    if gathers:
        report.seconds = {"gather": gathered, **report.seconds}
    return report


def check(model: PreTrainedModel, method: Any) -> None:
    """TypeError or ValueError, as of `prune`, for a method that does not work on a model of this family and these
    widths, whose weights may be on the meta device."""
    check_method(method)
    _check_family(inputs.language_model(model, reads_weights=False), method)


def check_method(method: Any) -> None:
    """TypeError for anything that is not a method."""
    if isinstance(method, Structured | Unstructured):
        return
    hint = "such as pruners.Wanda(sparsity=0.5)"
    if isinstance(method, str):
        hint += f"; pruners.method({checks.shown(method)}) makes the one of a name"
    raise TypeError(f"method is a method with its hyperparameters, {hint}; got {checks.typed(method)}.")


def _check_family(model: PreTrainedModel, method: Any) -> None:
    """ValueError or TypeError for a model of an own subclass, a structured method on one that it cannot cut as asked,
    and a pattern that does not divide the width of a matrix."""
    apply.check_class(model)
    if isinstance(method, Structured):
        method.check(model)
    else:
        method.check_widths(anatomy.blocks(model))


def _check_saved(model: PreTrainedModel) -> None:
    """TypeError or ValueError for a model that could not be saved once it is pruned."""
    from pruners import checkpoint

    checkpoint.check(model)


def _calibration(model: PreTrainedModel, method: Any, windows: Any, needed: bool) -> Any:
    """The windows, None where none are given or needed."""
    if needed and (windows is None or (isinstance(windows, Tensor) and windows.numel() == 0)):
        raise ValueError(f"{method!r} needs calibration windows; got none. Pass a LongTensor [count, length].")
    return None if windows is None else inputs.calibration(model, windows)


def _place(model: PreTrainedModel, method: Any, device: Any) -> torch.device | None:
    """The device; ValueError where the method cannot work there."""
    found = inputs.usable_device(device)
    home = homes.of(model)
    elsewhere = found is not None and not homes.same(found, model.device)
    if home is not None and elsewhere:
        raise ValueError(
            f"The model was opened for {model.device}, not {found}; drop device=, or open it for that device."
        )
    if method.needs_all_weights and (home is not None or elsewhere):
        where = f"not block by block on {found}" if elsewhere else "and they are offloaded"
        raise ValueError(
            f"{method!r} needs all weights at once on {model.device}, {where}; load the model whole, and "
            "move it to a device that holds it."
        )
    return found


def _check_statistics(model: PreTrainedModel, method: Any, statistics: Any) -> None:
    """TypeError or ValueError for what `gather` did not return for this method and a model of this shape."""
    checks.mapping("statistics", statistics, "what pruners.gather(model, method, windows) returned")
    wanted = method.statistics_shapes(model) if method.statistics_key is not None else {}
    for name in (*wanted, *statistics):
        if name not in wanted or name not in statistics:
            what = "have no" if name in wanted else "have an unexpected"
            break
        if not isinstance(statistics[name], Tensor) or tuple(statistics[name].shape) != wanted[name]:
            what = f"are not of shape {list(wanted[name])} in"
            break
        if statistics[name].dtype != torch.float32 or statistics[name].is_meta:
            what = "are not of float32" if not statistics[name].is_meta else "have no values for"
            what += " in"
            break
        if not is_finite(statistics[name]):
            what = "hold NaN or inf in"
            break
    else:
        return
    raise ValueError(
        f"These statistics {what} {checks.shown(name)}, so they were not gathered for {type(method).__name__} "
        "on this model; gather them again with pruners.gather(model, method, windows)."
    )


def _rebuilder(reconstruct: Any, model: PreTrainedModel, method: Any, windows: Any, folder: Path | None) -> Any:
    from pruners.retrain import Reconstruction  # which builds on this module

    if not isinstance(reconstruct, Reconstruction):
        raise TypeError(
            f"reconstruct is a pruners.retrain.Reconstruction(trainable), or None; got {checks.typed(reconstruct)}."
        )
    if not isinstance(method, Unstructured):
        raise ValueError(f"Reconstruction needs an unstructured method; {method!r} does not zero single weights.")
    return reconstruct.start(model, method, windows, folder)


def __getattr__(name: str) -> ModuleType:
    """`pruners.checkpoint` and `pruners.chatglm`, which load transformers, once they are asked for."""
    if name in ("chatglm", "checkpoint"):
        return importlib.import_module(f"pruners.{name}")
    raise AttributeError(f"module 'pruners' has no attribute {name!r}")


@wrapt.when_imported("transformers")
@wrapt.when_imported("pruners.modeling_pruned")
def _register(_: ModuleType) -> None:
    """Tell transformers' Auto classes of the pruned models and ChatGLM."""
    ours = (sys.modules.get(name) for name in ("pruners.modeling_pruned", "pruners.chatglm"))
    if not any(getattr(one.__spec__, "_initializing", False) for one in ours if one):  # else it imports transformers
        importlib.import_module("pruners.checkpoint")
        importlib.import_module("pruners.chatglm")
