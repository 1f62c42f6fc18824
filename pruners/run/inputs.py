"""Checks of a model, its calibration windows and a device before any work, and the state torch is put in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from pruners import anatomy
from pruners.interface.checks import shown, typed
from pruners.lazy import PreTrainedModel, Tensor, nn, torch
from pruners.run.statistic import is_finite
from pruners.weights import homes

IGNORED = -100  # a label that carries no loss
WINDOWS = "Calibration windows are a LongTensor [count, length]"


def labels(config: Any, tokens: Tensor) -> Tensor:
    """Which of these tokens [..., length] are to be predicted, with IGNORED in place of the others.

    All of them, but for families whose prompt is read as a whole (ChatGLM): from the mark on that ends the prompt, up
    to the first end of an answer.
    """
    marks = getattr(config, "text_prefix", ())
    if not marks:
        return tokens
    begun = (tokens == marks[-1]).cumsum(-1) > 0
    end = begun & (tokens == config.eos_token_id)
    over = end.cumsum(-1) - end.long() > 0
    return tokens.masked_fill(~begun | over, IGNORED)


@contextmanager
def plain_torch() -> Iterator[None]:
    """torch as it comes, whatever the caller has set: compiled models run eagerly, new tensors are float32 on the CPU,
    products are whole (`whole_products`), gradients are on.

    Hooks on a compiled model would have it compiled anew for each of them.  Raises ValueError within
    `torch.inference_mode`, where no gradient is taken and what is made cannot be changed afterwards.
    """
    if torch.is_inference_mode_enabled():
        raise ValueError(
            "Weights cannot be pruned or trained within torch.inference_mode(); use torch.no_grad() instead."
        )
    before = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(whole_products())
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        stack.callback(torch.set_default_dtype, before)
        stack.enter_context(torch.enable_grad())
        torch.set_default_dtype(torch.float32)
        yield


@contextmanager
def whole_products() -> Iterator[None]:
    """Matrices are multiplied in their own dtype, whatever the caller has set: no autocast, and no TF32, which some
    containers turn on for all programs (TORCH_ALLOW_TF32_CUBLAS_OVERRIDE)."""
    known: Any = torch.backends
    backends = known.cuda.matmul, known.mkldnn.matmul
    each = [backend.fp32_precision for backend in backends]
    try:
        before: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:  # PyTorch does not tell where it was set of one backend alone
        before = None
    torch.set_float32_matmul_precision("highest")
    try:
        with ExitStack() as stack:
            for kind in ("cpu", "cuda"):
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)
        for backend, precision in zip(backends, each, strict=True):
            backend.fp32_precision = precision


def back(outcome: Tensor, gradient: Tensor | None = None) -> None:
    """`outcome.backward(gradient)` with the same bits every time: on a GPU attention's gradients are added up in
    whatever order they come, unless it is told otherwise."""
    if outcome.device.type != "cuda":
        outcome.backward(gradient)
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without which torch refuses
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    fills, memory.fill_uninitialized_memory = memory.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    try:
        outcome.backward(gradient)
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = fills


def language_model(model: Any, reads_weights: bool = True) -> PreTrainedModel:
    """The model itself, out of torch.compile's wrapper.

    Raises TypeError for anything but a transformers model with a head, ValueError for one without blocks or usable
    weights; weights on the meta device pass where the values do not matter.
    """
    model = _with_head(model)
    anatomy.family(model)
    if not anatomy.blocks(model):
        raise ValueError(
            f"This {type(model).__name__} has no decoder blocks (num_hidden_layers is 0), so there is nothing to prune."
        )
    for name, weight in model.named_parameters():
        _check_weight(model, name, weight, reads_weights)
    _check_one_format(model)
    return model


def _check_one_format(model: PreTrainedModel) -> None:
    """ValueError for weights of several number formats, but for those that transformers keeps in float32 itself."""
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    apart = tuple(getattr(model, "_keep_in_fp32_modules", None) or ()) + tuple(strict)
    first: dict[torch.dtype, str] = {}
    for name, weight in model.named_parameters():
        if not set(apart) & set(name.split(".")):
            first.setdefault(weight.dtype, name)
    if len(first) > 1:
        (one, name), (other, stranger), *_ = first.items()
        raise ValueError(
            f"The model's weights have several dtypes: {name} is {one} and {stranger} {other}. Convert them "
            f"to one, e.g. model.to({one})."
        )


def refuse_non_finite(model: PreTrainedModel) -> None:
    """ValueError, naming the first, for NaN or inf outside the blocks' matrices, which methods look at themselves.

    Of a model at home on the disk nothing is read twice: it is as it was opened after an error.
    """
    if homes.on_disk(model):
        return
    matrices = {f"{b.name}.{b.parameter(name)[0]}" for b in anatomy.blocks(model) for name in b.linears()}
    for held in homes.each(model):
        for name, weight in held.items():
            if name not in matrices and not weight.is_meta and not is_finite(weight):
                raise ValueError(f"{name} holds NaN or inf, so the model cannot be pruned. Check the checkpoint.")


def predicting_model(model: Any) -> PreTrainedModel:
    """The same for a model that is only to predict: of any family, with or without adapters."""
    model = _with_head(model)
    for name, weight in model.named_parameters():
        _check_weight(model, name, weight, True)
    return model


def _with_head(model: Any) -> PreTrainedModel:
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"The model is a transformers.PreTrainedModel; got {described(model)}")
    if not getattr(model.config, "return_dict", True):
        raise ValueError(
            "config.return_dict is False, so the model returns bare tuples; set model.config.return_dict = True."
        )
    if model.get_output_embeddings() is None:
        kind = type(model).__name__
        raise TypeError(
            f"Pruning needs a {re.sub(r'(Model|For[A-Za-z]+)$', 'ForCausalLM', kind)}; got a {kind}, which has no head "
            "that predicts the next token. Load it with transformers.AutoModelForCausalLM."
        )
    return model


def described(model: Any) -> str:
    """What was given instead of a model of transformers, and the way to one."""
    if isinstance(model, str):
        return f"{shown(model)}. Load it first: transformers.AutoModelForCausalLM.from_pretrained({shown(model)})."
    if not isinstance(model, nn.Module):
        return f"{typed(model)}. Load one with transformers.AutoModelForCausalLM."
    kind = type(model)
    if hasattr(model, "merge_and_unload"):
        return f"a {kind.__module__}.{kind.__qualname__} with adapters. Merge them first: model.merge_and_unload()."
    if isinstance(getattr(model, "module", None), nn.Module):
        return f"a {kind.__module__}.{kind.__qualname__} around one. Use the wrapped model: model.module."
    return f"a {kind.__module__}.{kind.__qualname__}. Load one with transformers.AutoModelForCausalLM."


def _check_weight(model: nn.Module, name: str, weight: Tensor, read: bool) -> None:
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules()) if weight.is_meta else False
    if weight.is_meta and (read or offloaded):
        raise ValueError(
            f"{name} is on the meta device and holds no values"
            + (" here (accelerate has offloaded it)" if offloaded else "")
            + "; load the model whole, without device_map or offloading, or by "
            "pruners.weights.opening.open_folder(folder), "
            "which reads one block at a time from its files."
        )
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(
            f"{name} is {weight.dtype}: quantised weights cannot be changed one by one. Load the model in float32, "
            "bfloat16 or float16."
        )
    if weight.is_inference():
        raise ValueError(
            f"{name} was made within torch.inference_mode() and cannot be changed outside of it; load the model again, "
            "outside."
        )


def calibration(model: PreTrainedModel, windows: Any) -> Tensor:
    """Windows that fit the model; TypeError or ValueError for others."""
    if not isinstance(windows, Tensor):
        raise TypeError(f"{WINDOWS}; got {typed(windows)}. Convert: torch.tensor(windows, dtype=torch.long).")
    if windows.ndim != 2 or windows.dtype != torch.long or windows.is_meta or not windows.numel():
        raise ValueError(
            f"{WINDOWS}; got {windows.dtype} {list(windows.shape)}{' without values' * windows.is_meta}. For other "
            "integers: windows.long()."
        )
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_seq_len", None))  # BLOOM has no limit
    if positions is not None and windows.shape[1] > positions:
        raise ValueError(
            f"Windows of {windows.shape[1]} tokens are longer than the model's context length, {positions}; "
            "use shorter ones."
        )
    in_vocabulary(windows, model.config.vocab_size, "the windows were made with another model's tokenizer")
    return windows.clone() if windows.is_inference() else windows


def in_vocabulary(tokens: Tensor, size: int, cause: str, whose: str = "") -> None:
    """ValueError that shows a token outside the vocabulary, if there is one."""
    if not tokens.numel():
        return
    low, high = (int(end) for end in tokens.aminmax())
    if low < 0 or high >= size:
        raise ValueError(
            f"Token {low if low < 0 else high}{whose} is outside the model's vocabulary of {size}: {cause}."
        )


def usable_device(device: Any) -> torch.device | None:
    """The device, None for None; TypeError or ValueError for what is none, or none that this machine has."""
    if device is None:
        return None
    if not isinstance(device, torch.device | str):
        raise TypeError(f"device is a torch.device or its name, such as cuda:0; got {typed(device)}.")
    try:
        found = torch.device(device)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"There is no device {str(device)!r} here; found {', '.join(devices())}.") from error
    if found.type == "meta":
        raise ValueError("The meta device holds no values, so nothing can be computed there; leave device= out.")
    return found


def devices() -> list[str]:
    """What this machine has."""
    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = torch.accelerator.current_accelerator()
    return ["cpu", *(f"{kind}:{index}" for index in range(torch.accelerator.device_count()))]
