"""ChatGLM-6B's published layout: tokenizer, folder, what is refused, and saving with and without this project."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import pruners
from experiments import models
from pruners.chatglm import ChatGLMForCausalLM, ChatGLMTokenizer
from pruners.chatglm.tokenization_chatglm import decode_blanks, encode_blanks
from tests.chatglm import ODD, odd, prompts, published_folder
from tests.saved_models import edit
from tests.test_checkpoint import in_a_fresh_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return published_folder(tmp_path_factory.mktemp("chatglm") / "chatglm-6b")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return ChatGLMTokenizer.from_pretrained(folder)


@pytest.fixture
def copied(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def by_transformers(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


WAYS = {
    "checkpoint": pruners.checkpoint.load,
    "experiments": lambda folder: models.load(str(folder)),
    "transformers": by_transformers,
}


@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_the_published_layout_opens(way, folder):
    model, tokenizer = WAYS[way](folder)
    assert isinstance(model, ChatGLMForCausalLM)
    assert isinstance(tokenizer, ChatGLMTokenizer)
    assert_close(model(prompts()).logits, odd()(prompts()).logits)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight
    assert not hasattr(model.config, "auto_map")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (9, 3)


def test_a_folder_is_known_by_its_own_keys(folder):
    found = models.find(str(folder))
    assert (found.positions, found.blocks, found.heads) == (64, 2, 3)
    assert found.parameters == odd().num_parameters()


def test_a_text_ends_at_its_end_token(folder):
    model, tokenizer = pruners.checkpoint.load(folder)
    asked = tokenizer("words", return_tensors="pt")
    last = model(asked.input_ids, output_hidden_states=True).hidden_states[-1][0, -1].detach()
    head = torch.zeros(ODD["vocab_size"], ODD["hidden_size"])
    head[tokenizer.eos_token_id] = last
    model.lm_head.weight = torch.nn.Parameter(head)
    found = model.generate(**asked, max_new_tokens=5, do_sample=False)
    assert found[0, asked.input_ids.shape[1] :].tolist() == [tokenizer.eos_token_id]


def test_special_tokens_are_appended(tokenizer):
    words, more = (tokenizer.encode(text, add_special_tokens=False) for text in ("old words", "more"))
    assert tokenizer("old words").input_ids == [*words, 5, 8]
    assert tokenizer("old words", "more").input_ids == [*words, 5, 8, *more, 9]
    assert tokenizer.convert_ids_to_tokens([4, 5, 8, 9, 3]) == ["[MASK]", "[gMASK]", "<sop>", "<eop>", "<pad>"]
    assert [tokenizer.mask_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [4, 8, 9]
    assert tokenizer.convert_tokens_to_ids(tokenizer.gmask_token) == 5


def test_padding_is_on_the_left(tokenizer):
    batch = tokenizer(["old words count", "old"], padding=True, return_tensors="pt")
    assert batch.keys() == {"input_ids", "attention_mask"}
    short = len(tokenizer("old").input_ids)
    assert batch.input_ids[1, :-short].unique().tolist() == [3]
    assert batch.attention_mask[1].tolist() == [0] * (batch.input_ids.shape[1] - short) + [1] * short


@pytest.mark.parametrize("text", ["old words", "old  words", "old\nwords\twords", "old" + " " * 80 + "words\n\n  learn",
                                  "numbers" + " " * 163 + "numbers"])  # fmt: skip
def test_blanks_survive(text, tokenizer):
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text
    assert decode_blanks(encode_blanks(text)) == text


def test_blanks_are_pieces_the_longest_first(tokenizer):
    assert encode_blanks(" " * 163) == "<|blank_80|><|blank_80|><|blank_3|>"
    assert encode_blanks("a b\t\n  c") == "a b<|tab|><n><|blank_2|>c"
    tokens = tokenizer.tokenize("old   words\n")
    assert [token for token in tokens if token.startswith("<")] == ["<|blank_3|>", "<n>"]


def test_the_first_release_has_image_tokens_in_front(folder, tokenizer):
    first = ChatGLMTokenizer.from_pretrained(folder, num_image_tokens=20)
    text = "old words\n learn"
    assert first(text).input_ids == [20 + token for token in tokenizer(text).input_ids]
    assert first.decode(first(text).input_ids, skip_special_tokens=True) == text
    assert (first.convert_ids_to_tokens(7), first.convert_tokens_to_ids("<image_7>")) == ("<image_7>", 7)
    assert len(first) == 20 + len(tokenizer)


def test_saved_and_opened_again_with_and_without_this_project(folder, tmp_path):
    model, tokenizer = pruners.checkpoint.load(folder)
    saved = pruners.checkpoint.save(model, tokenizer, tmp_path / "saved")
    again, spoken = pruners.checkpoint.load(saved)
    assert_close(again(prompts()).logits, model(prompts()).logits)
    assert spoken("old  words\n") == tokenizer("old  words\n")
    assert (saved / "ice_text.model").read_bytes() == (folder / "ice_text.model").read_bytes()
    torch.save(prompts(), tmp_path / "tokens.pt")
    told = in_a_fresh_process(
        f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(saved)!r}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({str(saved)!r}, trust_remote_code=True)
torch.save(model(torch.load("tokens.pt")).logits.detach(), "logits.pt")
print(tokenizer("old  words").input_ids)
""",
        tmp_path,
    )
    assert_close(torch.load(tmp_path / "logits.pt"), model(prompts()).logits.detach())
    assert told.strip() == str(tokenizer("old  words").input_ids)


