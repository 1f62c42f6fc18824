"""A model published as a difference to another one is their sum, wherever its weights are at home."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import small_table as small
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import pruners
from analysis import rows
from experiments import cells, estimate, models, papers
from experiments.__main__ import main
from experiments.batch import run_table
from experiments.models import catalogue, hub
from experiments.models.catalogue import CATALOGUE, Model
from experiments.settings import Settings
from experiments.spec import Run
from experiments.store import keys, records
from pruners.weights import homes

pytestmark = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")
EMBEDDING, HEAD, QUERY = "model.embed_tokens.weight", "lm_head.weight", "model.layers.0.self_attn.q_proj.weight"
ADDED = 1  # token
IDS = torch.arange(24).view(2, 12)


def checkpoint(folder: Path, seed: int, tokens: int, dtype: torch.dtype = torch.float16, **changes: int) -> Path:
    """Random weights of a small LLaMA with the tokenizer of the trained one."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, **changes}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=tokens, max_position_embeddings=256, **shape)).to(dtype)
    model.save_pretrained(folder)
    for path in small.MODEL.glob("tokenizer*"):
        shutil.copyfile(path, folder / path.name)
    return folder


@pytest.fixture
def base(tmp_path) -> Path:
    return checkpoint(tmp_path / "base", 0, 512)


