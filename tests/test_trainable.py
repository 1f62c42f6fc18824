"""What a Trainable selects, and the share of all parameters that this is."""

from __future__ import annotations

import csv

import pytest
import torch
from conftest import SHARED, hollow, needs_shared, tiny
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, OPTConfig

import pruners
from pruners import anatomy
from pruners.retrain import LoRA, LoRAPrune, MaskLoRA, Reconstruction, ScaleLoRA, Trainable, finetune

OPT_SIZES = {"125M": (768, 12, 12), "1.3B": (2048, 24, 32), "2.7B": (2560, 32, 32), "6.7B": (4096, 32, 32),
             "13B": (5120, 40, 40), "30B": (7168, 48, 56)}  # fmt: skip
LLAMA_SIZES = {"7B": (4096, 11008, 32), "13B": (5120, 13824, 40)}
ROWS = {
    "Biases (linear + LN biases)": Trainable(biases=True),
    "LN weights+biases": Trainable(norms=True),
    "Biases + LN": Trainable(biases=True, norms=True),
    "(Mask/Scale/Prune-)LoRA r=16 on all block linears + biases + LN": Trainable(True, True, adapters=MaskLoRA()),
    "same + LoRA r=16 on lm_head (repo default)": Trainable(True, True, head=True, adapters=MaskLoRA()),
    "Biases + LN + LoRA r=16 on lm_head": Trainable(True, True, head=True),
}


def public_config(name: str) -> LlamaConfig | MistralConfig | OPTConfig:
    if name.startswith("OPT"):
        width, layers, heads = OPT_SIZES[name.removeprefix("OPT-")]
        return OPTConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, ffn_dim=4 * width,
                         word_embed_proj_dim=width)  # fmt: skip
    if name.startswith("Mistral"):
        return MistralConfig()
    width, inner, layers = LLAMA_SIZES[name.removeprefix("LLaMA-2-")]
    return LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                       num_attention_heads=layers)  # fmt: skip


def derived() -> list[tuple[str, str, str]]:
    with (SHARED / "published/perp.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["confidence"] == "derived"]
    return [(row["model"], row["method"], row["value"]) for row in rows]


@needs_shared
@pytest.mark.parametrize("name", ["OPT-125M", "OPT-1.3B", "OPT-2.7B", "OPT-6.7B", "OPT-13B", "OPT-30B", "LLaMA-2-7B",
                                  "LLaMA-2-13B", "Mistral-7B-v0.1"])  # fmt: skip
def test_shares_are_those_derived_from_the_public_configs(name):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(public_config(name))
    for _, method, value in [row for row in derived() if row[0] == name]:
        if method not in ROWS:
            assert model.num_parameters() == int(value)
            continue
        attached = ROWS[method].attach(model)
        attached.detach()
        decimals = len(value.partition(".")[2])
        assert f"{100 * attached.share:.{decimals}f}" == value


def test_full_selects_every_parameter(kind):
    model = tiny(kind)
    attached = Trainable.full().attach(model)
    assert attached.share == 1
    assert all(p.requires_grad for p in model.parameters())


def test_gradients_reach_exactly_what_is_selected(kind, windows):
    model = tiny(kind)
    attached = Trainable(norms=True, adapters=MaskLoRA(rank=2, targets=("q_proj",))).attach(model)
    model(input_ids=windows, labels=windows).loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert len(reached) == len(attached.tensors)
    assert all("norm" in name or name.endswith(("q_proj.a", "q_proj.b")) for name in reached)


def test_a_model_is_as_it_was_once_adapters_are_detached(kind):
    model = tiny(kind)
    names, flags = list(model.state_dict()), [p.requires_grad for p in model.parameters()]
    Trainable(norms=True, head=True, adapters=LoRA()).attach(model).detach()
    assert list(model.state_dict()) == names
    assert [p.requires_grad for p in model.parameters()] == flags


def test_trained_tensors_are_float32_for_as_long_as_they_are_trained(kind):
    model = tiny(kind).bfloat16()
    attached = Trainable(norms=True, adapters=MaskLoRA(rank=2)).attach(model)
    assert {p.dtype for p in attached.tensors.values()} == {torch.float32}
    attached.merge()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Trainable(biases=True), "selects nothing"),
        (lambda: Trainable(), "selects nothing"),
        (lambda: Trainable(adapters=MaskLoRA(targets=("q_porj",))), "Did you mean q_proj"),
        (lambda: Trainable(adapters=MaskLoRA(rank=64)), "Rank 64 is larger than model.layers.0.self_attn.q_proj"),
        (lambda: Trainable(adapters=MaskLoRA(rank=0)), "a positive integer"),
        (lambda: Trainable(weights=True, adapters=MaskLoRA()), "already trains everything"),
    ],
)
def test_what_cannot_be_trained_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make().attach(tiny("llama multi-head"))


@pytest.mark.parametrize("adapters", [LoRA(4, merge=True), LoRAPrune(4), ScaleLoRA(4), MaskLoRA(4)], ids=repr)
@pytest.mark.parametrize("units", ["no head, no channel", "nothing"])
def test_projections_that_nothing_is_left_of_get_no_adapter(kind, units, adapters, windows):
    model = hollow(kind, units)
    left = sum(bool(linear.weight.numel()) for b in anatomy.blocks(model) for linear in b.linears().values())
    attached = Trainable(adapters=adapters).attach(model)
    assert len(attached.adapters) == left > 0
    attached.detach()
    report = finetune(model, Trainable(adapters=adapters), windows, steps=2, learning_rate=1e-3)
    assert report.losses[1] < 1.1 * report.losses[0]


@pytest.mark.parametrize(
    "trainable", [Trainable(adapters=MaskLoRA(4)), Trainable(norms=True)], ids=["adapters", "norms"]
)
@pytest.mark.parametrize("units", ["no head, no channel", "nothing"])
def test_blocks_without_heads_or_channels_are_reconstructed(kind, units, trainable, windows):
    model = hollow(kind, units)
    rebuild = Reconstruction(trainable, steps=3, learning_rate=1e-3)
    report = pruners.prune(model, pruners.Wanda(sparsity=0.5), windows, reconstruct=rebuild)
    assert [block["block"] for block in report.reconstruction] == [block.name for block in anatomy.blocks(model)]
    assert all(block["final"] <= block["initial"] for block in report.reconstruction)


def test_a_selection_that_a_block_has_not_is_refused_though_nothing_is_trained_in_an_empty_one():
    first, second = anatomy.blocks(hollow("llama multi-head", "nothing"))
    assert Trainable(biases=True).attach_to_block(first).tensors == {}
    with pytest.raises(ValueError, match=r"selects nothing in model\.layers\.1"):
        Trainable(biases=True).attach_to_block(second)
