"""Every path on a CUDA device beside the CPU's numbers, in float32; skipped where there is no such device."""

from __future__ import annotations

import json
import shlex

import pytest
import small_table as small
import torch
from test_homes import KIND, METHODS, at_home, saved
from test_rows import documents, tokenizer  # noqa: F401  (a fixture)
from test_streamed_retraining import SETS, opened, records_of, weights_of
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import pruners
from eval.efficiency import efficiency
from eval.generation import generate
from eval.perplexity import perplexity
from eval.scorer import Scorer
from eval.semi_structured import probe
from experiments import cells
from experiments.__main__ import main
from experiments.batch import run_table
from experiments.settings import Settings
from experiments.store import records
from pruners import checkpoint, select
from pruners.calibrate import Hessian
from pruners.gblm import gradient_norms
from pruners.retrain import MaskLoRA, Reconstruction, Trainable, finetune
from pruners.weights import homes, opening, sources
from tests import families

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
HOMES = ("device", "host", "disk")


def on_the_card(home, folder):
    if home == "disk":
        return opening.open_folder(folder, device="cuda")
    model = at_home("device", folder)
    if home == "host":
        homes.settle(model, sources.Memory(model), "cuda")
        return model
    return model.to("cuda")


def here(model):
    return {name: p.detach().cpu() for name, p in weights_of(model).items()}


@pytest.mark.parametrize("family", families.TINY)
def test_every_family_computes_and_prunes_as_on_a_cpu(family, tmp_path):
    plain, tokens = saved(family, tmp_path), families.windows(family)
    model = on_the_card("device", tmp_path)
    with torch.inference_mode():
        assert_close(model(tokens.to("cuda")).logits.cpu(), plain(tokens).logits, rtol=1e-3, atol=1e-4)
    for subject in (plain, model):
        pruners.prune(subject, pruners.Wanda(0.5), tokens)
    one, other = here(plain), here(model)
    assert sum(int(((one[n] == 0) != (other[n] == 0)).sum()) for n in one) <= 4


@pytest.mark.parametrize("kind", families.EXPERTS)
def test_experts_are_joined_on_the_card(kind, tmp_path):
    plain, tokens = saved(kind, tmp_path, torch.bfloat16), families.windows(kind)
    model, there = on_the_card("disk", tmp_path), plain.to("cuda")
    with torch.inference_mode():
        assert torch.equal(model(tokens.to("cuda")).logits, there(tokens.to("cuda")).logits)
    for subject in (there, model):
        pruners.prune(subject, pruners.Wanda(0.5), tokens)
    one, other = here(there), here(model)
    assert all(torch.equal(one[name], other[name]) for name in one)
    checkpoint.save(model, None, tmp_path / "pruned", max_shard_size="20KB")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", dtype="auto")
    assert all(torch.equal(one[name], p) for name, p in again.named_parameters())


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_from_every_home_as_on_a_cpu(method, tmp_path):
    plain, tokens = saved(KIND, tmp_path), families.windows(KIND, 5)
    expected = pruners.prune(plain, METHODS[method], tokens, batch_size=2).to_dict()
    one = here(plain)
    first = None
    for home in HOMES:
        model = on_the_card(home, tmp_path)
        found = pruners.prune(model, METHODS[method], tokens, batch_size=2).to_dict()
        assert found["achieved"] == pytest.approx(expected["achieved"], rel=1e-3)
        other = here(model)
        assert {n: p.shape for n, p in other.items()} == {n: p.shape for n, p in one.items()}
        removed = [float(((one[n] == 0) == (other[n] == 0)).float().mean()) for n in one]
        assert min(removed) > 0.98
        alike = [n for n in one if torch.equal(one[n] == 0, other[n] == 0)]
        assert len(alike) > len(one) / 2
        for name in alike:
            assert_close(other[name], one[name], rtol=1e-2, atol=1e-3)
        if first is None:
            first = other
        else:
            assert all(torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("home", HOMES)
@pytest.mark.parametrize("what", SETS)
def test_retraining_takes_the_steps_of_a_cpu(home, what, tmp_path):
    families.tiny("llama").save_pretrained(tmp_path)
    settings = {"steps": 3, "learning_rate": 1e-3, "batch_size": 4, "micro_batch_size": 2, "warmup": 0}
    settings["precision"] = "float32"
    losses = {}
    for device in ("cpu", "cuda"):
        model = opened("device", tmp_path) if device == "cpu" or home == "device" else on_the_card(home, tmp_path)
        if device == "cuda" and home == "device":
            model.to("cuda")
        elif device == "cuda":
            pruners.prune(model, pruners.Magnitude(sparsity=0.5))
        losses[device] = finetune(model, SETS[what], records_of("llama"), **settings).to_dict()["losses"]
    dropout = 0.05 if "drops out" in what else 1e-3  # another stream of random numbers there
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=dropout)


@pytest.mark.parametrize("home", HOMES)
def test_reconstruction_lowers_what_it_lowers_on_a_cpu(home, tmp_path):
    plain, tokens = saved(KIND, tmp_path), families.windows(KIND, 6)
    wanted = Reconstruction(Trainable(norms=True, adapters=MaskLoRA(rank=2)), steps=10, learning_rate=1e-3)
    expected = pruners.prune(plain, pruners.Magnitude(0.5), tokens, reconstruct=wanted).reconstruction
    model = on_the_card(home, tmp_path)
    found = pruners.prune(model, pruners.Magnitude(0.5), tokens, reconstruct=wanted).reconstruction
    for one, other in zip(expected, found, strict=True):
        assert other["initial"] == pytest.approx(one["initial"], rel=1e-2)
        assert other["final"] == pytest.approx(one["final"], rel=5e-2)


