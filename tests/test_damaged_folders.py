"""Folders of saved models that are damaged, half there or told wrong: one sentence each."""

from __future__ import annotations

import json
import os

import pytest
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
)

import pruners
from pruners import checkpoint
from pruners.weights import opening
from tests.conftest import tiny
from tests.saved_models import edit, pruned


def test_a_missing_shard_is_named(stories, tmp_path):
    checkpoint.save(stories(), None, tmp_path / "model", max_shard_size="300KB")
    lost = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks 1 of its .* weight files, e.g. {lost.name}"):
        checkpoint.load(tmp_path / "model")


def test_weights_and_configuration_that_disagree_are_refused(kind, windows, tmp_path):
    model = pruned(kind, windows)
    checkpoint.save(model, None, tmp_path / "model")
    blocks = model.config.blocks
    edits = {
        "says other shapes for": [{**blocks[0], "channels": blocks[0]["channels"] + 1}, blocks[1]],
        "has no place for|asks for": [{**blocks[0], "shapes": without_bias(blocks[0]["shapes"])}, blocks[1]],
        "says other shapes for 1 tensors": [{**blocks[0], "shapes": shifted(blocks[0]["shapes"])}, blocks[1]],
        "describes 1 blocks and says num_hidden_layers is 2": blocks[:1],
        "does not say the heads of block 1": [blocks[0], {k: v for k, v in blocks[1].items() if k != "heads"}],
    }
    for said, edited in edits.items():
        edit(tmp_path / "model", blocks=edited)
        for opened in (checkpoint.load, AutoModelForCausalLM.from_pretrained):
            with pytest.raises(ValueError, match=said):
                opened(tmp_path / "model")


def test_a_dense_configuration_over_cut_weights_is_refused(kind, windows, tmp_path):
    checkpoint.save(pruned(kind, windows), None, tmp_path / "model")
    tiny(kind).config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="disagree"):
        checkpoint.load(tmp_path / "model")


