"""The contract of every method, checked on a tiny model of each family: for methods of your own.

    python -m pruners check my_method.py

The asked sparsity is reached, the same run twice gives the same bits, the number of windows in a batch changes none,
only what is to be pruned moves, and what is saved opens again as the same model.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.utils import logging

import pruners
from pruners import anatomy, checkpoint
from pruners.families import FAMILIES
from pruners.select import Pattern
from pruners.unstructured import Unstructured

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
PECULIAR: dict[str, dict[str, Any]] = {  # what SIZES does not say to a family
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "phi": {"num_key_value_heads": 4},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gptj": {"rotary_dim": 4},
    "mpt": {"max_seq_len": 64},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "chatglm": {"inner_hidden_size": 64, "bos_token_id": 92, "mask_token_id": 88, "gmask_token_id": 89},
}
ROUTED = ("mixtral", "qwen3_moe")  # whose experts structured methods refuse
ASKED = 0.5
PATTERN = "2:4"
GRAIN = 1 / 32  # a weight of the narrowest row


@dataclass(frozen=True)
class Finding:
    """One promise on one family; `broken` says how, empty where it is kept."""

    family: str
    promise: str
    broken: str = ""


def check(kind: type[Any], families: tuple[str, ...] = tuple(FAMILIES)) -> Iterator[Finding]:
    """Every promise of a method's class on each family; an exception is a promise that is broken."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    promises = UNSTRUCTURED if issubclass(kind, Unstructured) else STRUCTURED
    for family in families:
        if family in ROUTED and promises is STRUCTURED:
            continue
        for name, promise in promises.items():
            try:
                yield Finding(family, name, promise(kind, family))
            except Exception as error:  # noqa: BLE001  (whatever a method of somebody else's raises is what is told)
                yield Finding(family, name, f"{type(error).__name__}: {error}")


def tiny(family: str) -> Any:
    return built(family, SIZES | GROUPED, PECULIAR.get(family, {}))


def built(family: str, sizes: Mapping[str, Any], own: Mapping[str, Any], seed: int = 0) -> Any:
    """A model with random weights, biases and norms, the same for a seed, in float32 and evaluation mode.

    Of `sizes` the family takes those that its configuration knows; `own` is what else it says.
    """
    known: Any = CONFIG_MAPPING[family]
    config = known(**{name: size for name, size in sizes.items() if hasattr(known(), name)} | dict(own))
    config.dtype = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def windows(family: str) -> Tensor:
    """Tokens [4, 16]; ChatGLM's have its marks in them."""
    tokens = torch.randint(3, 88, (4, 16), generator=torch.Generator().manual_seed(1))
    if family == "chatglm":
        tokens[:, 6:8] = torch.tensor([89, 92])
    return tokens


def _pruned(kind: type[Any], family: str, batch_size: int = 4, **how: Any) -> tuple[Any, Any]:
    model = tiny(family)
    report = pruners.prune(model, kind(**how), windows(family), batch_size=batch_size)
    return model, report


def _matrices(model: nn.Module) -> dict[str, Tensor]:
    return {f"{b.name}.{n}": linear.weight.data for b in anatomy.blocks(model) for n, linear in b.linears().items()}


def _sparsity(kind: type[Any], family: str) -> str:
    model, report = _pruned(kind, family, sparsity=ASKED)
    found = torch.cat([(weight == 0).flatten() for weight in _matrices(model).values()]).double().mean().item()
    if abs(found - ASKED) > GRAIN:
        return f"{ASKED} of the weights were to be removed and {found:.4f} were."
    if abs(report.achieved - found) < 1e-9:
        return ""
    return f"the report says {report.achieved:.4f} but the sparsity is {found:.4f}."


def _pattern(kind: type[Any], family: str) -> str:
    model, _ = _pruned(kind, family, pattern=PATTERN)
    pattern = Pattern.parse(PATTERN)
    for name, weight in _matrices(model).items():
        kept = (weight != 0).unflatten(-1, (-1, pattern.m)).sum(-1)
        if (kept > pattern.n).any():
            return f"{name} keeps {int(kept.max())} of a group of {pattern.m} and {pattern.n} were asked for."
    return ""


def _twice(kind: type[Any], family: str) -> str:
    return _same(_pruned(kind, family, **_share(kind))[0], _pruned(kind, family, **_share(kind))[0], "run twice")


def _batches(kind: type[Any], family: str) -> str:
    one, four = (_pruned(kind, family, size, **_share(kind))[0] for size in (1, 4))
    if (shapes := {n: t.shape for n, t in one.state_dict().items()}) != {
        n: t.shape for n, t in four.state_dict().items()
    }:
        return f"different units are left with batch size 1 than with batch size 4 ({len(shapes)} tensors)."
    for name, tensor in one.state_dict().items():
        other = four.state_dict()[name]
        if not torch.equal(tensor == 0, other == 0):
            return f"{name}: different weights are removed with batch size 1 than with batch size 4."
    return ""


def _share(kind: type[Any]) -> dict[str, Any]:
    return {"sparsity": ASKED} if issubclass(kind, Unstructured) else {"ratio": ASKED}


def _same(one: nn.Module, other: nn.Module, how: str) -> str:
    found = other.state_dict()
    for name, tensor in one.state_dict().items():
        if not torch.equal(tensor, found[name]):
            return f"{name} is not bit-identical when {how}."
    return ""


def _others(kind: type[Any], family: str) -> str:
    model, _ = _pruned(kind, family, sparsity=ASKED)
    dense = tiny(family)
    before, pruned = dense.state_dict(), set(map(_storage, _matrices(model).values()))
    for name, tensor in model.state_dict().items():
        if _storage(tensor) not in pruned and not torch.equal(tensor, before[name]):
            return f"{name} was changed and is not a matrix of a block."
    if kind.remove is not Unstructured.remove or kind.prune is not Unstructured.prune:  # it may update what it keeps
        return ""
    after = _matrices(model)
    for name, weight in _matrices(dense).items():
        if moved := int(((after[name] != weight) & (after[name] != 0)).sum()):
            return f"{name}: {moved} of the weights that were kept were changed."
    return ""


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _smaller(kind: type[Any], family: str) -> str:
    model, report = _pruned(kind, family, ratio=ASKED)
    before, after = tiny(family).num_parameters(), model.num_parameters()
    return "" if after < before and report.achieved > 0 else f"{before:,} parameters were {after:,} afterwards."


def _reopened(kind: type[Any], family: str) -> str:
    model, _ = _pruned(kind, family, **_share(kind))
    with tempfile.TemporaryDirectory() as folder:
        opened, _ = checkpoint.load(checkpoint.save(model, None, Path(folder) / "kept"))
        text = windows(family)[:1]
        with torch.no_grad():
            ours, theirs = model(text).logits, opened(text).logits
    if not ours.isfinite().all():
        return "the pruned model's logits hold NaN or inf."
    return "" if torch.allclose(ours, theirs, atol=1e-5) else "the saved model differs after loading."


Promise = Callable[[type[Any], str], str]
UNSTRUCTURED: dict[str, Promise] = {
    "asked sparsity": _sparsity,
    "n:m": _pattern,
    "deterministic": _twice,
    "batch invariant": _batches,
    "nothing else moves": _others,
    "saved and reopened": _reopened,
}
STRUCTURED: dict[str, Promise] = {
    "smaller": _smaller,
    "deterministic": _twice,
    "batch invariant": _batches,
    "saved and reopened": _reopened,
}
