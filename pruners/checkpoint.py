"""Pruned models on disk: safetensors, and a configuration that says every block's widths.

    checkpoint.save(model, tokenizer, folder)
    model, tokenizer = checkpoint.load(folder)

A saved folder also opens with `AutoModelForCausalLM.from_pretrained(folder)` after `import pruners`, or without this
project by `trust_remote_code=True`, from the one module that lies in it.  A model whose blocks all have the same widths
is saved as plain LLaMA, Mistral or OPT where their configurations can say so, and stock transformers opens it.
"""

from __future__ import annotations

import copy
import errno
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

from pruners.apply import CLASSES
from pruners.modeling_pruned import PrunedModel, check_complete, check_shards

logger = logging.getLogger(__name__)
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "ice_text.model")

for _class in CLASSES.values():
    AutoConfig.register(_class.config_class.model_type, _class.config_class, exist_ok=True)
    AutoModelForCausalLM.register(_class.config_class, _class, exist_ok=True)
    _class.config_class.register_for_auto_class()  # so that saving copies the module and names it in config.json
    _class.register_for_auto_class("AutoModelForCausalLM")


def save(model: PreTrainedModel, tokenizer: Any, folder: Path | str, *, max_shard_size: str = "5GB") -> Path:
    """Write the model, and the tokenizer unless it is None, to a new or empty folder; all of it or nothing.

    Flags of the generation configuration that it does not use itself, such as a temperature without `do_sample`, are
    dropped with a warning.  Raises FileExistsError for a folder that holds something, ValueError for a model whose
    class would not find its tensors again (adapters beside their matrices), OSError where the disk refuses.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already and not empty; choose another folder or empty this one.")
    check(model)
    plain = _as_stock(model) if isinstance(model, PrunedModel) else None
    with _beside(folder) as partial, _valid_generation(plain or model):
        try:
            (plain or model).save_pretrained(partial, max_shard_size=max_shard_size)
        except SafetensorError as error:  # how it reports a full disk
            raise OSError(errno.ENOSPC, f"Cannot write the weights ({error}); free some space", str(folder)) from error
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return folder


def check(model: PreTrainedModel) -> None:
    """ValueError for a model that cannot be saved so that it opens again; costs no memory and reads no weight.

    Its tensors must be the very ones that its class makes from its configuration.
    """
    with torch.device("meta"):
        expected = {name: t.shape for name, t in type(model)(copy.deepcopy(model.config)).state_dict().items()}
    found = {name: t.shape for name, t in model.state_dict().items()}
    strange = sorted(found.keys() - expected.keys())
    absent = sorted(expected.keys() - found.keys())
    reshaped = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    if strange or absent:
        told = f"{len(strange)} tensors that {type(model).__name__} does not know, e.g. {strange[0]}" if strange else ""
        told = told or f"no tensor {absent[0]}, which {type(model).__name__} asks for"
        raise ValueError(
            f"This model has {told}, so the saved folder would not open again. Merge adapters first (merge=True, or "
            "peft's merge_and_unload), make torch.nn.utils.prune's masks permanent, or save the adapters with peft."
        )
    if reshaped:
        name = reshaped[0]
        raise ValueError(
            f"{name} is {list(found[name])} and the model's configuration says {list(expected[name])}, so the saved "
            "folder would not open again; call pruners.apply.describe(model) after cutting by hand."
        )


def load(folder: Path | str, *, dtype: torch.dtype | str = "auto", **options: Any) -> tuple[Any, Any]:
    """The model in evaluation mode and its tokenizer (None where the folder has none).

    `dtype` defaults to the one it was saved in; `options` go to `from_pretrained`.  No code from the folder runs.
    Raises ValueError where tensors and configuration disagree, the configuration is a newer version's or the weights
    are damaged, FileNotFoundError for a missing configuration or weight file.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no model folder: it has no config.json.")
    check_shards(folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told apart by check_complete, in one sentence
            **options,
        )
    except SafetensorError as error:
        raise ValueError(f"The weights of {folder} are damaged ({error}); save or fetch them again.") from error
    model, info = loaded
    check_complete(folder, info)
    return model.eval(), _tokenizer(folder)


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def _as_stock(model: Any) -> Any | None:
    """The same weights as a model that transformers has itself; None where its configuration cannot say the widths."""
    stock_class: Any = type(model).__bases__[-1]
    try:
        config = _stock_config(model.config, stock_class.config_class)
        with torch.device("meta"):
            stock = stock_class(config)
    except (StrictDataclassError, ValueError):  # such as a number of heads that does not divide the width
        return None
    weights, expected = model.state_dict(), stock.state_dict()
    for name in expected.keys() - weights.keys():  # stock models have all biases of a sub-block or none
        if name.endswith(".bias"):
            weights[name] = torch.zeros(expected[name].shape, dtype=model.dtype, device=model.device)
    if {name: t.shape for name, t in weights.items()} != {name: t.shape for name, t in expected.items()}:
        return None
    stock.load_state_dict(weights, assign=True)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    return stock


def _stock_config(pruned: Any, config_class: type[Any]) -> Any:
    config = copy.deepcopy(pruned)
    config.__class__ = config_class
    biased = {name for block in pruned.blocks for name in block["biases"]}
    for name, prefix in {"attention_bias": "self_attn.", "mlp_bias": "mlp."}.items():
        if hasattr(config, name):
            setattr(config, name, any(projection.startswith(prefix) for projection in biased))
    added = {field.name for field in fields(pruned)} - {field.name for field in fields(config_class)}
    for name in added | {"auto_map"}:
        vars(config).pop(name, None)
    config.validate()
    return config


@contextmanager
def _valid_generation(model: Any) -> Iterator[None]:
    """For a while without the generation flags that transformers refuses to save, as they are never used."""
    own = model.generation_config
    try:
        if own is not None:
            model.generation_config = _without_idle_flags(own)
        yield
    finally:
        model.generation_config = own


def _without_idle_flags(config: GenerationConfig) -> GenerationConfig:
    try:
        config.validate(strict=True)
        return config
    except ValueError as error:
        idle = [name for name in re.findall(r"- `(\w+)`:", str(error)) if getattr(config, name, None) is not None]
        if not idle:
            raise
        config = copy.deepcopy(config)
        for name in idle:
            setattr(config, name, None)
        logger.warning("Saved without the generation flags that this model does not use: %s.", ", ".join(idle))
        return _without_idle_flags(config)


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """A folder to write to that takes the place of `folder` when the block ends without an error."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.parent / f".{folder.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