def test_pickled_shards_are_refused(copied):
    for path in copied.glob("*.safetensors*"):
        path.unlink()
    (copied / "pytorch_model-00001-of-00001.bin").write_bytes(b"")
    for way in WAYS.values():
        with pytest.raises(ValueError, match=r"pickled .*pytorch_model-00001-of-00001\.bin.*safetensors") as error:
            way(copied)
        assert "\n" not in str(error.value)


def test_other_chatglms_are_refused(copied):
    edit(copied, padded_vocab_size=65_024, ffn_hidden_size=13_696)
    for way in WAYS.values():
        with pytest.raises(ValueError, match="ChatGLM2 or a later model"):
            way(copied)


def test_a_missing_vocabulary_is_said(copied):
    (copied / "ice_text.model").unlink()
    for way in WAYS.values():
        with pytest.raises(ValueError, match=r"ice_text\.model|has no tokenizer"):
            way(copied)


def test_another_vocabulary_is_refused(tmp_path, copied):
    (tmp_path / "text.txt").write_text("old words\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(copied / "ice_text"), vocab_size=20, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(ValueError, match="has no piece <sop>; it is not ChatGLM-6B's"):
        ChatGLMTokenizer.from_pretrained(copied)


def test_a_weight_that_is_missing_is_said(copied):
    edit(copied, num_layers=3)
    for way in ("checkpoint", "experiments"):
        with pytest.raises(ValueError, match=r"asks for|weights are missing"):
            WAYS[way](copied)


def test_code_of_a_folder_never_runs(copied):
    for name in ("modeling", "configuration", "tokenization"):
        (copied / f"{name}_chatglm.py").write_text("raise SystemExit('ran')")
    for way in WAYS.values():
        assert isinstance(way(copied)[0], ChatGLMForCausalLM)
    assert AutoConfig.from_pretrained(copied).text_prefix == (5, 8)
    assert json.loads((copied / "config.json").read_text())["auto_map"]


def test_chatglm_can_be_what_is_imported_first():
    code = (
        "from pruners.chatglm import ChatGLMForCausalLM\n"
        "from transformers.models.auto.configuration_auto import CONFIG_MAPPING\n"
        "assert {'chatglm', 'pruned_chatglm', 'pruned_llama'} <= set(CONFIG_MAPPING)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
