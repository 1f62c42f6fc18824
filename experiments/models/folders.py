"""Depth, heads, context length and parameters of a model folder, from its config.json."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)  # by precedence
UNLIMITED = 10**9  # transformers writes 1e30 where a tokenizer sets no limit
DTYPES = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class Shape:
    """`parameters` counted on the meta device, tied weights once; `positions` None where the folder does not tell."""

    blocks: int
    heads: int
    positions: int | None
    parameters: int
    marks: bool


def shape(folder: Path) -> Shape:
    """ValueError, in one sentence, for a folder whose configuration is absent, broken or of no language model."""
    return _shape(folder, _bytes(folder / "config.json"), _tokenizer_bytes(folder))


def dtype(folder: Path) -> str:
    """In which the weights were saved; float32 where the configuration does not tell one of ours."""
    told = _object(folder, _bytes(folder / "config.json"))
    found = told.get("dtype", told.get("torch_dtype"))
    return found if found in DTYPES[:3] else DTYPES[0]


def vocabulary(folder: Path) -> int:
    """How many tokens the model has rows for."""
    return int(without_weights(folder).config.get_text_config().vocab_size)


def _bytes(path: Path) -> bytes:
    try:
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError("there is no such file")
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"{path.parent} is not a model folder: its config.json cannot be read ({error.strerror or error})."
        ) from error


def _tokenizer_bytes(folder: Path) -> bytes:
    with suppress(ValueError):
        return _bytes(folder / "tokenizer_config.json")
    return b"{}"


@lru_cache(maxsize=64)
def _shape(folder: Path, config: bytes, tokenizer: bytes) -> Shape:
    """Cached by what was read, as a folder may be written over."""
    told = _object(folder, config)
    positions = _positions(folder, told, tokenizer)
    _check_dtype(folder, told)
    _check_architecture(folder, told)
    empty = without_weights(folder)
    text = empty.config.get_text_config()
    if text.num_hidden_layers < 1:
        raise ValueError(
            f"The config.json of {folder} describes a model without decoder blocks; there is nothing to prune."
        )
    if not hasattr(text, "num_attention_heads"):
        raise ValueError(
            f"The config.json of {folder} describes a {empty.config.model_type!r} model, which has no attention heads; "
            "only decoders with attention are known here."
        )
    marks = bool(getattr(empty.config, "text_prefix", ()))
    return Shape(text.num_hidden_layers, text.num_attention_heads, positions, empty.num_parameters(), marks)


def without_weights(folder: Path) -> Any:
    """The model that the folder's config.json describes, on the meta device; ValueError where it describes none."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        known = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(known, trust_remote_code=False)
    except Exception as error:  # whatever transformers or huggingface_hub raise over a configuration
        raise ValueError(
            f"The config.json of {folder} does not describe a language model that transformers can build: "
            f"{reason(error)}."
        ) from error


def _object(folder: Path, config: bytes) -> dict[str, Any]:
    try:
        told = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder} is not a model folder: its config.json cannot be read ({reason(error)})."
        ) from error
    if not isinstance(told, dict):
        raise ValueError(
            f"{folder} is not a model folder: its config.json must hold a JSON object and holds "
            f"{json.dumps(told)[:40]}."
        )
    return told


def _positions(folder: Path, told: dict[str, Any], tokenizer: bytes) -> int | None:
    for name in POSITIONS:
        if name in told:
            if not isinstance(told[name], int) or isinstance(told[name], bool) or told[name] < 1:
                raise ValueError(
                    f"The config.json of {folder} must give {name} as a positive integer; got "
                    f"{json.dumps(told[name])[:40]}."
                )
            return int(told[name])
    with suppress(ValueError, RecursionError):  # a broken tokenizer is refused where it is loaded
        length = dict(json.loads(tokenizer)).get("model_max_length")
        if isinstance(length, int) and 0 < length < UNLIMITED:
            return length
    return None


def _check_dtype(folder: Path, told: dict[str, Any]) -> None:
    for name in ("dtype", "torch_dtype"):
        if told.get(name) not in (None, "auto", *DTYPES):
            raise ValueError(
                f"The config.json of {folder} gives {name} as {json.dumps(told[name])[:40]}; use one of "
                f"{', '.join(DTYPES)}."
            )


def _check_architecture(folder: Path, told: dict[str, Any]) -> None:
    from transformers import CONFIG_MAPPING

    if told.get("auto_map") and told.get("model_type") not in CONFIG_MAPPING:
        raise ValueError(
            f"The config.json of {folder} needs custom code (auto_map), and "
            f"{told.get('model_type')!r} is not an architecture of transformers; such code is never run here, "
            "so save the "
            "model as an architecture that transformers has."
        )


def reason(error: BaseException) -> str:
    """The last line of an error that others raised, which says why, without its class and full stop."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    said = lines[-1] if ":" in lines[0] and lines[0].endswith(":") else lines[0]
    head, colon, rest = said.partition(": ")
    return shorten(rest if colon and head.endswith("Error") else said, 240, placeholder=" ...").rstrip(".:")