@pytest.fixture
def delta(tmp_path) -> Path:
    """With a buffer that older checkpoints hold."""
    folder = checkpoint(tmp_path / "delta", 1, 512 + ADDED)
    change(folder, lambda weights: weights | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    return folder


def change(folder: Path, changed) -> None:
    save_file(changed(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


def pickle(folder: Path, parts: int = 1) -> Path:
    """The same weights as files of torch.save."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    if parts == 1:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        held = {name: f"pytorch_model-{number % parts}.bin" for number, name in enumerate(names)}
        for file in set(held.values()):
            torch.save({name: weights[name] for name in names if held[name] == file}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": held}))
    (folder / "model.safetensors").unlink()
    return folder


def summed(base: Path, delta: Path) -> dict[str, torch.Tensor]:
    """As FastChat's apply_delta: rows of zeros for what the vocabulary gained, then both added in float16."""
    one, other = load_file(base / "model.safetensors"), load_file(delta / "model.safetensors")
    for name in (EMBEDDING, HEAD):
        one[name] = torch.cat([one[name], one[name].new_zeros(ADDED, one[name].shape[1])])
    return {name: (tensor.half() + other[name]) for name, tensor in one.items()}


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("home", ["device", "host", "disk"])
@pytest.mark.parametrize("parts", [0, 1, 2])
def test_the_model_is_the_sum_at_every_home(base, delta, tmp_path, home, parts):
    expected = summed(base, delta)
    if parts:
        pickle(delta, parts)
    model, tokenizer = models.load(f"{base}+{delta}", None, "cpu", home, tmp_path / "work")
    assert len(tokenizer) == 512
    values = homes.Values(home_of) if (home_of := homes.of(model)) else dict(model.named_parameters())
    assert {name: tensor.dtype for name, tensor in values.items()} == dict.fromkeys(expected, torch.float16)
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    whole = checkpoint(tmp_path / "whole", 2, 512 + ADDED)
    save_file(expected, whole / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(logits(model), logits(LlamaForCausalLM.from_pretrained(whole, dtype=torch.float16)))


def test_it_comes_in_another_type_after_it_was_summed(base, delta):
    model, _ = models.load(f"{base}+{delta}", "float32")
    assert torch.equal(model.get_parameter(QUERY), summed(base, delta)[QUERY].float())


def test_files_that_could_run_code_are_not_read(base, delta, tmp_path):
    class Code:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    weights = load_file(delta / "model.safetensors")
    torch.save(weights | {QUERY: Code()}, delta / "pytorch_model.bin")
    (delta / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"pytorch_model.bin could run code and is not read"):
        models.load(f"{base}+{delta}")
    torch.save(weights | {"step": 3}, delta / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds something else than tensors, 'step'"):
        models.load(f"{base}+{delta}")
    (delta / "pytorch_model.bin").write_bytes(b"PK\x03\x04 not a file of torch.save")
    with pytest.raises(ValueError, match=r"pytorch_model.bin are damaged, or of an old format"):
        models.load(f"{base}+{delta}")
    assert not (tmp_path / "ran").exists()


def test_a_pair_has_the_identity_of_both_and_a_name_to_read(base, delta):
    pair = f"{base}+{delta}"
    before = models.identity(pair)
    assert set(before) == {"fingerprint", "base_fingerprint"}
    assert before["base_fingerprint"] == models.identity(base)["fingerprint"]
    assert catalogue.called(pair) == "base+delta"
    change(base, lambda weights: weights | {QUERY: -weights[QUERY]})
    between = models.identity(pair)
    assert (between["fingerprint"], between["base_fingerprint"] == before["base_fingerprint"]) == (
        before["fingerprint"], False,
    )  # fmt: skip
    pickle(delta)
    assert models.identity(pair)["fingerprint"] != before["fingerprint"]


def test_the_pair_has_the_shape_of_the_sum(base, delta, monkeypatch):
    found = models.find(f"{base}+{delta}")
    assert found.parameters == sum(tensor.numel() for tensor in summed(base, delta).values())
    assert (found.blocks, found.heads, found.positions, found.dtype) == (2, 4, 256, "float16")
    named = Model("tiny-v0", parameters=found.parameters, blocks=2, base="llama-7b", dense={"x@2": 1.0})
    monkeypatch.setitem(CATALOGUE, "tiny-v0", named)
    assert models.find(f"tiny-v0={base}+{delta}").dense == named.dense
    assert models.identity(f"tiny-v0={base}+{delta}")["catalogue"] == "tiny-v0"
    whole = models.find(f"tiny-v0={checkpoint(base.parent / 'whole', 2, 512 + ADDED)}")  # what FastChat has written
    assert whole.base is None
    with pytest.raises(ValueError, match="is not tiny-v0: it has"):
        models.find(f"tiny-v0={base}+{base}")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("{base}+{tmp}/nowhere", "nowhere' is no folder here and no Hub id; give BASE.DELTA"),
        ("{tmp}/nowhere+{delta}", "names no base to add .*delta to: Unknown model"),
        ("{base}+", "names no difference to add"),
        ("+{delta}", "names no base to add"),
        ("{base}+{delta}+{delta}", "delta' is no folder here and no Hub id"),
        ("vicuna-7b-v0+{delta}", "vicuna-7b-v0 is a sum itself; a difference is added to a whole model"),
        ("{tmp}/a+b", "Unknown model .*There is no local folder of this name"),
        ("{base}+{empty}", "empty has no weights, neither model.safetensors nor pytorch_model.bin"),
    ],
)
def test_what_is_no_pair_is_refused_in_one_sentence(base, delta, tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=said):
        models.find(words.format(base=base, delta=delta, tmp=tmp_path, empty=tmp_path / "empty"))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ({"intermediate_size": 64}, r"mlp.down_proj.weight is \[32, 64\] and in the base \[32, 48\]"),
        ({"num_hidden_layers": 3}, r"only .*other has model.layers.2.input_layernorm.weight \(9 such tensors\)"),
        ({"num_hidden_layers": 1}, r"only .*base has model.layers.1.input_layernorm.weight \(9 such tensors\)"),
    ],
)
def test_a_difference_to_another_model_is_refused(base, tmp_path, spoil, said):
    other = checkpoint(tmp_path / "other", 1, 513, **spoil)
    with pytest.raises(ValueError, match=said):
        models.load(f"{base}+{other}")


def test_folders_may_have_a_plus_in_their_names(base, delta, tmp_path):
    place = tmp_path / "c++" / "x+y"
    shutil.copytree(base, place)
    assert catalogue.halves(f"{place}+{delta}") == (str(place), str(delta))
    assert catalogue.halves(str(place)) is None
    assert catalogue.halves("/gone/base+/gone/delta") == ("/gone/base", "/gone/delta")
    assert models.find(f"{place}+{delta}").base == str(place)


def test_a_smaller_vocabulary_and_one_that_its_own_configuration_lacks_are_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"\[500, 32\] and in the base \[512, 32\]; name its own base"):
        models.load(f"{base}+{checkpoint(tmp_path / 'fewer', 1, 500)}")
    odd = checkpoint(tmp_path / "odd", 1, 513)
    change(odd, lambda weights: weights | {HEAD: torch.zeros(514, 32)})
    with pytest.raises(ValueError, match=r"lm_head.weight is \[514, 32\] and in the base \[512, 32\]"):
        models.load(f"{base}+{odd}")


@pytest.mark.parametrize("home", ["device", "disk"])
def test_a_cell_of_a_pair_is_that_of_the_sum(base, delta, tmp_path, home):
    whole = checkpoint(tmp_path / "whole", 2, 513)
    save_file(summed(base, delta), whole / "model.safetensors", metadata={"format": "pt"})
    settings = Settings(tmp_path / "r", device="cpu", data_dir=small.data(tmp_path / "data"), weights=home)
    pair = f"{base}+{delta}"
    runs = [Run(name, pruners.Wanda(pattern="2:4"), small.WINDOWS, (small.PPL,)) for name in (pair, str(whole))]
    assert len(run_table("tiny", cells.cells(runs), settings).done) == 2
    made = records.load(tmp_path / "r", "tiny").values()
    assert len({record.measures[small.PPL.key]["perplexity"] for record in made}) == 1
    (of_pair,) = [record.spec["model"] for record in made if record.spec["model"]["name"] == "base+delta"]
    assert of_pair == {"name": "base+delta", **models.identity(pair)}


