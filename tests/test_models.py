import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, OPTConfig

from experiments import models

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
STORIES = SHARED / "data/models/stories260K/hf"
QUERY = "model.layers.0.self_attn.q_proj.weight"
needs_shared = pytest.mark.skipif(not STORIES.is_dir(), reason=f"needs the trained model in {STORIES}")

# hidden width, MLP width, blocks, heads, KV heads, vocabulary: the public configurations
LLAMA = {
    "smollm2-135m": (576, 1536, 30, 9, 3, 49152),
    "llama-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-30b": (6656, 17920, 60, 52, 52, 32000),
    "llama-65b": (8192, 22016, 80, 64, 64, 32000),
    "llama-2-7b": (4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b": (5120, 13824, 40, 40, 40, 32000),
    "llama-2-7b-chat": (4096, 11008, 32, 32, 32, 32000),
    "llama-2-13b-chat": (5120, 13824, 40, 40, 40, 32000),
    "mistral-7b": (4096, 14336, 32, 32, 8, 32000),
    "llama-2-70b": (8192, 28672, 80, 64, 8, 32000),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "vicuna-7b": (4096, 11008, 32, 32, 32, 32000),
    "vicuna-13b": (5120, 13824, 40, 40, 40, 32000),
    "vicuna-7b-v0": (4096, 11008, 32, 32, 32, 32001),
    "tinyllama-1.1b": (2048, 5632, 22, 32, 4, 32000),
}
# hidden width, embedding width, blocks, heads
OPT = {
    "opt-125m": (768, 768, 12, 12),
    "opt-350m": (1024, 512, 24, 16),
    "opt-1.3b": (2048, 2048, 24, 32),
    "opt-2.7b": (2560, 2560, 32, 32),
    "opt-6.7b": (4096, 4096, 32, 32),
    "opt-13b": (5120, 5120, 40, 40),
    "opt-30b": (7168, 7168, 48, 56),
    "opt-66b": (9216, 9216, 64, 72),
}

OTHERS = json.loads(Path(__file__).with_name("model_configs.json").read_text())  # as their config.json has it


@pytest.fixture
def copy(tmp_path):
    """A copy of the small trained model that a test may spoil."""
    folder = tmp_path / "model"
    shutil.copytree(STORIES, folder)
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    return folder


def spoil(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def config_of(name):
    if name in OPT:
        hidden, embedding, blocks, heads = OPT[name]
        return OPTConfig(
            hidden_size=hidden,
            word_embed_proj_dim=embedding,
            ffn_dim=4 * hidden,
            num_hidden_layers=blocks,
            num_attention_heads=heads,
            do_layer_norm_before=name != "opt-350m",
        )
    if name in OTHERS:
        return CONFIG_MAPPING[OTHERS[name]["model_type"]](**OTHERS[name])
    hidden, mlp, blocks, heads, kv_heads, vocabulary = LLAMA[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        tie_word_embeddings=name == "smollm2-135m",
    )


@pytest.mark.parametrize("name", models.CATALOGUE)
def test_parameter_counts_follow_from_the_public_configurations(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name))
    found, config = models.find(name), model.config
    assert model.num_parameters() == found.parameters
    assert (config.num_hidden_layers, config.num_attention_heads) == (found.blocks, found.heads)


@pytest.mark.parametrize("model", models.CATALOGUE.values(), ids=str)
def test_a_catalogue_model_has_one_source_and_a_whole_commit_or_none(model):
    assert (model.hub is None) != (model.package is None)
    assert model.revision is None or (len(model.revision) == 40 and int(model.revision, 16))
    assert models.identity(model.name) != {}


def test_an_unknown_name_is_answered_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"Unknown model 'opt-125'\. Did you mean opt-125m"):
        models.find("opt-125")


def test_an_unknown_dtype_is_answered_with_the_nearest_ones():
    with pytest.raises(ValueError, match=r"Unknown dtype 'flaot16'\. Did you mean float16"):
        models.load("smollm2-135m", dtype="flaot16")


@needs_shared
def test_a_folder_goes_where_a_name_goes():
    model, tokenizer = models.load(STORIES, dtype="bfloat16", device="cpu")
    assert model.dtype == torch.bfloat16
    assert not model.training
    assert model.num_parameters() == 260_032
    assert models.find(STORIES).positions == 512
    assert models.commit(STORIES) is None
    assert tokenizer("Once").input_ids[0] == tokenizer.bos_token_id


@needs_shared
def test_a_fingerprint_stays_with_the_content_and_changes_with_weights_and_tokenizer(copy):
    original = models.identity(STORIES)
    assert models.identity(copy) == original
    spoil(copy, lambda weights: weights[QUERY][0].add_(1))
    other_weights = models.identity(copy)
    (copy / "tokenizer_config.json").write_text("{}")
    assert len({str(seen) for seen in (original, other_weights, models.identity(copy))}) == 3


@needs_shared
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda weights: weights.pop(QUERY), "1 weights are missing, e.g. " + QUERY),
        (lambda weights: weights.update({QUERY: torch.zeros(32, 64)}), "1 weights are of another shape"),
        (
            lambda weights: weights.update({QUERY.replace("weight", "bias"): torch.zeros(64)}),
            "1 weights are unexpected",
        ),
    ],
    ids=["missing", "cut", "surplus"],
)
def test_weights_that_do_not_fit_the_configuration_are_refused(copy, change, complaint):
    spoil(copy, change)
    with pytest.raises(ValueError, match=complaint):
        models.load(copy)


@needs_shared
def test_a_truncated_weight_file_is_refused(copy):
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="are damaged"):
        models.load(copy)


@needs_shared
def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\)"):
        models.load(copy)


def test_a_folder_without_a_configuration_is_no_model(tmp_path):
    with pytest.raises(ValueError, match="is not a model folder"):
        models.find(tmp_path)


def test_a_refusal_of_the_hub_says_what_to_do(monkeypatch):
    def refuse(*_, **__):
        raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(OSError, match=r"llama-2-7b .* gated repo.*accept the licence.*hf auth login.*local folder"):
        models.load("llama-2-7b")


def test_the_embedded_model_loads_in_float32():
    model, tokenizer = models.load("smollm2-135m")
    assert model.dtype == torch.float32
    assert model.num_parameters() == models.find("smollm2-135m").parameters
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
