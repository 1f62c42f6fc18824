"""Pruned models on disk: safetensors, and a configuration that lists the widths of every block.

    checkpoint.check(model)  # before hours of pruning
    checkpoint.save(model, tokenizer, folder)
    model, tokenizer = checkpoint.load(folder)

A saved folder also opens with `AutoModelForCausalLM.from_pretrained(folder)` after `import pruners`, or without this
project by `trust_remote_code=True`, from the two modules that lie in it.  A model whose blocks all have the same widths
is saved as a plain one of its family where the family's configuration can say so, and stock transformers opens it.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
)

from pruners import anatomy, apply, chatglm  # noqa: F401  (registers its model type)
from pruners.anatomy import Block
from pruners.families import FAMILIES
from pruners.interface import checks, described
from pruners.interface.checks import Folder, Rule
from pruners.modeling_pruned import PrunedModel, check_complete, check_shards, configuration
from pruners.retrain import peft_targets
from pruners.run import inputs, means
from pruners.weights import homes, storage

logger = logging.getLogger(__name__)
SIZE = re.compile(r"(?=.*[1-9])\d+(\.\d+)?[KMGT]B")
ShardSize = Annotated[
    str, Rule("a size above 0, such as '5GB' or '200MB'", (str,), lambda size: bool(SIZE.fullmatch(size)))
]
FOLDER = Rule("the path of a model folder", (str, os.PathLike), lambda path: bool(os.fspath(path)))
DTYPES = ("float32", "bfloat16", "float16", "float64")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "ice_text.model")

for _name in FAMILIES:
    _config: Any = CONFIG_MAPPING[_name]
    configuration(_config)
peft_targets.register({f"pruned_{_name}": _name for _name in FAMILIES})


@checks.arguments
def save(model: Any, tokenizer: Any, folder: Folder | str, *, max_shard_size: ShardSize | None = None) -> Path:
    """Write the model, and the tokenizer unless it is None, to a new or empty folder; all of it or nothing.

    One file of at most `max_shard_size` is in memory at a time where weights are away from home; None is 5GB, and 1GB
    there.
    Flags of the generation configuration that it does not use itself, such as a temperature without `do_sample`, are
    dropped with a warning.  Raises what `check` does, ValueError for weights without values and for heads that are
    zeroed under a norm over all of them (OLMo 2 and 3), FileExistsError for a folder that holds something,
    storage.StorageError where the disk refuses.
    """
    model = getattr(model, "_orig_mod", model)  # out of torch.compile's wrapper
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise TypeError(f"tokenizer is one of transformers, or None; got {checks.typed(tokenizer)}.")
    folder = Path(folder).expanduser().resolve()
    check(model)
    if rescaled := means.rescaled(model):
        raise ValueError(
            f"Heads of this model are zeroed and its norms over all heads, e.g. {rescaled[0]}, rescaled to the others, "
            "which no configuration can say; cut the heads out before saving: prune with cut=True."
        )
    meta = next((name for name, p in model.named_parameters() if p.is_meta), None)
    if meta and not hasattr(model, "hf_device_map"):  # transformers fetches what accelerate has offloaded
        raise ValueError(f"{meta} is on the meta device and holds no values to save; load the model whole.")
    plain = _as_stock(model) if isinstance(model, PrunedModel) else None
    with storage.filling(folder) as partial, _saveable_generation(plain or model):
        _write(model, plain or model, partial, max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return folder


def _write(model: Any, subject: Any, folder: Path, max_shard_size: str | None) -> None:
    """`subject` is the model, or the same weights in its stock class."""
    home = homes.of(model)
    if home is None:
        subject.save_pretrained(folder, max_shard_size=max_shard_size or "5GB")
        return
    away = homes.Values(home)
    state = {
        name: torch.empty_like(tensor, device="meta") if name in away else tensor
        for name, tensor in subject.state_dict().items()
    }
    # transformers fetches tensors that accelerate keeps elsewhere, file by file; these are kept by us
    subject.hf_device_map, subject._hf_hook = {"": "disk"}, SimpleNamespace(weights_map=away)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Attempting to save a model with offloaded modules")
            type(subject).save_pretrained(subject, folder, state_dict=state, max_shard_size=max_shard_size or "1GB")
    finally:
        del subject.hf_device_map, subject._hf_hook


def check(model: Any) -> None:
    """Check, before any work, that `load` could open what `save` writes; reads no weight and needs no memory.

    Raises TypeError for anything but a transformers model, ValueError for one whose tensors are not the very ones that
    its configuration makes (adapters beside their matrices, parameters shared by hand), whose class is not the one that
    its configuration makes, or whose configurations transformers refuses to save.
    Not seen here: heads that `cut=False` will zero under a norm over all of them (OLMo 2 and 3), which `save` refuses.
    """
    model = getattr(model, "_orig_mod", model)
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"The model is a transformers.PreTrainedModel; got {inputs.described(model)}")
    config: Any = copy.deepcopy(model.config)
    if misplaced := config._get_generation_parameters():
        raise ValueError(
            f"This model's config holds {', '.join(misplaced)}, which transformers saves in generation_config only; "
            "set them in model.generation_config and to None in model.config."
        )
    try:
        config.validate()
        kind, expected, tied = _made(_Configured(type(config), config.to_json_string(use_diff=False), config))
    except (StrictDataclassError, ValueError, TypeError) as error:
        raise ValueError(
            f"This model's configuration cannot be saved and loaded again: {described.brief(error)}"
        ) from error
    _check_tensors(model, kind.__name__, expected)
    _check_tied(model, kind.__name__, tied)
    apply.check_class(model, kind)
    if model.can_generate() and model.generation_config is not None:
        _without_idle_flags(model.generation_config)


@dataclass(frozen=True)
class _Configured:
    """A configuration, told from others by all that it says."""

    kind: type
    text: str
    config: Any = field(compare=False)


@lru_cache(maxsize=4)
def _made(configured: _Configured) -> tuple[type[Any], dict[str, torch.Size], list[list[str]]]:
    """The class that a configuration makes, the shapes of its tensors by name, and which parameters are one."""
    with torch.device("meta"):
        opened = AutoModelForCausalLM.from_config(configured.config, trust_remote_code=False)
    return type(opened), {name: tensor.shape for name, tensor in opened.state_dict().items()}, _tied(opened)


def _tied(model: Any) -> list[list[str]]:
    """The names of parameters that lie in the same memory."""
    names: dict[Any, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault((p.device, p.data_ptr()) if p.numel() and not p.is_meta else p, []).append(name)
    return [several for several in names.values() if len(several) > 1]


def _check_tensors(model: Any, kind: str, expected: Mapping[str, torch.Size]) -> None:
    """ValueError where the model's tensors are not those `expected` of the class `kind`."""
    found = {name: t.shape for name, t in model.state_dict().items()}
    strange, absent = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    if strange or absent:
        told = f"{len(strange)} tensors that {kind} does not know, e.g. {strange[0]}" if strange else ""
        told = told or f"no tensor {absent[0]}, which {kind} needs"
        raise ValueError(
            f"This model has {told}, so the saved folder could not be loaded. Merge adapters first (merge=True, or "
            "peft's merge_and_unload), make torch.nn.utils.prune's masks permanent, or save the adapters with peft."
        )
    for name, shape in found.items():
        if expected[name] != shape:
            raise ValueError(
                f"{name} is {list(shape)} and the model's configuration says {list(expected[name])}, so the "
                "saved folder could not be loaded; correct the configuration (after cutting blocks by hand: "
                "pruners.apply.describe(model))."
            )


