"""Makes a language model smaller: `prune(model, method, windows)` and the methods.

import pruners
report = pruners.prune(model, pruners.Wanda(sparsity=0.5), windows)
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pruners import anatomy, chatglm, checkpoint
from pruners.calibrate import Keeper, Progress
from pruners.flap import Flap
from pruners.gblm import GBLM, Gradient
from pruners.llm_pruner import LLMPruner
from pruners.magnitude import Magnitude
from pruners.random_baseline import Random
from pruners.report import Report
from pruners.sparsegpt import SparseGPT
from pruners.structured import Structured
from pruners.structured_baselines import MagnitudeSP, WandaSP
from pruners.suggest import unknown
from pruners.unstructured import Unstructured
from pruners.wanda import Wanda

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
    "checkpoint",
    "gather",
    "method",
    "prune",
]


def method(name: str, **hyperparameters: Any) -> Any:
    """The method of that name; ValueError with the nearest names for an unknown one."""
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    return METHODS[name](**hyperparameters)


def gather(
    model: PreTrainedModel,
    method: Any,
    windows: Tensor | None,
    *,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """The dense model's statistics that `method` needs, for methods of the same `statistics_key` to share.

    The arguments are those of `prune`.
    """
    if method.statistics_key is None:
        return {}
    _check_windows(model, method, windows)
    return method.gather(model, windows, batch_size=batch_size, device=device, progress=progress)


def prune(
    model: PreTrainedModel,
    method: Any,
    windows: Tensor | None = None,
    *,
    cut: bool = True,
    statistics: Mapping[str, Tensor] | None = None,
    reconstruct: Any = None,
    folder: Path | None = None,
    keeper: Keeper | None = None,
    batch_size: int = 8,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Prune `model` in place.

    Structured methods cut heads and channels out, or with `cut=False` zero them and keep the dense shapes; the logits
    are the same.  Unstructured methods zero single weights either way.

    `windows` are calibration tokens [count, length] (None for methods that need none); `statistics` what `gather`
    returned for them, computed here if absent; `batch_size` windows go through a block at once and change no result;
    `device` holds one block at a time (None: where the model is); `progress(done, total)` is called per block.
    `reconstruct`, a retrain.Reconstruction, trains every block after it was pruned to give the dense block's outputs;
    what is finished is kept in `folder`, if there is one, and a killed run goes on from there.  Without it `keeper`
    keeps the blocks of unstructured methods that read inputs.

    Raises ValueError for windows that do not fit the model, NaN or inf in weights or activations, an unknown family.
    """
    _check_windows(model, method, windows, needed=reconstruct is not None)
    started = time.perf_counter()
    where: dict[str, Any] = {"batch_size": batch_size, "device": device, "progress": progress}
    dense = gather(model, method, windows, **where) if statistics is None else statistics
    gathered = time.perf_counter() - started
    if isinstance(method, Structured):
        options["cut"] = cut
    rebuild = _rebuild(reconstruct, model, method, windows, folder)
    if rebuild:
        options["rebuild"] = rebuild
    elif isinstance(method, Unstructured):
        options["keeper"] = keeper
    with torch.no_grad():
        report = method.prune(model, windows, dense=dense, **where, **options)
    if rebuild:
        report.reconstruction = [asdict(block) for block in rebuild.blocks]
    if dense and statistics is None:
        report.seconds = {"gather": gathered, **report.seconds}
    return report


def _rebuild(reconstruct: Any, model: PreTrainedModel, method: Any, windows: Any, folder: Path | None) -> Any:
    if reconstruct is None:
        return None
    if not isinstance(method, Unstructured):
        raise ValueError(f"Reconstruction keeps single weights at zero; {method!r} does not zero single weights.")
    return reconstruct.start(model, method, windows, folder)


def _check_windows(model: PreTrainedModel, method: Any, windows: Tensor | None, needed: bool = False) -> None:
    anatomy.family(model)
    if not (method.needs_windows or needed):
        return
    if windows is None or windows.numel() == 0:
        raise ValueError(f"{method!r} needs calibration windows; got none. Pass a LongTensor [count, length].")
    if windows.ndim != 2 or windows.dtype != torch.long:
        raise ValueError(
            f"Calibration windows are a LongTensor [count, length]; got {windows.dtype} {list(windows.shape)}."
        )
    config: Any = model.config
    positions, vocabulary = config.max_position_embeddings, config.vocab_size
    if windows.shape[1] > positions:
        raise ValueError(
            f"Windows of {windows.shape[1]} tokens are longer than the model's {positions} positions; use shorter ones."
        )
    if windows.max() >= vocabulary or windows.min() < 0:
        raise ValueError(
            f"Token {int(windows.max())} is outside the model's vocabulary of {vocabulary}: "
            "the windows were made with another model's tokenizer."
        )
