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
from safetensors.torch import save_file
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
from tests.saved_models import FLAP, UNIFORM, no_attention, pruned, ragged

WAYS = {"ragged": ragged, "nothing left": no_attention}


def generated(model, windows):
    mask = torch.ones_like(windows)
    return model.generate(windows, attention_mask=mask, max_new_tokens=6, do_sample=False, pad_token_id=0)


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
    with pytest.raises(FileExistsError, match="empty already exists and is not empty"):
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
        (beams, ValueError, "num_return_sequences.*Correct model.generation_config first"),
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