def _check_tied(model: Any, kind: str, tied: list[list[str]]) -> None:
    """ValueError where parameters are one that a model of that class has apart."""
    for names in _tied(model):
        if any(set(names) <= set(several) for several in tied):
            continue
        ends = [end.weight for end in (model.get_input_embeddings(), model.get_output_embeddings())]
        head = all(any(model.get_parameter(name) is end for end in ends) for name in names)
        raise ValueError(
            f"{names[0]} and {names[1]} are one tensor, and {kind} has two by the model's configuration, so it could "
            "not be pruned, saved and loaded as it is; "
            + ("set model.config.tie_word_embeddings = True, or " if head else "")
            + "give one of them its own, by copy.deepcopy of the module or parameter that stands in both places."
        )


def load(
    folder: Path | str,
    *,
    dtype: torch.dtype | str = "auto",
    device_map: Any = None,
    max_memory: dict[Any, Any] | None = None,
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """The model in evaluation mode and its tokenizer (None where the folder has none).

    `dtype` defaults to the one it was saved in; `device_map`, `max_memory` and `attn_implementation` are those of
    transformers' `from_pretrained`.  No code from the folder runs.
    Raises TypeError or ValueError for invalid arguments, ValueError where tensors and configuration disagree,
    the configuration is a newer version's or describes no model, adapters lie beside the weights, weights, generation
    settings or tokenizer are damaged, FileNotFoundError for a missing configuration or weight file.
    """
    folder = FOLDER.checked("load: folder", folder)
    folder = Path(folder).expanduser()
    if not isinstance(dtype, torch.dtype) and dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype is 'auto', a torch.dtype or one of {', '.join(DTYPES)}; got {checks.shown(dtype)}.")
    described.check(folder)
    check_shards(folder)
    if not any(path.is_file() for path in folder.glob("*.safetensors")):
        if pickled := sorted(path.name for path in folder.glob("*.bin")):
            raise ValueError(
                f"The weights of {folder} are pickled ({', '.join(pickled)}), which can run code; use safetensors."
            )
        raise FileNotFoundError(f"{folder} has no weights: there is no *.safetensors file in it.")
    try:
        with described.convertible(folder):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told apart by check_complete, in one sentence
                device_map=device_map,
                max_memory=max_memory,
                attn_implementation=attn_implementation,
            )
    except SafetensorError as error:
        raise ValueError(f"The weights of {folder} are damaged ({error}); save or fetch them again.") from error
    model, info = loaded
    check_complete(folder, info)
    return model.eval(), _tokenizer(folder)


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise ValueError(
            f"The tokenizer files of {folder} are damaged ({described.brief(error)}); save them again."
        ) from error


