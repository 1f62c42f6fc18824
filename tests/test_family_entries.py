"""What an entry of FAMILIES has to say, and architectures that none describes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
)

import pruners
from pruners import anatomy, checkpoint
from pruners.families import FAMILIES, Family
from tests.families import tiny, windows

ADVICE = re.compile(r"To add it, name its blocks and projections in pruners/families\.py: (FAMILIES\[.*)\.$")
ADVISED = {  # what the dots of the advice stand for, by model type
    "qwen2": {
        "blocks": "model.layers",
        "qkv": tuple(f"self_attn.{which}_proj" for which in "qkv"),
        "output": "self_attn.o_proj",
        "inward": ("mlp.gate_proj", "mlp.up_proj"),
        "outward": "mlp.down_proj",
    },
    "gpt_neo": {
        "blocks": "transformer.h",
        "qkv": tuple(f"attn.attention.{which}_proj" for which in "qkv"),
        "output": "attn.attention.out_proj",
        "inward": ("mlp.c_fc",),
        "outward": "mlp.c_proj",
    },
}


def gpt_neo():
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "intermediate_size": 24}
    return GPTNeoForCausalLM(GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]], window_size=6)).eval()


@pytest.mark.parametrize("name", ADVISED)
def test_the_advice_for_an_unknown_family_is_all_it_takes(name, monkeypatch, tmp_path):
    model = gpt_neo() if name == "gpt_neo" else tiny(name)
    monkeypatch.delitem(FAMILIES, name, raising=False)
    with pytest.raises(ValueError, match=f"^Unknown decoder family '{name}'") as refused:
        pruners.prune(model, pruners.Magnitude())
    (advice,) = ADVICE.findall(str(refused.value))
    monkeypatch.setitem(FAMILIES, name, None)  # to be undone whatever the advice makes of it
    line = re.sub(r"(\w+)=\.\.\.", lambda found: f"{found[1]}={ADVISED[name][found[1]]!r}", advice)
    exec(line, {"FAMILIES": FAMILIES, "Family": Family})
    tokens = windows("llama")
    pruners.prune(model, pruners.Flap(ratio=0.4), tokens)
    pruners.prune(model, pruners.Wanda(sparsity=0.5), tokens)
    checkpoint.save(model, None, tmp_path / "out")
    again, _ = checkpoint.load(tmp_path / "out")
    assert type(again).__name__.startswith("Pruned")
    assert torch.equal(again(tokens).logits, model(tokens).logits)


def test_layers_that_a_block_goes_round_are_refused(monkeypatch):
    model = tiny("bloom")
    model.config.slow_but_exact = True
    with pytest.raises(ValueError, match=r"^With slow_but_exact=True a BloomForCausalLM multiplies by slices .* False"):
        pruners.prune(model, pruners.Magnitude())
    monkeypatch.setitem(FAMILIES, "bloom", replace(FAMILIES["bloom"], calls_layers={}))
    for block in anatomy.blocks(model):
        block.attention.slow_but_exact, block.attention.pretraining_tp = True, 2
    with pytest.raises(
        ValueError, match=r"transformer\.h\.0\.self_attention\.dense was not called while its block ran"
    ):
        pruners.prune(model, pruners.Wanda(), windows("bloom"))


def test_models_that_read_more_than_text_are_refused():
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 96}
    sight = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["gemma3"](text_config=text, vision_config=sight))
    with pytest.raises(ValueError, match=r"\(gemma3\) is multimodal, .* use a transformers\.Gemma3ForCausalLM"):
        pruners.prune(model, pruners.Magnitude())


@pytest.mark.parametrize("entry", [{"qkv": ("a", "b")}, {"layout": "stacked"}, {"layout": "sideways"}], ids=str)
def test_an_entry_that_is_none_is_refused(entry):
    with pytest.raises(ValueError, match="three projections in qkv, or one whose layout is stacked or grouped"):
        replace(FAMILIES["llama"], **entry)


def test_an_entry_that_names_what_is_not_there_is_refused(monkeypatch):
    monkeypatch.setitem(FAMILIES, "phi", FAMILIES["llama"])
    with pytest.raises(ValueError, match=r"model\.layers\.0 does not match its family's entry"):
        anatomy.blocks(tiny("phi"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek_v2", "latent vector that all heads share"),
        ("deepseek_v3", "latent vector that all heads share"),
        ("gpt_oss", "matrices are transposed"),
    ],
)
def test_architectures_that_no_entry_describes_are_refused_with_the_reason(name, reason):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 96, "pad_token_id": 0}
    config = CONFIG_MAPPING[name](**sizes)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=reason):
        pruners.prune(model, pruners.Magnitude())
