"""Requirements on a model before it is measured; one sentence where one is not met."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pruners.interface import checks
from pruners.interface.checks import typed
from pruners.run.inputs import whole_products
from pruners.run.stream import evaluating

Progress = Annotated[Callable[[int, int], None], checks.FUNCTION]


def check_model(model: Any, values: bool = True) -> None:
    """TypeError for anything but a language model, ValueError for one whose weights have no values."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"The model must be a loaded transformers model; got {typed(model)}.")
    head: Any = getattr(model, "get_output_embeddings", None)
    if head is None or not hasattr(model, "config"):
        raise TypeError(
            "The model must be a transformers model; got a "
            f"{type(model).__module__}.{type(model).__qualname__}. Use the wrapped model, or load one with "
            "transformers.AutoModelForCausalLM."
        )
    if not getattr(model.config, "return_dict", True):
        raise ValueError(
            "config.return_dict is False, so the model returns bare tuples; set model.config.return_dict = True."
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


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """What every measure does, whatever the caller has set: no dropout, no gradients, products in the dtype of the
    weights; the model's modes are as before afterwards."""
    with evaluating(model), whole_products(), torch.inference_mode():
        yield


def check_fits(model: PreTrainedModel, length: int, new_tokens: int) -> None:
    """ValueError if a prompt of `length` tokens and what follows are longer than the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length + new_tokens > positions:
        raise ValueError(
            f"A prompt of {length} tokens and {new_tokens} new tokens are longer than the model's context "
            f"length, {positions}; shorten one of them."
        )


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """TypeError for anything but a tokenizer; ValueError if it can name tokens that the model has no embedding for."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise TypeError(f"The tokenizer must be a loaded transformers tokenizer; got {typed(tokenizer)}.")
    rows = len(model.get_input_embeddings().get_parameter("weight"))
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens and the model {rows:,} embeddings, so it does not belong to "
            "this model; give the tokenizer that the model was trained with."
        )