def _as_stock(model: Any) -> Any | None:
    """The same weights as a model that transformers has itself; None where its configuration cannot say the widths."""
    stock_class: Any = type(model).__bases__[-1]
    config = _stock_config(model.config, stock_class.config_class)
    if config is None:
        return None
    try:
        config.validate()
        with torch.device("meta"):
            stock = stock_class(config)
    except (StrictDataclassError, ValueError):  # such as a number of heads that does not divide the width
        return None
    weights, expected = model.state_dict(), stock.state_dict()
    if any(tensor.is_meta for tensor in weights.values()):  # offloaded; transformers fetches such weights itself
        return None
    for name in expected.keys() - weights.keys():  # stock models have all biases of a sub-block or none
        if name.endswith(".bias"):
            weights[name] = torch.zeros(expected[name].shape, dtype=model.dtype, device=model.device)
    if {name: t.shape for name, t in weights.items()} != {name: t.shape for name, t in expected.items()}:
        return None
    if any(_settled(*pair) for pair in zip(anatomy.blocks(model), anatomy.blocks(stock), strict=True)):
        return None
    stock.load_state_dict(weights, assign=True)
    stock.tie_weights()
    stock.generation_config = model.generation_config
    return stock


def _stock_config(pruned: Any, config_class: type[Any]) -> Any | None:
    """The stock configuration with the widths that all blocks share; None where they differ or are none."""
    shared = {name: {block[name] for block in pruned.blocks} for name in ("heads", "kv_heads", "channels")}
    if any(len(values) > 1 or 0 in values for values in shared.values()) or _slopes_differ(pruned.blocks):
        return None
    heads, kv_heads, channels = (values.pop() for values in shared.values())
    config = copy.deepcopy(pruned)
    config.__class__ = config_class
    widths = {"num_attention_heads": heads} | dict.fromkeys(("num_key_value_heads", "num_kv_heads"), kv_heads)
    widths |= dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"), channels)
    for name, width in widths.items():
        if hasattr(config, name):
            setattr(config, name, width)
    biased = {name for block in pruned.blocks for name, shape in block["shapes"].items() if shape and "bias" in name}
    for name, prefix in {"attention_bias": "self_attn.", "mlp_bias": "mlp."}.items():
        if hasattr(config, name) and any(projection.startswith(prefix) for projection in biased):
            setattr(config, name, True)
    for name in ("blocks", "places", "dense", "pruned_format", "auto_map"):
        vars(config).pop(name, None)
    return config


def _slopes_differ(blocks: list[dict[str, Any]]) -> bool:
    return any(len(block["head_numbers"]) < block["dense_heads"] for block in blocks if "head_numbers" in block)


def _settled(block: Block, stock: Block) -> list[str]:
    """The numbers that attention reads while running and that the stock model would set otherwise."""
    ours, theirs = vars(block.attention), vars(stock.attention)
    unread = {"hidden_size", "embed_dim"}
    return [
        name
        for name, value in theirs.items()
        if type(value) in (int, float) and name in ours and name not in unread and ours[name] != value
    ]


@contextmanager
def _saveable_generation(model: Any) -> Iterator[None]:
    """For a while without the generation flags that transformers refuses to save, as they are never used."""
    own = model.generation_config
    try:
        if own is None and model.can_generate():  # which transformers does not expect
            model.generation_config = GenerationConfig.from_model_config(model.config)
        elif own is not None:
            model.generation_config, dropped = _without_idle_flags(own)
            if dropped:
                logger.warning("Saved without the generation flags that have no effect: %s.", ", ".join(dropped))
        yield
    finally:
        model.generation_config = own


def _without_idle_flags(config: GenerationConfig) -> tuple[GenerationConfig, list[str]]:
    """What transformers saves of it, and the names that are lost; ValueError for faults that are no idle flags."""
    dropped: list[str] = []
    while True:
        try:
            config.validate(strict=True)
            return config, dropped
        except ValueError as error:
            idle = [name for name in re.findall(r"- `(\w+)`:", str(error)) if getattr(config, name, None) is not None]
            if not idle:
                raise ValueError(
                    f"This model's generation_config cannot be saved: {described.brief(error)} Correct "
                    "model.generation_config first."
                ) from error
            config, dropped = copy.deepcopy(config), dropped + idle
            for name in idle:
                setattr(config, name, None)
