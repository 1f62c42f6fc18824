"""ChatGLM-6B for transformers, by the formulas of the modelling file published with it (THUDM/chatglm-6b).

The published configuration's keys and the checkpoint's tensor names are kept, so that a folder in its layout opens as
it is.  This file and the configuration's need torch and transformers (5.20 or newer) and nothing else; saved models
carry a copy of both.
"""

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from .configuration_chatglm import ChatGLMConfig, read_tokens  # relative: saving a model copies both files

CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
MASKED = -10_000.0  # instead of the score of a hidden key, times the number of the block
RESIDUAL = math.sqrt(2 * 28)  # of the published blocks, whatever the number of layers
ROTARY_BASE = 10_000.0


def rotary_table(positions: Tensor, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [batch, 2, 1, tokens, head_dim / 4] of the angles p f_j, f_j = 10000^(-2j / (head_dim / 2)).

    The published model rounds f_j to float16, and in float16 makes the whole table in it.
    """
    exponents = torch.arange(0, head_dim // 2, 2, device=positions.device).float() / (head_dim // 2)
    frequencies = (1.0 / ROTARY_BASE**exponents).half()
    made_in = torch.float16 if dtype == torch.float16 else torch.promote_types(dtype, torch.float32)
    angles = positions[:, :, None, :, None].to(made_in) * frequencies.to(made_in)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the first half of every head by the first position and the second by the second.

    x [batch, heads, tokens, head_dim]; within a half, channel j and channel j + head_dim / 4 are a pair (u, v), which
    becomes (u cos - v sin, v cos + u sin).
    """
    cos, sin = table
    halves = []
    for which, half in enumerate(x.chunk(2, -1)):
        u, v = half.chunk(2, -1)
        halves += [u * cos[:, which] - v * sin[:, which], v * cos[:, which] + u * sin[:, which]]
    return torch.cat(halves, -1)


class ChatGLMAttention(nn.Module):
    """`query_key_value` [3 * heads * head_dim, hidden_size] holds head by head its query, key and value rows."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.num_heads = config.num_attention_heads
        assert config.head_dim is not None
        self.head_dim = config.head_dim
        width = self.num_heads * self.head_dim
        self.query_key_value = nn.Linear(config.hidden_size, 3 * width)
        self.dense = nn.Linear(width, config.hidden_size)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        qkv = self.query_key_value(hidden_states).unflatten(-1, (-1, 3, self.head_dim))
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(3))  # [batch, heads, tokens, head_dim]
        query, key = rotate(query, position_embeddings), rotate(key, position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        beyond = key.shape[2] - attention_mask.shape[-1]  # places that a cache of fixed length holds ready
        hidden = nn.functional.pad(attention_mask, (0, beyond), value=True)
        # divided by the number of the block, multiplied with it in float32: so that float16 does not overflow
        number = self.layer_idx + 1
        scores = (query / (math.sqrt(self.head_dim) * number)) @ key.transpose(2, 3)
        scores = scores.masked_fill(hidden, MASKED).float() * number
        weights = scores.softmax(-1).to(value.dtype)
        return self.dense((weights @ value).transpose(1, 2).flatten(2)), weights


class ChatGLMMLP(nn.Module):
    """Published as "GLU", which it is not: two projections and the tanh form of GELU."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dense_4h_to_h(nn.functional.gelu(self.dense_h_to_4h(hidden_states), approximate="tanh"))


class ChatGLMBlock(GradientCheckpointingLayer):
    """What the residual branches carry is the normalised input, times sqrt(2 * 28) for any number of layers."""

    def __init__(self, config: ChatGLMConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = ChatGLMAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = ChatGLMMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        normalised = self.input_layernorm(hidden_states)
        attended, _ = self.attention(
            hidden_states=normalised,
            attention_mask=attention_mask,
            cache=cache,
            position_embeddings=position_embeddings,
        )
        normalised = self.post_attention_layernorm(RESIDUAL * normalised + attended)
        return RESIDUAL * normalised + self.mlp(normalised)


class ChatGLMPreTrainedModel(PreTrainedModel):
    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    config: ChatGLMConfig
    _no_split_modules = ["ChatGLMBlock"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": ChatGLMBlock, "attentions": ChatGLMAttention}  # noqa: RUF012
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]  # noqa: RUF012  (made anew, as published)

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, folder: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As transformers', from safetensors only; ValueError for a local folder that holds pickled weights alone."""
        kwargs["use_safetensors"] = True  # unpickling can run code
        local = folder is not None and Path(folder).is_dir() and kwargs.get("state_dict") is None
        if local and not any(Path(folder).glob("*.safetensors")):
            pickled = sorted(Path(folder).glob("*.bin"))
            raise ValueError(
                f"{folder} needs weights as *.safetensors and has "
                + (f"only pickled ones ({pickled[0].name}), which can run code" if pickled else "none")
                + "; fetch a revision with safetensors, or convert the shards with the safetensors package on a "
                "machine where you trust them."
            )
        return super().from_pretrained(folder, *args, **kwargs)


class ChatGLMModel(ChatGLMPreTrainedModel):
    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(ChatGLMBlock(config, index) for index in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.word_embeddings

    def set_input_embeddings(self, value: Any) -> None:
        self.word_embeddings = value

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """`attention_mask` [batch, all tokens] is 0 at padding, [batch, 1, new tokens, all tokens] true where hidden.

        `position_ids` is [batch, 2, new tokens].  What is not given is made from the tokens, those in the cache among
        them.  Raises ValueError for tokens it cannot be made from.
        """
        cache = past_key_values if cache is None else cache  # its name before transformers 5.24
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        hidden_states = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        hidden, positions = self._mask_and_positions(input_ids, attention_mask, position_ids, cache)
        assert self.config.head_dim is not None
        table = rotary_table(positions, self.config.head_dim, hidden_states.dtype)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                attention_mask=hidden,
                position_ids=positions,
                cache=cache,
                use_cache=use_cache,
                position_embeddings=table,
                **kwargs,
            )
        held: dict[str, Any] = {CACHE: cache}
        return BaseModelOutputWithPast(last_hidden_state=self.final_layernorm(hidden_states), **held)

    def _mask_and_positions(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        """Of the new tokens; those in the cache are remembered beside it, as positions follow from the contents."""
        given = attention_mask if attention_mask is not None and attention_mask.ndim == 4 else None
        if position_ids is not None and (position_ids.ndim != 3 or position_ids.shape[1] != 2):
            raise ValueError(
                f"position_ids is {list(position_ids.shape)}; ChatGLM's are [batch, 2, tokens]. Leave them out to have "
                "them made from the tokens."
            )
        if given is not None and position_ids is not None:
            _remember(cache, None)
            return given.bool(), position_ids
        if input_ids is None:
            raise ValueError("ChatGLM makes mask and positions from tokens; with inputs_embeds give both yourself.")
        tokens = torch.cat([*_remembered(cache, input_ids), input_ids], 1)
        _remember(cache, tokens)
        hidden, positions = read_tokens(tokens, self.config, attention_mask if given is None else None)
        new = slice(tokens.shape[1] - input_ids.shape[1], None)
        return (
            hidden[:, :, new] if given is None else given.bool(),
            positions[..., new] if position_ids is None else position_ids,
        )


def _remember(cache: Any, tokens: Tensor | None) -> None:
    if cache is not None:
        cache.chatglm_tokens = tokens


def _remembered(cache: Any, input_ids: Tensor) -> list[Tensor]:
    """The tokens whose keys are in the cache, as a list of none or one."""
    length = 0 if cache is None else int(cache.get_seq_length())
    if not length:
        return []
    tokens = getattr(cache, "chatglm_tokens", None)
    if tokens is None or len(tokens) != len(input_ids) or tokens.shape[1] < length:
        raise ValueError(
            f"The cache holds {length} tokens and does not know which, so the next ones have no positions; give "
            "attention_mask [batch, 1, new tokens, all tokens] and position_ids [batch, 2, new tokens]."
        )
    return [tokens[:, :length]]


class ChatGLMForCausalLM(ChatGLMPreTrainedModel, GenerationMixin):
    """The head is tied to the embeddings by the configuration's default, unless a checkpoint has two different ones."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """`labels` [batch, tokens] are shifted inside, -100 does not count; the loss is the mean over the others."""
        outputs = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=past_key_values if cache is None else cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: getattr(outputs, CACHE)},
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Mask and positions of the new tokens, from all tokens so far."""
        if position_ids is not None and position_ids.ndim == 3:
            raise ValueError("generate() makes ChatGLM's positions from the tokens; leave position_ids out.")
        hidden, positions = read_tokens(input_ids, self.config, attention_mask)
        inputs = super().prepare_inputs_for_generation(
            input_ids, attention_mask=hidden, position_ids=positions, **kwargs
        )
        inputs["attention_mask"] = hidden[:, :, -inputs["input_ids"].shape[1] :]
        return inputs