@pytest.mark.parametrize("home", HOMES)
def test_measures_are_those_of_a_cpu(home, tmp_path, tokenizer):  # noqa: F811
    plain, text = saved(KIND, tmp_path), families.windows("any", 12).flatten()
    model = on_the_card(home, tmp_path)
    one, other = (perplexity(m, text, 16, batch_size=5).perplexity for m in (plain, model))
    assert other == pytest.approx(one, rel=1e-4)
    asked = documents(6, context=(1, 3), answer=(1, 2))
    expected, found = (Scorer(m, tokenizer)._loglikelihood_tokens(asked) for m in (plain, model))
    assert [a for a, _ in found] == pytest.approx([a for a, _ in expected], abs=1e-3)


def test_what_only_a_card_can_be_asked(tmp_path, tokenizer):  # noqa: F811
    saved(KIND, tmp_path)
    model = on_the_card("device", tmp_path)
    told = efficiency(model, lengths=(16,), new_tokens=4, repetitions=2)
    assert json.dumps(told)
    written = generate(model, tokenizer, ["w5 w6 w7"], 4)
    assert written
    pruners.prune(model, pruners.Wanda(pattern="2:4"), families.windows(KIND))
    assert probe(model)["skipped"].startswith("semi-structured kernels need float16")


def test_semi_structured_kernels_are_timed():
    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=1, num_attention_heads=4
    )
    model = LlamaForCausalLM(config).half().to("cuda").eval()
    pruners.prune(model, pruners.Magnitude(pattern="2:4"))
    assert all(told["speed_up"] > 0 for told in probe(model, 256, 3).values())


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 1e-5), (torch.bfloat16, 1e-5), (torch.float32, 1e-6)])
def test_a_hessian_is_added_up_in_float32(dtype, error):
    x = torch.randn(3, 500, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = Hessian(96, torch.device("cuda"))
    found.add(x.to("cuda"))
    wide = x.double().flatten(0, 1)
    expected = wide.T @ wide * 2 / 3
    assert float((found.matrix.cpu() - expected).norm() / expected.norm()) < error


@pytest.mark.parametrize("size", [(2**10,), (2**20,), (2**24,), (7, 2**10), (2, 2**17)], ids=str)
def test_the_lowest_are_those_of_a_cpu(size):
    score = torch.randn(size, generator=torch.Generator().manual_seed(0)).abs()
    for count in (1, size[-1] // 2, size[-1]):
        found = select._kth_lowest(score.to("cuda"), count)
        assert torch.equal(found.cpu(), select._kth_lowest(score, count))


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "8:16"])
def test_n_of_m_are_those_of_a_cpu(pattern):
    score = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).abs()
    one = select.n_of_m(score, select.Pattern.parse(pattern))
    assert torch.equal(select.n_of_m(score.to("cuda"), select.Pattern.parse(pattern)).cpu(), one)


@pytest.mark.parametrize("family", families.TINY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_are_the_same_bits_every_time(family, dtype):
    model = families.tiny(family).to("cuda", dtype)
    one, other = (gradient_norms(model, families.windows(family), "l2") for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_gradients_of_many_tokens_are_the_same_bits_every_time():
    length = 512  # more than one tile of attention
    config = LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=length,
    )  # fmt: skip
    model = LlamaForCausalLM(config).half().to("cuda").eval()
    windows = torch.randint(96, (8, length), generator=torch.Generator().manual_seed(0))
    one, other = (gradient_norms(model, windows, "l1") for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("what", SETS)
def test_retraining_twice_gives_the_same_bits(what, tmp_path):
    families.tiny("llama").save_pretrained(tmp_path)
    found = []
    for _ in range(2):
        model = opened("device", tmp_path).to("cuda")
        finetune(model, SETS[what], records_of("llama"), steps=3, learning_rate=1e-3, batch_size=4, warmup=0)
        found.append(here(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"needs the trained model in {small.MODEL}")
@pytest.mark.parametrize("weights", ["device", "host", "disk"])
def test_a_table_runs_on_the_card(weights, tmp_path):
    folder = small.data(tmp_path / "data")
    numbers = {}
    for device, home in (("cpu", "device"), ("cuda", weights)):
        root = tmp_path / device
        settings = Settings(root, data_dir=folder, device=device, weights=home)
        run_table("tiny", cells.cells(small.table().runs()), settings)
        found = records.load(root, "tiny").values()
        numbers[device] = {r.id: r.measures[small.PPL.key]["perplexity"] for r in found}
        if device == "cuda":
            assert all(r.made_by.device.startswith("cuda (") for r in found)
            assert all(r.cost.peak_bytes for r in found)
    assert len(numbers["cuda"]) == len(small.METHODS)
    assert numbers["cuda"] == pytest.approx(numbers["cpu"], rel=0.02)


@pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"needs the trained model in {small.MODEL}")
def test_a_model_of_ones_own_is_pruned_on_the_card(tmp_path, capsys):
    words = shlex.split(
        "--method sparsegpt --pattern 2:4 --calibration c4/train --nsamples 2 --seqlen 32 --device cuda"
    )
    words += ["--measure", "ptb/test@64[:4]", "--data-dir", str(small.data(tmp_path / "data"))]
    words += ["--device", "cuda", "--results", str(tmp_path / "results"), "--save", str(tmp_path / "model")]
    assert main(["prune", str(small.MODEL), *words]) == 0, capsys.readouterr().err
    assert (tmp_path / "model" / "config.json").exists()
