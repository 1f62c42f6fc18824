"""What must hold of a model before it is measured, each a sentence where it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruners.interface import checks
from pruners.interface.checks import typed

Progress = Annotated[Callable[[int, int], None], checks.FUNCTION]


def check_model(model: Any, values: bool = True) -> None:
    """TypeError for what is no language model, ValueError for one whose weights hold no values where they are read."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model is one of transformers, loaded; got {typed(model)}.")
    head: Any = getattr(model, "get_output_embeddings", None)
    if head is None or not hasattr(model, "config"):
        raise TypeError(
            f"The model is one of transformers; got a {type(model).__module__}.{type(model).__qualname__}. Give what "
            "it wraps, or load one with transformers.AutoModelForCausalLM."
        )
    if head() is None:
        raise TypeError(
            f"{type(model).__name__} has no head that predicts the next token; load the model with "
            "transformers.AutoModelForCausalLM."
        )
    if values and any(weight.is_meta for weight in model.parameters()):
        raise ValueError(
            "Weights of the model are on the meta device and hold no values; load it whole, without offloading, or by "
            "pruners.weights.opening.open_folder(folder), which reads one block at a time from its files."
        )


def check_fits(model: PreTrainedModel, length: int, new_tokens: int) -> None:
    """ValueError if a prompt of `length` tokens and what follows are longer than the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length + new_tokens > positions:
        raise ValueError(
            f"A prompt of {length} tokens and {new_tokens} new ones are longer than the model's {positions} positions; "
            "shorten one of them."
        )


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """TypeError for what is none; ValueError if it can name tokens that the model has no embedding for."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"The tokenizer is one of transformers, loaded; got {typed(tokenizer)}.")
    rows = len(model.get_input_embeddings().get_parameter("weight"))
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens and the model {rows:,} embeddings, so it does not belong to "
            "this model; give the tokenizer that the model was trained with."
        )
