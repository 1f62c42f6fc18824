"""Nonsense through the public API: one short sentence that names the argument, and the model as it was.

The tests' own type checker is off here, so that it is the project that refuses.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

import pruners
from experiments.spec import Efficiency
from experiments.store.described import describe
from pruners import gblm
from pruners.retrain import LoRA, MaskLoRA, Reconstruction, Trainable, finetune
from tests.conftest import CONFIGS, tiny

LONGEST = 500
KIND = "llama multi-head"
BLOCKS = {"attention_blocks": (0, 2), "mlp_blocks": (0, 2)}
METHODS = {
    **{
        name: pruners.method(name, sparsity=0.5)
        for name in ("magnitude", "wanda", "sparsegpt", "gblm", "gradient", "random")
    },
    **{name: pruners.method(name, ratio=0.5) for name in ("flap", "wanda_sp", "magnitude_sp")},
    "llm_pruner": pruners.LLMPruner(0.5, **BLOCKS),
}  # fmt: skip
GRADIENTS = ("gblm", "gradient", "llm_pruner")


@pytest.fixture(autouse=True)
def _without_the_tests_own_checks() -> Iterator[None]:
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def refused(said: str, call: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=said) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) <= LONGEST


def unchanged(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name].nan_to_num(), value.nan_to_num()) for name, value in before.items())


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"batchsize": 1}, "Unknown argument of prune 'batchsize'. Did you mean batch_size"),
        ({"sparsity": 0.9}, "Unknown argument of prune 'sparsity'"),
        ({"batch_size": 0}, "batch_size is a whole number, 1 or more; got 0"),
        ({"batch_size": -1}, "batch_size is .* got -1"),
        ({"batch_size": "8"}, r"batch_size is .* got '8' \(str\)"),
        ({"batch_size": True}, r"batch_size is .* got True \(bool\)"),
        ({"batch_size": 2.0}, r"batch_size is .* got 2\.0 \(float\)"),
        ({"batch_size": None}, "batch_size is .* got None"),
        ({"device": "tpu7"}, "no device 'tpu7' here; found cpu"),
        ({"device": ""}, "no device '' here"),
        ({"device": "cuda:99"}, "no device 'cuda:99' here"),
        ({"device": 3}, r"device is .* got 3 \(int\)"),
        ({"device": "meta"}, "meta device holds no values"),
        ({"progress": "yes"}, r"progress is .*function.* got 'yes' \(str\)"),
        ({"cut": "yes"}, "cut is True or False"),
        ({"cut": None}, "cut is True or False"),
        ({"statistics": 3}, r"statistics is what pruners\.gather.* returned; got 3"),
        ({"statistics": {"nowhere": torch.zeros(1)}}, "These statistics have"),
        ({"reconstruct": "oops"}, r"reconstruct is a pruners\.retrain\.Reconstruction.* got 'oops'"),
        ({"folder": 3}, r"folder is .*path of a folder.* got 3 \(int\)"),
        ({"folder": ""}, r"folder is .*path of a folder"),
        ({"folder": __file__}, r"folder is .*path of a folder"),
        ({"folder": "a\0b"}, r"folder is .*path of a folder"),
        ({"folder": "anywhere"}, "folder= stores the blocks of a reconstruction; drop it"),
        ({"keeper": "x"}, "keeper is a .*Keeper; got 'x'"),
    ],
    ids=str,
)
def test_arguments_of_prune(name, windows, keywords, said):
    model = tiny(KIND)
    before = copy.deepcopy(model.state_dict())
    refused(said, lambda: pruners.prune(model, METHODS[name], windows, **keywords))
    unchanged(model, before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.tolist(), r"LongTensor \[count, length\]; got .* \(list\)\. .*torch\.tensor"),
        (lambda w: w.numpy(), r"LongTensor \[count, length\]; got .* \(ndarray\)"),
        (lambda w: "text", r"LongTensor \[count, length\]; got 'text' \(str\)"),
        (lambda w: w.int(), r"LongTensor \[count, length\]; got torch\.int32 \[6, 16\].*windows\.long\(\)"),
        (lambda w: w.float(), r"got torch\.float32"),
        (lambda w: w.bool(), r"got torch\.bool"),
        (lambda w: w[0], r"got torch\.int64 \[16\]"),
        (lambda w: w[None], r"got torch\.int64 \[1, 6, 16\]"),
        (lambda w: w.to("meta"), "without values"),
        (lambda w: w[:0], r"LongTensor \[count, length\]"),
        (lambda w: w[:, :0], r"LongTensor \[count, length\]"),
        (lambda w: w - 98, "Token -9[0-9] is outside the model's vocabulary of 96"),
        (lambda w: torch.full((1, 8), 96), "Token 96 is outside the model's vocabulary of 96"),
        (lambda w: torch.zeros(1, 65, dtype=torch.long), "65 tokens are longer than the model's context length, 64"),
    ],
)
def test_windows(name, windows, change, said):
    model = tiny(KIND)
    before = copy.deepcopy(model.state_dict())
    refused(said, lambda: pruners.prune(model, METHODS[name], change(windows)))
    refused(said, lambda: pruners.gather(model, METHODS[name], change(windows)))
    unchanged(model, before)


@pytest.mark.parametrize("name", GRADIENTS)
def test_one_token_predicts_nothing(name, windows):
    model = tiny(KIND)
    before = copy.deepcopy(model.state_dict())
    refused("windows of two tokens or more", lambda: pruners.prune(model, METHODS[name], windows[:, :1]))
    refused("windows of two tokens or more", lambda: gblm.gradient_norms(model, windows[:, :1], "l1"))
    unchanged(model, before)


def test_a_loss_that_is_not_finite(windows):
    model = tiny("opt")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone())  # OPT's is the embeddings'
    model.register_forward_hook(lambda module, args, output: output.__class__(loss=output.loss * 0 + torch.inf))
    before = copy.deepcopy(model.state_dict())
    refused("The loss on calibration batch 0 is (inf|nan)", lambda: pruners.prune(model, pruners.GBLM(), windows))
    unchanged(model, before)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (pruners.Wanda, "method is a method.* got the class Wanda itself"),
        ("wanda", r"pruners\.method\('wanda'\)"),
        (None, "method is a method .* got None"),
        ({"name": "wanda"}, "method is a method"),
    ],
)
def test_what_is_no_method(windows, given, said):
    refused(said, lambda: pruners.prune(tiny(KIND), given, windows))
    refused(said, lambda: pruners.gather(tiny(KIND), given, windows))


@pytest.mark.parametrize("given", ["wnda", 3, None, ["wanda"], pruners.Wanda])
def test_what_is_no_methods_name(given):
    refused("Unknown method", lambda: pruners.method(given))


def of_integers() -> PreTrainedModel:
    model = tiny(KIND)
    weight = torch.zeros(64, 48, dtype=torch.int8)
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(weight, requires_grad=False)
    return model


def offloaded() -> PreTrainedModel:
    model = tiny(KIND)
    cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def without_blocks() -> PreTrainedModel:
    config = copy.deepcopy(CONFIGS[KIND])
    config.num_hidden_layers = 0
    return LlamaForCausalLM(config)


def made_in_inference_mode() -> PreTrainedModel:
    with torch.inference_mode():
        return tiny(KIND)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda: None, r"PreTrainedModel; got None\. .*AutoModelForCausalLM"),
        (lambda: "gpt", r"PreTrainedModel; got 'gpt'\. Load it first: .*from_pretrained\('gpt'\)"),
        (lambda: LlamaForCausalLM, "got the class LlamaForCausalLM itself"),
        (lambda: nn.Linear(2, 2), r"got a torch\.nn\.modules\.linear\.Linear"),
        (lambda: nn.DataParallel(tiny(KIND)), r"DataParallel around one\. .*model\.module"),
        (lambda: get_peft_model(tiny(KIND), LoraConfig(target_modules=["q_proj"])), r"peft\..*merge_and_unload\(\)"),
        (lambda: tiny(KIND).model, "needs a LlamaForCausalLM; got a LlamaModel, which has no head"),
        (lambda: tiny(KIND).to("meta"), "is on the meta device and holds no values"),
        (offloaded, r"is on the meta device and holds no values here \(accelerate has offloaded it\).*device_map"),
        (of_integers, r"up_proj\.weight is torch\.int8"),
        (lambda: tiny(KIND).to(torch.float8_e4m3fn), "is torch.float8_e4m3fn"),
        (without_blocks, "has no decoder blocks"),
        (made_in_inference_mode, "was made within torch.inference_mode"),
    ],
)
def test_models(name, windows, given, said):
    refused(said, lambda: pruners.prune(given(), METHODS[name], windows))


def test_counting_on_the_meta_device_stays_possible():
    model = tiny(KIND).to("meta")
    report = pruners.prune(model, pruners.LLMPruner(0.5, importance="random", **BLOCKS))
    assert report.achieved == pytest.approx(0.5, abs=0.02)


def test_inference_mode(name, windows):
    model = tiny(KIND)
    before = copy.deepcopy(model.state_dict())
    with torch.inference_mode():
        refused(r"torch\.inference_mode\(\); use torch\.no_grad", lambda: pruners.prune(model, METHODS[name], windows))
    unchanged(model, before)


def test_weights_that_are_not_finite_are_refused_before_any_is_pruned(name, windows):
    model = tiny(KIND)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = torch.nan
    before = copy.deepcopy(model.state_dict())
    refused(r"layers\.1\.mlp\.down_proj", lambda: pruners.prune(model, METHODS[name], windows))
    unchanged(model, before)


def test_another_device_for_what_needs_all_weights_at_once(monkeypatch, windows):
    monkeypatch.setattr(pruners.run.inputs, "usable_device", lambda device: torch.device(device))
    refused(
        "needs all weights at once on cpu, not block by block on cuda; load the model whole",
        lambda: pruners.prune(tiny(KIND), pruners.LLMPruner(0.2, granularity="channel"), windows, device="cuda"),
    )


@pytest.mark.parametrize(("mine", "other"), [("gblm", "flap"), ("flap", "llm_pruner"), ("llm_pruner", "gblm")])
def test_statistics_of_another_method_or_model(windows, mine, other):
    method = METHODS[mine]
    found = pruners.gather(tiny(KIND), method, windows)
    key = next(iter(found))
    lacking = {name: value for name, value in found.items() if name != key}
    for wrong, said in (
        (pruners.gather(tiny(KIND), METHODS[other], windows), "These statistics have no"),
        (pruners.gather(tiny("opt"), method, windows), "These statistics have no"),
        (lacking, f"These statistics have no '{key[:20]}"),
        ({**found, "more": found[key]}, "These statistics have an unexpected 'more'"),
        ({**found, key: found[key][:-1]}, "These statistics are not of shape"),
        ({**found, key: found[key].tolist()}, "These statistics are not of shape"),
        ({**found, key: found[key] * torch.nan}, "These statistics hold NaN or inf"),
        ({**found, key: found[key].half()}, "These statistics are not of float32"),
        ({**found, key: found[key] > 0}, "These statistics are not of float32"),
        ({**found, key: found[key].to("meta")}, "These statistics have no values for"),
    ):
        refused(said, lambda wrong=wrong: pruners.prune(tiny(KIND), method, windows, statistics=wrong))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_default_dtype_moves_nothing(name, windows, dtype):
    plain, model = tiny(KIND), tiny(KIND)
    pruners.prune(plain, METHODS[name], windows)
    torch.set_default_dtype(dtype)
    try:
        pruners.prune(model, METHODS[name], windows)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    unchanged(model, plain.state_dict())


@pytest.mark.parametrize("compiled", [torch.compile, lambda model: model.compile() or model])
def test_compiled_models_are_pruned_eagerly(name, windows, compiled):
    plain, model = tiny(KIND), tiny(KIND)
    pruners.prune(plain, METHODS[name], windows)
    pruners.prune(compiled(model), METHODS[name], windows)
    unchanged(model, plain.state_dict())


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("wanda", {"sparsity": "0.5"}, r"sparsity is .*\[0, 1\); got '0\.5' \(str\)"),
        ("wanda", {"sparsity": True}, "sparsity is .* got True"),
        ("wanda", {"sparsity": [0.5]}, "sparsity is .* got "),
        ("wanda", {"sparsity": torch.tensor(0.5)}, "sparsity is .* got "),
        ("magnitude", {"sparsity": float("inf")}, r"\[0, 1\); got inf"),
        ("wanda", {"pattern": 24}, r"pattern is .*'2:4'; got 24 \(int\)"),
        ("wanda", {"pattern": (2, 4)}, r"pattern is .*'2:4'; got"),
        ("wanda", {"pattern": ""}, "n:m"),
        ("wanda", {"pattern": " 2:4"}, "n:m"),
        ("wanda", {"pattern": "02:4"}, "n:m"),
        ("wanda", {"pattern": "２:４"}, "n:m"),
        ("wanda", {"group": None}, "group is 'matrix', 'row', 'column', 'rows:N' or 'columns:N'; got None"),
        ("gblm", {"norm": 1}, "norm is 'l1' or 'l2'; got 1"),
        ("gblm", {"alpha": float("nan")}, "alpha is a finite number.* got nan"),
        ("gblm", {"alpha": float("inf")}, "alpha is a finite number.* got inf"),
        ("gblm", {"alpha": -1.0}, "alpha is a finite number.* got -1"),
        ("gblm", {"alpha": None}, "alpha is a finite number.* got None"),
        ("gblm", {"alpha": "100"}, "alpha is a finite number.* got '100'"),
        ("sparsegpt", {"block_size": 0}, "block_size is a whole number"),
        ("sparsegpt", {"block_size": 12.5}, "block_size is a whole number"),
        ("sparsegpt", {"damping": float("nan")}, "damping is a positive number"),
        ("sparsegpt", {"damping": 2.0}, "damping is a positive number up to 1"),
        ("random", {"seed": None}, "seed is a whole number.* got None"),
        ("random", {"seed": -1}, "seed is a whole number.* got -1"),
        ("random", {"seed": 1.5}, "seed is a whole number.* got 1.5"),
        ("random", {"seed": 2**63}, "seed is a whole number"),
        ("flap", {"ratio": "0.2"}, "ratio is .* got '0.2'"),
        ("flap", {"ratio": float("nan")}, r"ratio is .* \[0, 1\); got nan"),
        ("flap", {"target_parameters": "half"}, "target_parameters is .* got 'half'"),
        ("flap", {"target_of": 3}, "Unknown target_of 3"),
        ("flap", {"metric": None}, "Unknown metric None"),
        ("flap", {"structure": ["AL-AM"]}, "Unknown structure"),
        ("flap", {"bias": "no"}, "bias is True or False"),
        ("flap", {"reference": 1}, "reference is True or False"),
        ("flap", {"structure": "AL-MM", "heads_removed": 1.5}, "heads_removed is .*whole number"),
        ("flap", {"structure": "AL-MM", "heads_removed": -1}, "heads_removed is .*whole number"),
        ("wanda_sp", {"round_to": 1.5}, "round_to is .*whole number.* got 1.5"),
        ("wanda_sp", {"round_to": "8"}, "round_to is .*whole number.* got '8'"),
        ("magnitude_sp", {"round_to": True}, "round_to is .*whole number.* got True"),
        ("llm_pruner", {"importance": 2}, "Unknown importance 2"),
        ("llm_pruner", {"steps": 0}, "steps is a whole number"),
        ("llm_pruner", {"steps": None}, "steps is a whole number"),
        ("llm_pruner", {"seed": "42"}, "seed is a whole number"),
        ("llm_pruner", {"mlp_blocks": None}, "mlp_blocks is the first block and the one after"),
        ("llm_pruner", {"mlp_blocks": 4}, "mlp_blocks is the first block and the one after"),
        ("llm_pruner", {"attention_blocks": "ab"}, "attention_blocks is the first block and the one after"),
        ("llm_pruner", {"attention_blocks": (1.0, 2)}, "attention_blocks is the first block and the one after"),
        ("wanda", {"sparsty": 0.5}, "sparsty"),
    ],
)  # fmt: skip
def test_hyperparameters(name, fields, said):
    refused(said, lambda: pruners.method(name, **fields))


def test_numbers_of_numpy_are_pythons_own():
    import numpy as np

    method = pruners.Random(sparsity=np.float32(0.5), seed=np.int64(3))
    assert repr(method) == repr(pruners.Random(sparsity=0.5, seed=3))


@pytest.mark.parametrize("place", ["model.layers.1.input_layernorm", "model.norm", "model.embed_tokens", "lm_head"])
def test_a_value_outside_the_matrices_that_is_not_finite_is_found_before_the_first_block_is_pruned(
    name, windows, place
):
    model = tiny(KIND)
    weight = model.get_submodule(place).weight
    weight.data.view(-1)[3] = torch.nan
    before = copy.deepcopy(model.state_dict())
    refused(rf"{place}\.weight holds NaN or inf", lambda: pruners.prune(model, METHODS[name], windows))
    unchanged(model, before)


@pytest.mark.parametrize("granularity", ["channel", "block"])
def test_embeddings_that_are_not_finite_are_not_ranked(granularity):
    model = tiny(KIND)
    model.model.embed_tokens.weight.data[5, 3] = torch.inf
    method = pruners.LLMPruner(0.1, granularity=granularity, importance="l2", **BLOCKS)
    refused(r"embed_tokens\.weight holds NaN or inf", lambda: pruners.prune(model, method))


@pytest.mark.parametrize("part", ["model.layers.1", "model.layers.0.mlp.down_proj", "lm_head", "model.norm"])
def test_weights_of_two_number_formats_are_refused(name, windows, part):
    model = tiny(KIND)
    model.get_submodule(part).half()
    before = copy.deepcopy(model.state_dict())
    refused("several dtypes: .* is torch.float32 and .*torch.float16", lambda: pruners.prune(
        model, METHODS[name], windows))  # fmt: skip
    unchanged(model, before)


@pytest.mark.parametrize(
    ("trainable", "said"),
    [
        (lambda: Trainable(head=True), "have no head and no embeddings"),
        (lambda: Trainable(embeddings=True), "have no head and no embeddings"),
        (lambda: Trainable(adapters=LoRA()), "needs adapters that can be merged"),
        (lambda: Trainable(adapters=MaskLoRA(rank=1000)), "Rank 1000 is larger than"),
        (lambda: Trainable(adapters=MaskLoRA(rank=4, targets=("fc1",))), "Unknown projection 'fc1'"),
        (lambda: Trainable(biases=True), "selects nothing in model.layers.0"),
        (lambda: Trainable(), "selects nothing in model.layers.0"),
        (lambda: Trainable(adapters=MaskLoRA(targets=())), "selects no projection"),
    ],
)
@pytest.mark.parametrize("name", ["wanda", "magnitude", "gblm"])
def test_a_reconstruction_that_cannot_be_is_refused_before_a_block_is_pruned(name, windows, trainable, said):
    model = tiny(KIND)
    before = copy.deepcopy(model.state_dict())
    refused(
        said,
        lambda: pruners.prune(model, METHODS[name], windows, reconstruct=Reconstruction(trainable(), steps=2)),
    )
    unchanged(model, before)


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.set_grad_enabled(False)])
def test_training_takes_gradients_whatever_the_caller_has_set(windows, mode):
    plain, model = tiny(KIND), tiny(KIND)
    settings = {"steps": 3, "learning_rate": 1e-2}
    finetune(plain, Trainable(norms=True), windows, **settings)
    try:
        with mode():
            finetune(model, Trainable(norms=True), windows, **settings)
            assert not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(True)
    unchanged(model, plain.state_dict())


def test_several_values_become_a_tuple_of_plain_numbers():
    """So that what has them can be told apart, hashed and written down."""
    asked = pruners.LLMPruner(0.2, attention_blocks=[np.int64(0), 2], mlp_blocks=(0, np.int32(2)))
    assert asked == pruners.LLMPruner(0.2, attention_blocks=(0, 2), mlp_blocks=(0, 2))
    assert hash(LoRA(targets=["q_proj"])) == hash(LoRA(targets=("q_proj",)))
    speed = Efficiency(batch_sizes=[np.int64(1), 2], lengths=[8])
    assert speed == Efficiency(batch_sizes=(1, 2), lengths=(8,))
    assert json.dumps(describe(speed)) == json.dumps(describe(Efficiency(batch_sizes=(1, 2), lengths=(8,))))
    for wrong in ([True], ["1"], [0], [1.0]):
        refused("batch_sizes is a tuple of whole numbers", lambda wrong=wrong: Efficiency(batch_sizes=wrong))


class Lost(pruners.Wanda):
    """Whatever the weights are, `given` makes the score of them."""

    given: Any = None

    def score(self, name: str, weight: Any, x: Any, dense: Any) -> Any:
        return type(self).given(weight, x)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (lambda weight, x: weight * math.nan, r"Lost's score of .*\.q_proj is NaN in [\d,]+ of .* division by zero"),
        (lambda weight, x: torch.where(weight == weight.max(), math.nan, weight), "is NaN in 1 of"),
        (lambda weight, x: x.norm, r"Lost's score of .* is \[\d+\]; it is one number for each of its weights, \["),
        (lambda weight, x: 1.0, r"is 1\.0 \(float\); it is one number for each"),
    ],
)
@pytest.mark.parametrize("how", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "group": "matrix"}])
def test_scores_that_rank_nothing_are_refused(given, said, how, monkeypatch, windows):
    monkeypatch.setattr(Lost, "given", staticmethod(given))
    refused(said, lambda: pruners.prune(tiny("llama grouped-query"), Lost(**how), windows))


@pytest.mark.parametrize("name", ["wanda_sp", "magnitude_sp", "flap", "llm_pruner"])
def test_scores_of_units_that_are_nan_are_refused(name, monkeypatch, windows):
    for kind in (pruners.structured_baselines, pruners.flap):
        monkeypatch.setattr(kind, "by_unit", lambda block, kind, scores: torch.full((block.units(kind), 1), math.nan))
    monkeypatch.setattr(pruners.LLMPruner, "_scores", lambda self, block, *rest: nan_scores(block))
    ranges = {"attention_blocks": (0, 2), "mlp_blocks": (0, 2)} if name == "llm_pruner" else {}
    method = pruners.method(name, ratio=0.25, **ranges)
    refused("score of the heads of .* is NaN", lambda: pruners.prune(tiny("llama multi-head"), method, windows))


def nan_scores(block: Any) -> dict[str, torch.Tensor]:
    return {kind: torch.full((block.units(kind),), math.nan) for kind in ("attention", "mlp")}
