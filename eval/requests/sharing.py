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
ROUNDINGS = 3  # times what rounding does to the logits of each alone
MOST = 0.3  # of logits' spread, however much rounding does: no mask or no positions do more
LENGTH = 12  # of the documents that are computed both ways


def why_apart(model: PreTrainedModel) -> str | None:
    """Why each request needs a row of its own; None where requests in one row get the logits that they get alone.

    A property of the family, or what three small passes say.
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
    """Between the logits of three documents, two of which begin alike, in one row and of each alone.

    Half precision rounds more where a model has lost more, so that no one tolerance fits: documents that are the
    beginnings of longer ones say how far rounding alone goes.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 * LENGTH
    length, rows = (
        min(LENGTH, window(model) or LENGTH, most // 2),
        len(model.get_input_embeddings().get_parameter("weight")),
    )
    spaced = torch.linspace(0, rows - 1, 3 * length + 2)[1:-1].long()  # ordinary tokens; special ones are at the ends
    first, second, third = spaced.view(length, 3).T.clone()
    second[: length // 2] = first[: length // 2]
    alone = torch.stack([first, second, third]).to(model.device)
    made = row([([*document, 0], length) for document in alone.tolist()])
    together, asked = inputs(model, made), made.asked.to(model.device)
    given: list[Any] = [{"input_ids": alone}, {"input_ids": alone.repeat(1, 2)}, together]
    found: list[Tensor] = []
    try:
        for number in sweep.over(model, given):
            kept = {"logits_to_keep": asked} if given[number] is together else {}
            found.append(model(**given[number], use_cache=False, **kept).logits.float())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        return f"it refuses such a row ({type(error).__name__}: {error})"
    expected, longer, got = found[0], found[1][:, :length], found[2][0][made.places]
    spread, rounding = (expected - expected.mean()).norm(), (longer - expected).norm()
    if (got - expected.flatten(0, 1)).norm() <= max(
        TOLERANCE[model.dtype] * spread, min(ROUNDINGS * rounding, MOST * spread)
    ):
        return None
    return "its logits in one row are not those of each alone"
