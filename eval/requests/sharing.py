"""Whether a model scores requests that share a prefix in one row as it scores each of them alone."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eval.marks import text_prefix
from eval.requests.rows import Row, row
from pruners import anatomy
from pruners.weights import sweep

ARGUMENTS = ("attention_mask", "position_ids", "logits_to_keep")
BY_LENGTH = ("dynamic", "longrope")  # rotary angles that depend on how long the longest sequence is
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}  # of logits' spread
LENGTH = 12  # of the documents that are computed both ways


def why_apart(model: PreTrainedModel) -> str | None:
    """Why each request needs a row of its own; None where requests in one row get the logits that they get alone.

    A property of the family, or what two small passes say.
    """
    return _property(model) or _difference(model)


def window(model: PreTrainedModel) -> int | None:
    """How many tokens back a block may see, where that is not all of them."""
    config = model.config.get_text_config()
    sizes = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((size for size in sizes if size), default=None)


def inputs(model: PreTrainedModel, made: Row) -> dict[str, Tensor]:
    """The row as the model's attention takes it; the plain one adds masks, and would add a True as 1."""
    return made.inputs(model.device, None if _attention(model) == "sdpa" else model.dtype)


def _property(model: PreTrainedModel) -> str | None:
    config: Any = model.config.get_text_config()
    absent = [name for name in ARGUMENTS if name not in inspect.signature(model.forward).parameters]
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {kind.get("rope_type") for kind in (rope, *rope.values()) if isinstance(kind, dict)}
    if not anatomy.known(model):
        return "it is of no family known here"
    if text_prefix(model):
        return "its mask depends on the marks in a text"
    if absent:
        return f"it takes no {' or '.join(absent)}"
    if getattr(config, "alibi", False):
        return "its attention counts the tokens of a row (ALiBi)"
    if kinds.intersection(BY_LENGTH):
        return "its positions depend on the longest sequence"
    if _attention(model) not in ("sdpa", "eager"):
        return f"its attention, {_attention(model)!r}, is not known to take any mask"
    return None


def _attention(model: PreTrainedModel) -> str:
    return str(model.config._attn_implementation)


@torch.inference_mode()
def _difference(model: PreTrainedModel) -> str | None:
    """Between the logits of three documents, two of which begin alike, in one row and of each alone."""
    length, rows = min(LENGTH, window(model) or LENGTH), len(model.get_input_embeddings().get_parameter("weight"))
    first, second, third = torch.arange(1, 3 * length + 1).remainder(rows).view(3, length)
    second[: length // 2] = first[: length // 2]
    alone = torch.stack([first, second, third]).to(model.device)
    made = row([([*document, 0], length) for document in alone.tolist()])
    together, asked = inputs(model, made), made.asked.to(model.device)
    found: list[Tensor] = []
    try:
        for number in sweep.over(model, [{"input_ids": alone}, together]):
            if number:
                found.append(model(**together, use_cache=False, logits_to_keep=asked).logits[0])
            else:
                found.append(model(alone, use_cache=False).logits.flatten(0, 1))
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        return f"it refuses such a row ({type(error).__name__}: {error})"
    expected, got = found[0].float(), found[1][made.places].float()
    if (got - expected).norm() <= TOLERANCE[model.dtype] * (expected - expected.mean()).norm():
        return None
    return "its logits in one row are not those of each alone"
