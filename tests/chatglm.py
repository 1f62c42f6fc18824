"""Tiny ChatGLM models: the golden one, and one of odd shapes with a folder in the published layout around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from pruners.chatglm import ChatGLMConfig, ChatGLMForCausalLM
from tests.conftest import SHARED

GOLDEN = SHARED / "golden/chatglm"
SPECIAL = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
BLANKS = ("<n>", "<|tab|>", *(f"<|blank_{length}|>" for length in range(2, 81)))
ODD = {
    "vocab_size": 173,
    "hidden_size": 60,
    "num_layers": 2,
    "num_attention_heads": 3,
    "inner_hidden_size": 70,
    "max_sequence_length": 64,
    "bos_token_id": 8,
    "eos_token_id": 9,
    "mask_token_id": 4,
    "gmask_token_id": 5,
}
# what the published folder says and this project does not need
PUBLISHED = {
    "architectures": ["ChatGLMModel"],
    "auto_map": {
        "AutoConfig": "configuration_chatglm.ChatGLMConfig",
        "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
        "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
    },
    "model_type": "chatglm",
    "pad_token_id": 3,
    "position_encoding_2d": True,
    "pre_seq_len": None,
    "prefix_projection": False,
    "quantization_bit": 0,
    "torch_dtype": "float32",
    "transformers_version": "4.27.1",
    "use_cache": True,
}
TOKENIZER = {
    "tokenizer_class": "ChatGLMTokenizer",
    "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
    "bos_token": "<sop>",
    "eos_token": "<eop>",
    "end_token": "</s>",
    "gmask_token": "[gMASK]",
    "mask_token": "[MASK]",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "remove_space": False,
    "do_lower_case": False,
    "num_image_tokens": 0,
}
TEXT = "the old model counts words and numbers\nsmall models learn slowly\npruning takes heads and channels out\n" * 4


def golden() -> ChatGLMForCausalLM:
    """The golden model, float32; its head is a tensor of its own."""
    config = json.loads((GOLDEN / "config_tiny.json").read_text())
    model = ChatGLMForCausalLM(ChatGLMConfig(**config, tie_word_embeddings=False)).eval()
    weights = load_file(GOLDEN / "weights_tiny.safetensors")
    model.load_state_dict({name: weight for name, weight in weights.items() if not name.endswith("inv_freq")})
    return model


def odd(**changes: Any) -> ChatGLMForCausalLM:
    """A random model whose heads, layers, widths and vocabulary are not the golden one's; norms and biases, too."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ChatGLMForCausalLM(ChatGLMConfig(**(ODD | changes))).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def prompts(count: int = 3, prompt: int = 6, answer: int = 5) -> torch.Tensor:
    """Tokens [count, prompt + 2 + answer] with [gMASK] <sop> between prompt and answer, none of them special."""
    draw = torch.Generator().manual_seed(3)
    before, after = (torch.randint(10, 173, (count, length), generator=draw) for length in (prompt, answer))
    return torch.cat([before, torch.tensor([[5, 8]]).expand(count, 2), after], 1)


def sentencepiece_file(folder: Path) -> Path:
    """An `ice_text.model` with the published special pieces at ids 4 to 11."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "ice_text"), vocab_size=140,
        user_defined_symbols=[*SPECIAL, *BLANKS],
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    text.unlink()
    (folder / "ice_text.vocab").unlink()
    return folder / "ice_text.model"


def published_folder(folder: Path) -> Path:
    """The odd model as the published repository lays its files out, in two shards; the head is stored, too."""
    folder.mkdir()
    sentencepiece_file(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
    (folder / "config.json").write_text(json.dumps(ODD | PUBLISHED))
    weights = {name: weight.clone() for name, weight in odd().state_dict().items()}
    for layer in range(ODD["num_layers"]):
        weights[f"transformer.layers.{layer}.attention.rotary_emb.inv_freq"] = torch.ones(5)
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for index, name in enumerate(sorted(weights)):
        shards.setdefault(f"model-0000{1 + index % 2}-of-00002.safetensors", {})[name] = weights[name]
    for name, shard in shards.items():
        save_file(shard, folder / name, {"format": "pt"})
    where = {name: file for file, shard in shards.items() for name in shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder
