"""Checks of a model folder before and while it is loaded: one sentence for what no loader could use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig

from pruners.interface import checks

WORDS = 300  # characters kept of what a library says


def check(folder: Path) -> None:
    """Raises FileNotFoundError without a config.json, ValueError for one of which no model can be made, for generation
    settings that cannot be read, and for adapters that nobody has merged into the weights beside them."""
    _check_config(folder)
    _check_generation(folder)
    if (path := folder / "adapter_config.json").exists():
        raise ValueError(
            f"{folder} holds adapters ({path.name}) beside the weights; merge them (peft: "
            "merge_and_unload) and save the model into another folder."
        )


@contextmanager
def convertible(weights: Path | str) -> Iterator[None]:
    """ValueError where transformers cannot make the parameters of a model of tensors, such as those of its experts."""
    try:
        yield
    except RuntimeError as error:
        if "conversion of the weights" not in str(error):
            raise
        raise ValueError(
            f"The weights in {weights} lack some of the tensors that one parameter is made of, such as one matrix of "
            "an expert, or these do not fit together; save or fetch them again."
        ) from error


def brief(error: Exception) -> str:
    """The beginning of what a library says, on one line."""
    said = " ".join(str(error).split())
    if isinstance(error, LookupError | ArithmeticError | AttributeError | TypeError):  # which say little without it
        said = f"{type(error).__name__}: {said}"
    return said if len(said) <= WORDS else f"{said[:WORDS]} ..."


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is not a model folder: it has no config.json.")
    told = _object(path)
    if str(told.get("model_type")) not in CONFIG_MAPPING:
        raise ValueError(
            f"{path} is of the model type {checks.shown(told.get('model_type'))}, which transformers does not know."
        )
    if told.get("quantization_config"):
        raise ValueError(f"{path} says that the weights are quantised; load a folder in float32, bfloat16 or float16.")
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), trust_remote_code=False)
    except Exception as error:  # whatever transformers raises over a configuration
        raise ValueError(f"{path} describes no model: {brief(error)}") from error


def _check_generation(folder: Path) -> None:
    path = folder / "generation_config.json"
    if not path.exists():
        return
    _object(path)
    try:
        GenerationConfig.from_pretrained(folder)
    except Exception as error:  # whatever transformers raises over the settings
        raise ValueError(f"{path} holds no generation settings: {brief(error)}") from error


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is not a regular file; save or fetch it again.")
    try:
        told = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as JSON ({brief(error)}); save or fetch it again.") from error
    if not isinstance(told, dict):
        raise ValueError(f"{path} holds {checks.shown(told)} instead of a JSON object; save or fetch it again.")
    return told
