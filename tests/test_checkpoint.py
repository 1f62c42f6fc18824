"""Pruned models come back: from this project, from transformers with the saved module, and from transformers alone."""

from __future__ import annotations

import copy
import errno
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import pruners
from pruners import anatomy, apply, checkpoint
from pruners.apply import Kept
from pruners.retrain import LoRA, LoRAPrune, MaskLoRA, ScaleLoRA, Trainable, finetune
from tests.conftest import CONFIGS, SHARED, tiny

FLAP = pruners.Flap(ratio=0.5)
UNIFORM = pruners.Flap(ratio=0.5, structure="UL-UM")


def pruned(kind, windows, method=FLAP):
    model = tiny(kind)
    pruners.prune(model, method, windows)
    return model


def no_attention(kind):
    """Cut by hand: no head in the first block, no channel in the second."""
    model = tiny(kind)
    for block in anatomy.blocks(model):
        kept = Kept.all(block)
        kept["mlp" if block.index else "attention"][:] = False
        apply.cut(block, kept)
    apply.describe(model)
    return model


def ragged(kind):
    return pruned(kind, torch.arange(96).view(6, 16))


WAYS = {"ragged": ragged, "nothing left": no_attention}


def generated(model, windows):
    mask = torch.ones_like(windows)
    return model.generate(windows, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def in_a_fresh_process(code, tmp_path):
    """Runs code that knows nothing of this project; returns what it prints."""
    environment = os.environ | {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    check = "import sys; assert not any(name.split('.')[0] == 'pruners' for name in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{check}"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("method", [FLAP, UNIFORM, pruners.WandaSP(ratio=0.5)], ids=["flap", "uniform", "wanda_sp"])
def test_a_round_trip_changes_no_logit_and_no_generated_token(kind, windows, method, tmp_path):
    model = pruned(kind, windows, method)
    checkpoint.save(model, None, tmp_path / "model")
    loaded, tokenizer = checkpoint.load(tmp_path / "model")
    assert tokenizer is None
    assert torch.equal(loaded(windows).logits, model(windows).logits)
    assert torch.equal(generated(loaded, windows), generated(model, windows))


def test_blocks_without_heads_or_channels_come_back(kind, windows, tmp_path):
    model = no_attention(kind)
    checkpoint.save(model, None, tmp_path / "model")
    loaded, _ = checkpoint.load(tmp_path / "model")
    assert torch.equal(loaded(windows).logits, model(windows).logits)
    assert torch.equal(generated(loaded, windows), generated(model, windows))


def test_importing_pruners_is_enough_for_transformers(kind, windows, tmp_path):
    model = pruned(kind, windows)
    checkpoint.save(model, None, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert type(loaded) is type(model)
    assert type(loaded).__name__ == f"Pruned{type(tiny(kind)).__name__}"
    assert torch.equal(loaded(windows).logits, model(windows).logits)


def test_save_pretrained_of_a_cut_model_writes_the_same(kind, windows, tmp_path):
    model = pruned(kind, windows)
    model.save_pretrained(tmp_path)
    loaded, _ = checkpoint.load(tmp_path)
    assert torch.equal(loaded(windows).logits, model(windows).logits)


def test_the_saved_module_is_enough_without_this_project(windows, tmp_path):
    models = {f"{kind} {how}": make(kind) for kind in CONFIGS for how, make in WAYS.items()}
    for name, model in models.items():
        checkpoint.save(model, None, tmp_path / name)
        save_file({"windows": windows, "logits": model(windows).logits.detach()}, tmp_path / f"{name}.safetensors")
    code = """
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for path in Path().glob("*.safetensors"):
    model = AutoModelForCausalLM.from_pretrained(path.stem, trust_remote_code=True)
    expected = load_file(path)
    assert torch.equal(model(expected["windows"]).logits, expected["logits"])
    prompt = expected["windows"].masked_fill(torch.arange(16) < torch.tensor([5, 0, 0, 0, 0, 0])[:, None], 0)
    options = {"attention_mask": (prompt > 0).long(), "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    cached, plain = (model.generate(prompt, use_cache=use, **options) for use in (True, False))
    assert cached.shape[1] > 16 and torch.equal(cached, plain)
    model.save_pretrained(f"again/{path.stem}")
    print(type(model).__module__, flush=True)
"""
    modules = in_a_fresh_process(code, tmp_path).splitlines()
    assert len(modules) == len(models)
    assert all(module.startswith("transformers_modules.") for module in modules)
    for name, model in models.items():
        again, _ = checkpoint.load(tmp_path / "again" / name)
        assert torch.equal(again(windows).logits, model(windows).logits)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("llama multi-head", pruners.Flap(ratio=0.5, structure="UL-UM")),
        ("llama multi-head", pruners.WandaSP(ratio=0.5)),
        ("llama grouped-query", pruners.Flap(ratio=0.34, structure="UL-MM", heads_removed=0)),
        ("opt", pruners.Flap(ratio=0.2, structure="UL-MM", heads_removed=0)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_uniform_results_open_in_stock_transformers(kind, method, windows, tmp_path):
    model = pruned(kind, windows, method)
    checkpoint.save(model, None, tmp_path / "model")
    said = json.loads((tmp_path / "model/config.json").read_text())
    assert said["model_type"] == ("opt" if kind == "opt" else "llama")
    assert not {"blocks", "auto_map", "pruned_format"} & said.keys()
    assert sorted(path.suffix for path in (tmp_path / "model").iterdir()) == [".json", ".json", ".safetensors"]
    stock = (OPTForCausalLM if kind == "opt" else LlamaForCausalLM).from_pretrained(tmp_path / "model")
    assert_close(stock(windows).logits, model(windows).logits, rtol=1e-5, atol=1e-5)


def test_fewer_blocks_and_fewer_channels_are_plain_where_the_numbers_divide(kind, windows, tmp_path):
    layers, channels = tiny(kind), tiny(kind)
    pruners.prune(layers, pruners.LLMPruner(ratio=0.5, granularity="layer"))
    pruners.prune(channels, pruners.LLMPruner(ratio=0.25, granularity="channel", importance="l2"))
    for name, model in (("layers", layers), ("channels", channels)):
        checkpoint.save(model, None, tmp_path / name)
        loaded, _ = checkpoint.load(tmp_path / name)
        assert torch.equal(loaded(windows).logits, model(windows).logits)
        assert loaded.config.tie_word_embeddings == (loaded.lm_head.weight is loaded.get_input_embeddings().weight)
    assert AutoConfig.from_pretrained(tmp_path / "layers").model_type == ("opt" if kind == "opt" else "llama")
    pruned_type = AutoConfig.from_pretrained(tmp_path / "channels").model_type
    assert pruned_type == ("pruned_opt" if kind == "opt" else "llama")  # 36 channels: 4 and 6 heads divide them


def test_unstructured_results_are_plain(kind, windows, tmp_path):
    model = tiny(kind)
    pruners.prune(model, pruners.Wanda(sparsity=0.5), windows)
    checkpoint.save(model, None, tmp_path / "model")
    assert AutoConfig.from_pretrained(tmp_path / "model").model_type == model.config.model_type
    assert torch.equal(checkpoint.load(tmp_path / "model")[0](windows).logits, model(windows).logits)


def test_masked_results_with_biases_come_back_too(kind, windows, tmp_path):
    model = tiny(kind)
    pruners.prune(model, FLAP, windows, cut=False)
    checkpoint.save(model, None, tmp_path / "model")
    assert_close(checkpoint.load(tmp_path / "model")[0](windows).logits, model(windows).logits, rtol=1e-5, atol=1e-5)


def test_a_sliding_window_family_comes_back(windows, tmp_path):
    config = MistralConfig(
        vocab_size=96, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=64, sliding_window=8,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    pruners.prune(model, FLAP, windows)
    checkpoint.save(model, None, tmp_path / "model")
    loaded, _ = checkpoint.load(tmp_path / "model")
    assert torch.equal(loaded(windows).logits, model(windows).logits)
    assert torch.equal(generated(loaded, windows), generated(model, windows))


def test_a_trained_model_with_its_tokenizer_and_sharded_files(stories, tmp_path):
    model, tokenizer = stories(), AutoTokenizer.from_pretrained(SHARED / "data/models/stories260K/hf")
    windows = torch.randint(3, 512, (4, 32), generator=torch.Generator().manual_seed(0))
    pruners.prune(model, pruners.Flap(ratio=0.3), windows)
    checkpoint.save(model, tokenizer, tmp_path / "model", max_shard_size="300KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    loaded, again = checkpoint.load(tmp_path / "model")
    assert loaded.lm_head.weight is loaded.get_input_embeddings().weight
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids
    assert again("Once upon a time").input_ids == prompt[0].tolist()
    assert torch.equal(generated(loaded, prompt), generated(model, prompt))


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


def without_bias(shapes):
    """One bias less than the model has."""
    name = next(name for name in (*shapes, "fc2.bias") if "bias" in name)
    return shapes | {name: None}


def shifted(shapes):
    """One vector longer than the model's, or one matrix of the same rows or columns wider."""
    name = next((name for name in shapes if "bias" in name), "self_attn.q_proj.weight")
    return shapes | {name: [*shapes[name][:-1], shapes[name][-1] + 1]}


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


def test_a_folder_in_use_is_left_alone_and_an_empty_one_is_taken(tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="choose another folder"):
        checkpoint.save(tiny("opt"), None, tmp_path / "used")
    (tmp_path / "empty").mkdir()
    checkpoint.save(tiny("opt"), None, tmp_path / "empty")
    assert (tmp_path / "empty/config.json").is_file()


def test_a_save_that_fails_leaves_nothing(tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        checkpoint.save(tiny("opt"), Broken(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        checkpoint.load(tmp_path)


def as_format_1(model, folder):
    """Write the model's configuration over the saved one as the first format had it: biases by name, no shapes."""
    said = json.loads((folder / "config.json").read_text())
    blocks = [
        {"heads": b.heads, "kv_heads": b.kv_heads, "channels": b.channels,
         "biases": [name for name, linear in b.linears().items() if linear.bias is not None]}
        for b in anatomy.blocks(model)
    ]  # fmt: skip
    widths = {"num_attention_heads": "heads", "num_key_value_heads": "kv_heads", "intermediate_size": "channels",
              "ffn_dim": "channels"}  # fmt: skip
    said |= {name: max(1, *(b[of] for b in blocks)) for name, of in widths.items() if name in said}
    said |= {"blocks": blocks, "pruned_format": 1, "head_dim": anatomy.blocks(model)[0].head_dim}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in said.items() if k not in ("places", "dense")}))


@pytest.mark.parametrize("made", [*WAYS, "narrow"])
def test_folders_of_the_first_format_keep_opening(kind, made, windows, tmp_path):
    model = tiny(kind)
    if made == "narrow":  # 40 channels, which no number of heads of the model's size divides
        apply.narrow(model, torch.arange(48) % 6 != 0)
        apply.describe(model)
        pruners.prune(model, FLAP, windows)
    else:
        model = WAYS[made](kind)
    model.save_pretrained(tmp_path / "out")
    as_format_1(model, tmp_path / "out")
    opened, _ = checkpoint.load(tmp_path / "out")
    assert torch.equal(opened(windows).logits, model(windows).logits)
    assert torch.equal(generated(opened, windows), generated(model, windows))
    checkpoint.save(opened, None, tmp_path / "again")
    again, _ = checkpoint.load(tmp_path / "again")
    assert torch.equal(again(windows).logits, model(windows).logits)


@pytest.mark.parametrize(
    "method",
    [
        pruners.WandaSP(ratio=0.2),  # 26 heads of 32
        pruners.Flap(ratio=0.2),
        pruners.Flap(ratio=0.5),
        pruners.MagnitudeSP(ratio=0.3),
        pruners.LLMPruner(ratio=0.3, attention_blocks=(0, 2), mlp_blocks=(0, 2)),
        pruners.LLMPruner(ratio=0.1, granularity="channel", importance="l2"),
    ],
    ids=lambda method: type(method).__name__,
)
@pytest.mark.parametrize("kind", ["llama", "mistral", "opt"])
def test_any_number_of_heads_and_any_width_is_saved_and_opens(kind, method, windows, tmp_path):
    wide = {"vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 2, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 32, "intermediate_size": 64}
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**wide, **heads)),
        "mistral": lambda: MistralForCausalLM(MistralConfig(**wide, **heads, num_key_value_heads=32, head_dim=4)),
        "opt": lambda: OPTForCausalLM(OPTConfig(**wide, num_attention_heads=32, ffn_dim=64, word_embed_proj_dim=128)),
    }[kind]().eval()
    pruners.prune(model, method, windows)
    checkpoint.save(model, None, tmp_path / "out")
    opened, _ = checkpoint.load(tmp_path / "out")
    assert_close(opened(windows).logits, model(windows).logits, rtol=0, atol=1e-6)


def test_adapters_beside_their_matrices_are_refused_before_anything_is_written(windows, tmp_path):
    model = pruned("llama grouped-query", windows, pruners.Wanda(sparsity=0.5))
    finetune(model, Trainable(adapters=LoRA(rank=4)), windows, steps=1, learning_rate=1e-2)
    with pytest.raises(ValueError, match=r"42 tensors that LlamaForCausalLM does not know.*Merge adapters first"):
        checkpoint.save(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_model_cut_without_a_description_is_refused(tmp_path):
    model = tiny("llama multi-head")
    block = anatomy.blocks(model)[0]
    kept = Kept.all(block)
    kept["mlp"][:5] = False
    apply.cut(block, kept)
    with pytest.raises(ValueError, match=r"apply\.describe"):
        checkpoint.save(model, None, tmp_path / "out")


def test_generation_flags_that_are_never_used_are_dropped_with_a_warning(windows, tmp_path, caplog):
    model = tiny("llama multi-head")
    model.generation_config = own = GenerationConfig(temperature=0.9, top_p=0.6, eos_token_id=2, length_penalty=2.0)
    pruners.prune(model, FLAP, windows)
    checkpoint.save(model, None, tmp_path / "out")
    opened, _ = checkpoint.load(tmp_path / "out")
    assert (opened.generation_config.temperature, opened.generation_config.eos_token_id) == (None, 2)
    assert model.generation_config is own
    assert "temperature, top_p" in caplog.text


def test_generation_flags_of_a_sampling_model_stay(tmp_path):
    model = tiny("opt")
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.9, eos_token_id=2)
    checkpoint.save(model, None, tmp_path / "out")
    assert checkpoint.load(tmp_path / "out")[0].generation_config.temperature == 0.9


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_model_from_a_pruned_configuration_starts_as_the_dense_class_does_and_trains(kind, windows):
    opened = AutoModelForCausalLM.from_config(ragged(kind).config)
    dense = AutoModelForCausalLM.from_config(CONFIGS[kind])
    stock = {name for name, p in dense.named_parameters() if not p.any()}
    assert {name for name, p in opened.named_parameters() if p.numel() and not p.any()} <= stock
    deviations = [p.std() for name, p in opened.named_parameters() if "proj.weight" in name and p.numel() > 100]
    assert all(0.01 < deviation < 0.03 for deviation in deviations)
    before = {name: p.clone() for name, p in opened.named_parameters()}
    optimizer = torch.optim.AdamW(opened.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(opened(windows, labels=windows).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0] - 0.1
    assert not [name for name, p in opened.named_parameters() if torch.equal(p, before[name]) and p.numel() > 48]


def test_biases_that_repair_made_start_at_random_in_a_family_without_them():
    config = copy.deepcopy(CONFIGS["opt"])
    config.enable_bias = False
    model = OPTForCausalLM(config)
    pruners.prune(model, FLAP, torch.arange(96).view(6, 16))
    opened = AutoModelForCausalLM.from_config(model.config)
    assert opened.model.decoder.layers[0].fc2.bias.any()


def test_paths_are_what_a_shell_makes_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    checkpoint.save(tiny("opt"), None, "~/kept")
    assert (tmp_path / "home/kept/config.json").is_file()
    assert checkpoint.load("~/kept")[1] is None
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    checkpoint.save(tiny("opt"), None, ".")
    assert sorted(os.listdir(".")) == ["config.json", "generation_config.json", "model.safetensors"]
    with pytest.raises(FileExistsError, match="empty is there already and not empty"):
        checkpoint.save(tiny("opt"), None, ".")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        Exception("No space left on device (os error 28)"),  # of tokenizers
    ],
    ids=repr,
)
@pytest.mark.parametrize("folder", ["new/deep", "empty"])
def test_a_full_disk_is_named_and_nothing_is_left_behind(error, folder, tmp_path):
    class Full:
        def save_pretrained(self, folder):
            raise error

    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match=f"Cannot write .*{folder}: no space left on device; free some space") as refused:
        checkpoint.save(tiny("opt"), Full(), tmp_path / folder)
    assert refused.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def test_what_a_killed_process_left_of_the_same_folder_goes(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left, lives = (tmp_path / f".out.{platform.node()}-{process}.tmp" for process in (dead.pid, os.getppid()))
    for folder in (left, lives):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    checkpoint.save(tiny("opt"), None, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([lives.name, "out"])


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


def test_an_older_module_in_the_folder_is_never_run(kind, windows, tmp_path):
    model = pruned(kind, windows)
    checkpoint.save(model, None, tmp_path / "out")
    (tmp_path / "out/modeling_pruned.py").write_text("raise SystemExit('the folder has run its own code')")
    assert torch.equal(checkpoint.load(tmp_path / "out")[0](windows).logits, model(windows).logits)
    for options in ({}, {"trust_remote_code": True}):
        opened = AutoModelForCausalLM.from_pretrained(tmp_path / "out", **options)
        assert type(opened) is type(model)


def test_a_model_that_cannot_be_saved_is_refused_before_anything_is_done(tmp_path):
    head = tiny("llama multi-head")
    inject_adapter_in_model(LoraConfig(target_modules=["lm_head"]), head)
    beams = tiny("opt")
    beams.generation_config.num_return_sequences = 3
    old = tiny("opt")
    old.config.temperature = 0.9
    classifier = LlamaForSequenceClassification(CONFIGS["llama multi-head"])
    cases = [
        (head, ValueError, "3 tensors that LlamaForCausalLM does not know, e.g. lm_head.*Merge adapters first"),
        (beams, ValueError, "num_return_sequences.*Mend model.generation_config first"),
        (old, ValueError, "config holds temperature, which transformers saves in generation_config only"),
        (classifier, ValueError, "1 tensors that LlamaForCausalLM does not know, e.g. score.weight"),
        (get_peft_model(tiny("opt"), LoraConfig()), TypeError, "merge_and_unload"),
        (torch.nn.DataParallel(tiny("opt")), TypeError, "model.module"),
        (torch.nn.Linear(2, 2), TypeError, "got a torch.nn.modules.linear.Linear"),
    ]
    for model, kind, said in cases:
        for refused in (checkpoint.check, lambda model: checkpoint.save(model, None, tmp_path / "out")):
            with pytest.raises(kind, match=said):
                refused(model)
    with pytest.raises(ValueError, match="on the meta device and holds no values to save"):
        checkpoint.save(tiny("opt").to("meta"), None, tmp_path / "out")
    with pytest.raises(TypeError, match="tokenizer is one of transformers, or None; got 'gpt2'"):
        checkpoint.save(tiny("opt"), "gpt2", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_what_is_pruned_can_be_saved_or_is_refused_before(windows):
    model = tiny("opt")
    model.generation_config.num_return_sequences = 3
    before = copy.deepcopy(model.state_dict())
    for method in (FLAP, pruners.Wanda()):
        with pytest.raises(ValueError, match="generation_config cannot be saved"):
            pruners.prune(model, method, windows)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("adapters", [LoRA(4), LoRAPrune(4), ScaleLoRA(4), MaskLoRA(4)], ids=repr)
def test_adapters_in_place_are_refused_and_merged_ones_are_saved(adapters, windows, tmp_path):
    model = pruned("llama grouped-query", windows, pruners.Wanda(sparsity=0.5))
    attached = Trainable(adapters=adapters).attach(model)
    with pytest.raises(ValueError, match="Merge adapters first"):
        checkpoint.save(model, None, tmp_path / "out")
    attached.detach()
    finetune(model, Trainable(adapters=adapters), windows, steps=2, learning_rate=1e-2)
    if not adapters.keeps_sparsity and not getattr(adapters, "merge", False):
        return
    checkpoint.save(model, None, tmp_path / "out")
    assert_close(checkpoint.load(tmp_path / "out")[0](windows).logits, model(windows).logits, rtol=0, atol=1e-6)


def test_peft_knows_where_adapters_go_in_a_ragged_model(kind, windows):
    plain, cut = (get_peft_model(model, LoraConfig(r=2)) for model in (tiny(kind), ragged(kind)))
    names = [{name for name, _ in model.named_modules() if name.endswith("lora_A")} for model in (plain, cut)]
    assert names[0] == names[1] != set()
    merged = cut.merge_and_unload()
    assert_close(merged(windows).logits, ragged(kind)(windows).logits, rtol=0, atol=1e-6)


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


def test_a_model_without_a_generation_configuration_is_saved(windows, tmp_path):
    model = tiny("llama grouped-query")
    model.generation_config = None
    pruners.prune(model, pruners.Flap(ratio=0.3), windows)
    opened, _ = checkpoint.load(checkpoint.save(model, None, tmp_path / "out"))
    assert torch.equal(opened(input_ids=windows).logits, model(input_ids=windows).logits)
    assert opened.generation_config.eos_token_id == 2
    assert model.generation_config is None


@pytest.mark.parametrize("size", ["-1GB", "0GB", "0.0GB", "5", "5XB", "nan", "GB", " ", 1000, True])
def test_a_size_of_weight_files_that_is_none_is_refused(tmp_path, size):
    with pytest.raises((TypeError, ValueError), match="max_shard_size is None or a size above 0, such as '5GB'"):
        checkpoint.save(tiny("opt"), None, tmp_path / "out", max_shard_size=size)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("folder", "options", "said"),
    [
        (None, {}, "folder is the path of a model folder; got None"),
        (3, {}, r"folder is the path of a model folder; got 3 \(int\)"),
        ("", {}, "folder is the path of a model folder; got ''"),
        (".", {"dtype": "float9"}, "dtype is 'auto', .* got 'float9'"),
        (".", {"dtype": None}, "dtype is 'auto', .* got None"),
        (".", {"dtype": 3}, "dtype is 'auto', .* got 3"),
        (".", {"trust_remote_code": True}, "load sets trust_remote_code itself"),
        (".", {"use_safetensors": False}, "load sets use_safetensors itself"),
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
        *((written("config.json", text), "must hold an object") for text in (b"[]", b"null", b"3", b'"x"')),
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
    with pytest.raises((ValueError, FileNotFoundError), match=said) as caught:
        checkpoint.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