def test_a_tensor_that_was_lost_is_refused(kind, windows, tmp_path):
    checkpoint.save(pruned(kind, windows), None, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    tensors = load_file(file)
    del tensors[next(name for name in tensors if "v_proj" in name)]
    save_file(tensors, file, metadata={"format": "pt"})
    for opened in (checkpoint.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"asks for 1 tensors that the weights lack, e\.g\. .*v_proj"):
            opened(tmp_path / "model")


def test_damaged_weights_are_refused(windows, tmp_path):
    checkpoint.save(pruned("opt", windows), None, tmp_path / "model")
    file = tmp_path / "model/model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="are damaged"):
        checkpoint.load(tmp_path / "model")


def test_a_newer_format_is_refused(windows, tmp_path):
    checkpoint.save(pruned("opt", windows), None, tmp_path / "model")
    edit(tmp_path / "model", pruned_format=3)
    with pytest.raises(ValueError, match="saved in format 3 and this code reads up to 2; update"):
        checkpoint.load(tmp_path / "model")


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        checkpoint.load(tmp_path)


def test_two_sets_of_weights_in_a_pruned_folder_are_refused_however_it_is_opened(windows, tmp_path):
    model = pruned("llama multi-head", windows)
    model.save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    for opened in (checkpoint.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(ValueError, match=r"holds two sets of weights, model\.safetensors beside model-00001"):
            opened(tmp_path / "out")
    with pytest.raises(ValueError, match="two sets of weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path, subfolder="out")
    with pytest.raises(FileExistsError):
        checkpoint.save(model, None, tmp_path / "out")


@pytest.mark.parametrize(
    "widths", [{"heads": 3}, {"heads": -1}, {"channels": "64"}, {"kv_heads": 0}, {"channels": None}], ids=str
)
def test_widths_that_are_none_are_refused(widths, windows, tmp_path):
    model = pruned("llama grouped-query", windows)
    checkpoint.save(model, None, tmp_path / "out")
    edit(
        tmp_path / "out",
        blocks=[{**model.config.blocks[0], "heads": 2, "kv_heads": 2, **widths}, model.config.blocks[1]],
    )
    with pytest.raises(ValueError, match=r"says that block 0 has .* whole numbers"):
        checkpoint.load(tmp_path / "out")


def test_a_configuration_of_the_wrong_types_is_one_sentence(tmp_path):
    checkpoint.save(tiny("opt"), None, tmp_path / "out")
    edit(tmp_path / "out", hidden_size="wide")
    with pytest.raises(ValueError, match=r"config.json describes no model: .*hidden_size") as refused:
        checkpoint.load(tmp_path / "out")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("folder", "options", "said"),
    [
        (None, {}, "folder is the path of a model folder; got None"),
        (3, {}, r"folder is the path of a model folder; got 3 \(int\)"),
        ("", {}, "folder is the path of a model folder; got ''"),
        (".", {"dtype": "float9"}, "dtype is 'auto', .* got 'float9'"),
        (".", {"dtype": None}, "dtype is 'auto', .* got None"),
        (".", {"dtype": 3}, "dtype is 'auto', .* got 3"),
        (".", {"trust_remote_code": True}, "unexpected keyword argument 'trust_remote_code'"),
        (".", {"revision": 3}, "unexpected keyword argument 'revision'"),
        (".", {"config": {"a": 1}}, "unexpected keyword argument 'config'"),
        (".", {"attn_implementation": "none such"}, "attn_implementation"),
        (".", {"device_map": "zz"}, "device"),
    ],
)
def test_what_load_cannot_be_told(monkeypatch, tmp_path, folder, options, said):
    monkeypatch.chdir(checkpoint.save(tiny("opt"), None, tmp_path / "here"))
    with pytest.raises((TypeError, ValueError), match=said):
        checkpoint.load(folder, **options)


def config(**changes):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def block(**changes):
    def change(folder):
        path = folder / "config.json"
        told = json.loads(path.read_text())
        told["blocks"][0] |= changes
        path.write_text(json.dumps(told))

    return change


def written(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        *((written("config.json", text), "JSON object") for text in (b"[]", b"null", b"3", b'"x"')),
        *(
            (written("config.json", text), "config.json cannot be read as JSON")
            for text in (b"", b"{", b"[" * 100_000, b"\xff")
        ),
        (written("config.json", b"\xef\xbb\xbf{}"), "config.json"),
        (config(model_type="nope"), "model type 'nope', which transformers does not know"),
        (config(model_type=None), "model type None"),
        (config(model_type=["llama"]), "model type"),
        (config(quantization_config={"quant_method": "gptq", "bits": 4}), "weights are quantised"),
        (config(rope_parameters={"rope_type": "nope"}), "describes no model: KeyError: 'nope'"),
        (config(vocab_size=-1), "describes no model"),
        (config(dtype="float9"), "describes no model"),
        (config(places={}), "describes no model: KeyError: 'blocks'"),
        (config(dense={"nope": 1}), "describes no model"),
        (block(shapes=None), "describes no model"),
        (block(shapes={"mlp.up_proj.weight": [-1, 48]}), "describes no model"),
        (block(shapes={"mlp.nope.weight": [1, 48]}), "describes no model"),
        (block(attributes=3), "describes no model"),
        *((written("generation_config.json", text), "generation_config.json") for text in (b"[]", b"{", b"null")),
        (
            written("generation_config.json", b'{"cache_implementation": "nope"}'),
            "holds no generation settings",
        ),
        *((written("adapter_config.json", text), "merge_and_unload") for text in (b"{}", b"[]")),
        (written("tokenizer.json", b"{"), "tokenizer files of .* are damaged"),
        (written("tokenizer_config.json", b"[]"), "tokenizer files of .* are damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no weights"),
        (lambda folder: (folder / "model.safetensors").unlink() or os.mkfifo(folder / "model.safetensors"), "no weigh"),
    ],
)
def test_a_damaged_folder_is_told_in_one_sentence_that_names_it(windows, tmp_path, damage, said):
    model = tiny("llama grouped-query")
    pruners.prune(model, pruners.Flap(ratio=0.4), windows)
    folder = checkpoint.save(model, None, tmp_path / "out")
    damage(folder)
    for opened in (checkpoint.load, *([opening.open_folder] if "tokenizer" not in said else [])):
        with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
            opened(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


def without_bias(shapes):
    """One bias less than the model has."""
    name = next(name for name in (*shapes, "fc2.bias") if "bias" in name)
    return shapes | {name: None}


def shifted(shapes):
    """One vector longer than the model's, or one matrix of the same rows or columns wider."""
    name = next((name for name in shapes if "bias" in name), "self_attn.q_proj.weight")
    return shapes | {name: [*shapes[name][:-1], shapes[name][-1] + 1]}