def test_the_analysis_finds_the_cells_of_each_pair(base, delta, tmp_path, capsys):
    """Also of two pairs whose folders are called alike."""
    (tmp_path / "other").mkdir()
    pairs = [f"{base}+{delta}", f"{checkpoint(tmp_path / 'other/base', 3, 512)}+{delta}"]
    settings = Settings(tmp_path / "r", device="cpu", data_dir=small.data(tmp_path / "data"))
    table = small.table((None,))
    for pair in pairs:
        run_table(table.name, cells.cells(papers.runs(table, pair), table), settings)
    found = [rows.rows(table, tmp_path / "r", pair)[0].record for pair in pairs]
    assert [record.spec["model"]["base_fingerprint"] for record in found] == [
        models.identity(pair)["base_fingerprint"] for pair in pairs
    ]
    assert len({record.id for record in found}) == 2


def test_records_of_a_pair_from_the_hub_are_found(monkeypatch):
    pair = "llama-7b+made-up/delta"
    run = Run("llama-7b", None, None, (small.PPL,))
    told = {"hub": "made-up/delta", "revision": "1" * 40, "base_hub": "x/y", "base_revision": "2" * 40}
    assert keys.run_key(replace(run, model=pair)) == keys.stable_key(replace(run, model=pair).spec(told))


def test_a_pair_is_pruned_and_kept_by_one_command(base, delta, tmp_path):
    words = f"prune {base}+{delta} --method magnitude --measure ptb/test@64[:4] --save {tmp_path / 'kept'}".split()
    places = ["--results", str(tmp_path / "r"), "--data-dir", str(small.data(tmp_path / "data"))]
    assert main([*words, *places]) == 0
    kept = load_file(tmp_path / "kept/model.safetensors")
    whole = summed(base, delta)
    left = kept[QUERY] != 0
    assert left.double().mean() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(kept[QUERY][left], whole[QUERY][left])
    assert torch.equal(kept[EMBEDDING], whole[EMBEDDING])


class TestOnTheHub:
    ONE, TWO = "1" * 40, "2" * 40

    @pytest.fixture(autouse=True)
    def published(self, base, delta, tmp_path, monkeypatch) -> None:
        """Both in a cache without a network, the difference pickled; `added` is in the catalogue."""
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        monkeypatch.setitem(CATALOGUE, "whole", Model("whole", "made-up/base", licence="Base licence"))
        monkeypatch.setitem(CATALOGUE, "added", Model("added", "made-up/delta", base="whole", licence="Sum licence"))
        hub._asked_weights.cache_clear()
        self.expected = summed(base, delta)
        self.publish(tmp_path, "base", base, self.ONE)
        self.publish(tmp_path, "delta", pickle(delta, 2), self.TWO)
        yield
        hub._asked_weights.cache_clear()

    def publish(self, tmp_path: Path, name: str, folder: Path, commit: str) -> None:
        place = tmp_path / f"cache/models--made-up--{name}"
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir()
        (place / "refs/main").write_text(commit)

    @pytest.mark.parametrize("home", ["device", "disk"])
    def test_both_commits_are_its_identity_and_both_are_loaded(self, tmp_path, home):
        told = {"hub": "made-up/delta", "revision": self.TWO, "base_hub": "made-up/base", "base_revision": self.ONE}
        assert models.identity("added") == told
        model, _ = models.load("added", None, "cpu", home, tmp_path / "work")
        source = homes.Values(homes.of(model)) if home == "disk" else dict(model.named_parameters())
        assert torch.equal(source[QUERY], self.expected[QUERY])
        assert list(estimate._model("added")) == []

    @pytest.mark.parametrize(("lost", "name", "licence"), [("base", "whole", "Base"), ("delta", "added", "Sum")])
    def test_the_half_that_is_not_here_is_named_with_its_licence(self, tmp_path, lost, name, licence):
        shutil.rmtree(tmp_path / f"cache/models--made-up--{lost}/snapshots")
        assert list(estimate._model("added")) == [f"{name} (made-up/{lost})"]
        with pytest.raises(
            OSError, match=rf"^{name} \(made-up/{lost}\) could not be downloaded.*\({licence} licence\)"
        ):
            models.load("added")
