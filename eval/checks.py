"""What must hold of a model before it is measured, each a sentence where it does not."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_fits(model: PreTrainedModel, length: int, new_tokens: int) -> None:
    """ValueError if a prompt of `length` tokens and what follows are longer than the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length + new_tokens > positions:
        raise ValueError(
            f"A prompt of {length} tokens and {new_tokens} new ones are longer than the model's {positions} positions; "
            "shorten one of them."
        )


def check_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """ValueError if the tokenizer can name tokens that the model has no embedding for."""
    rows = len(model.get_input_embeddings().get_parameter("weight"))
    if len(tokenizer) > rows:
        raise ValueError(
            f"The tokenizer has {len(tokenizer):,} tokens and the model {rows:,} embeddings, so it does not belong to "
            "this model; give the tokenizer that the model was trained with."
        )
