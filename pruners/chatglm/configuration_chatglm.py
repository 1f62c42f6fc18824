"""ChatGLM-6B's configuration, and the mask and the positions that it makes from tokens.

They are functions of a sequence's contents (Du et al. 2022, GLM, section 2.1): `prompt [gMASK] <sop> answer <eop>`.
With c the place of the first `<sop>` and m that of `[gMASK]` (or of `[MASK]` without one), token t sees token j if
j <= t or j < c; its two positions are (t, 0) for t < c, and (m, t - c + 1) from there on.
"""

from typing import Any, ClassVar, no_type_check

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers import PreTrainedConfig

PUBLISHED = "ChatGLMForConditionalGeneration"
OTHER = ("padded_vocab_size", "ffn_hidden_size", "multi_query_attention", "kv_channels")  # keys of ChatGLM2 and later


@no_type_check  # transformers' configurations take more keywords than their signatures say
@strict
class ChatGLMConfig(PreTrainedConfig):
    """The published keys with ChatGLM-6B's values as defaults.

    Where the first release leaves out the ids of `[MASK]` and `[gMASK]`, they are 4 and 3 below `<sop>`'s, as in both
    releases.  `head_dim` is ours: hidden_size / num_attention_heads unless heads were removed.  Raises ValueError for
    what shares the model type and is another architecture (ChatGLM2 and later, quantised weights, P-tuning prefixes),
    and for heads whose channels are no multiple of 4.
    """

    model_type = "chatglm"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
    }
    keys_to_ignore_at_inference: ClassVar[tuple[str, ...]] = ("cache", "past_key_values")

    vocab_size: int = 130_528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16_384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    use_cache: bool = True
    bos_token_id: int = 130_004
    eos_token_id: int | list[int] = 130_005
    pad_token_id: int | None = 3
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    head_dim: int | None = None
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        _refuse_others(kwargs, self.position_encoding_2d)
        if not isinstance(self.eos_token_id, int):  # transformers takes lists, too
            if len(self.eos_token_id) != 1:
                raise ValueError(
                    f"eos_token_id is {self.eos_token_id}; an answer of ChatGLM-6B ends with one token, <eop>."
                )
            (self.eos_token_id,) = self.eos_token_id
        for name in ("quantization_bit", "pre_seq_len", "prefix_projection"):
            kwargs.pop(name, None)
        if PUBLISHED in str(kwargs.get("auto_map")):  # the published folder's own code, which never runs here
            kwargs.pop("auto_map")
        if self.mask_token_id is None:
            self.mask_token_id = self.bos_token_id - 4
        if self.gmask_token_id is None:
            self.gmask_token_id = self.bos_token_id - 3
        if self.head_dim is None:
            if self.num_attention_heads < 1 or self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                    f"{self.num_attention_heads}; config.json was edited or belongs to another model."
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.head_dim < 4 or self.head_dim % 4:
            raise ValueError(
                f"A head of {self.head_dim} channels cannot be turned by two positions, which needs a multiple of 4; "
                "config.json was edited or belongs to another model."
            )
        super().__post_init__(**kwargs)

    @property
    def text_prefix(self) -> tuple[int, ...]:
        """The tokens that must stand in front of plain text: without `[gMASK] <sop>` a sequence has no positions."""
        assert self.gmask_token_id is not None
        return (self.gmask_token_id, self.bos_token_id)


def _refuse_others(told: dict[str, Any], two_positions: bool) -> None:
    if found := [key for key in OTHER if key in told]:
        raise ValueError(
            f"config.json has the key {found[0]} of ChatGLM2 or a later model, another architecture under the same "
            "name; only ChatGLM-6B (the first generation) is known here."
        )
    if told.get("quantization_bit"):
        raise ValueError("config.json has quantization_bit; take ChatGLM-6B with unquantised weights.")
    if told.get("pre_seq_len"):
        raise ValueError("config.json has pre_seq_len, a P-tuning prefix; take ChatGLM-6B without one.")
    if not two_positions:
        raise ValueError("ChatGLM-6B has two positions a token; position_encoding_2d false is not known here.")


def read_tokens(
    input_ids: Tensor, config: ChatGLMConfig, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The mask (bool [batch, 1, tokens, tokens], true = hidden) and positions (int64 [batch, 2, tokens]) of sequences.

    `attention_mask` [batch, tokens] is 0 at padding, which sees and is seen by nothing and has the positions 0; the
    other tokens are counted as if it were not there.  Raises ValueError for a sequence without `<sop>` or without
    `[gMASK]` and `[MASK]`.
    """
    real = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if real.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask is {list(real.shape)} and the tokens so far are {list(input_ids.shape)}; give 1 for every "
            "token and 0 for padding, or a mask [batch, 1, new tokens, all tokens] that is true where keys are hidden."
        )
    index = real.long().cumsum(1) - 1
    context = _first(input_ids, config.bos_token_id, real, index)
    gmask = _first(input_ids, config.gmask_token_id, real, index)
    mask = torch.where(gmask < 0, _first(input_ids, config.mask_token_id, real, index), gmask)
    for found, name in ((context, "<sop>"), (mask, "[gMASK] or [MASK]")):
        if not input_ids.is_meta and (found < 0).any():  # on the meta device operations are counted, without contents
            raise ValueError(
                f"Sequence {int((found < 0).nonzero()[0, 0])} has no {name}, which ChatGLM's mask and positions are "
                f"made from; put {list(config.text_prefix)} ([gMASK] <sop>) in front of plain text."
            )
    prompt = index < context
    first = torch.where(prompt, index, mask)
    second = (index - context + 1).clamp(min=0)
    positions = torch.stack([first, second], 1).masked_fill(~real[:, None], 0)
    visible = (index[:, :, None] >= index[:, None, :]) | prompt[:, None, :]
    return ~(visible & real[:, :, None] & real[:, None, :])[:, None], positions


def _first(input_ids: Tensor, token: int | None, real: Tensor, index: Tensor) -> Tensor:
    """[batch, 1]: the place of the first such token, -1 without one."""
    found = (input_ids == token) & real
    place = index.gather(1, found.long().argmax(1, keepdim=True))
    return torch.where(found.any(1, keepdim=True), place, -1)
