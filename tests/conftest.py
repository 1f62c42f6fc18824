"""Shared fixtures: real data where it is there, tiny models always."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from jaxtyping import install_import_hook

if not torch.cuda.is_available():  # Triton reads it when transformers loads it: its kernels run on a CPU, in numpy
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
)

from pruners import anatomy, apply, families

with install_import_hook(["pruners", "eval"], "beartype.beartype"):  # shapes in signatures hold, in tests
    import pruners

from own_work import mine, ria, where  # noqa: F401  (fixtures)

DROPPED = re.compile(r"deprecat|will be removed|no longer be supported", re.IGNORECASE)


class Refusing(logging.Handler):
    """What a library only logs about a call that it is about to drop fails there, as its warnings do."""

    def emit(self, record: logging.LogRecord) -> None:
        if DROPPED.search(text := record.getMessage()):
            raise DeprecationWarning(f"{record.name}: {text}")


for library in ("transformers", "huggingface_hub", "datasets", "peft", "accelerate", "lm_eval", "torch"):
    logging.getLogger(library).addHandler(Refusing(logging.WARNING))

SHARED = Path(__file__).resolve().parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not beside the project")

SIZES = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 64}
CONFIGS = {
    "llama multi-head": LlamaConfig(
        **SIZES, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, eos_token_id=2
    ),
    "llama grouped-query": LlamaConfig(
        **SIZES, intermediate_size=64, num_attention_heads=6, num_key_value_heads=3, head_dim=8, eos_token_id=2
    ),
    "opt": OPTConfig(**SIZES, ffn_dim=64, num_attention_heads=4, word_embed_proj_dim=48, dropout=0.1),
}
SLIDING = {  # for tests of what differs with a sliding window
    "mistral": MistralConfig(
        **SIZES, intermediate_size=64, num_attention_heads=6, num_key_value_heads=3, head_dim=8, sliding_window=8,
        eos_token_id=2,
    ),
}  # fmt: skip
FAMILIES = {"llama": LlamaForCausalLM, "mistral": MistralForCausalLM, "opt": OPTForCausalLM}


def tiny(kind: str, seed: int = 0) -> PreTrainedModel:
    """A random two-block model of that kind, in float32; biases and norms too are random."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = copy.deepcopy((CONFIGS | SLIDING)[kind])
        model: Any = FAMILIES[config.model_type](config).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first, so that two processes end at about the same time."""
    items.sort(key=lambda item: item.path.name != "test_slurm_cluster.py")


@pytest.fixture(autouse=True)
def no_hub(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing was ever downloaded and the Hub is not asked, so that ids are the same on every machine."""
    from huggingface_hub import constants

    from experiments.models import hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "no-hub"))
    monkeypatch.setattr(hub, "reachable", lambda: False)


@pytest.fixture(autouse=True)
def registers() -> Iterator[None]:
    """What a test adds to a register of the project is gone after it, whichever test comes next in that process."""
    import experiments.models
    from experiments import papers
    from experiments.selection import rehearsal

    kept = [(register, dict(register)) for register in (
        papers.TABLES, rehearsal._real, experiments.models.CATALOGUE, pruners.METHODS, families.FAMILIES,
    )]  # fmt: skip
    yield
    for register, before in kept:
        register.clear()
        register.update(before)


HOLLOW = {  # what each of the two blocks has lost
    "no head, no channel": (["attention"], ["mlp"]),
    "nothing": (["attention", "mlp"], []),
    "nothing anywhere": (["attention", "mlp"], ["attention", "mlp"]),
}


def hollow(kind: str, units: str) -> PreTrainedModel:
    """A tiny model whose blocks have lost all units of some kinds, cut out as structured pruning does."""
    model = tiny(kind)
    for block, lost in zip(anatomy.blocks(model), HOLLOW[units], strict=True):
        kept = apply.Kept.all(block)
        for which in apply.KINDS:
            kept[which][: block.units(which) if which in lost else 1] = False
        apply.cut(block, kept)
    apply.describe(model)
    return model


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def windows() -> torch.Tensor:
    """Six windows of 16 tokens within the tiny models' vocabulary."""
    return torch.randint(3, 96, (6, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def stories() -> Callable[[], PreTrainedModel]:
    """A trained 260,032-parameter grouped-query LLaMA; every call loads a fresh one."""
    folder = SHARED / "data/models/stories260K/hf"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
