"""How a model is found by name or folder, told apart from others, and loaded.

Weights come as safetensors only and no code of a model repository ever runs.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import wheels
from experiments.catalogue import CATALOGUE, Model
from experiments.conversion import converted, quiet
from experiments.fingerprints import fingerprint, weight_files
from pruners.suggest import unknown

__all__ = ["CATALOGUE", "Model", "commit", "find", "identity", "load"]


def find(name: str | Path) -> Model:
    """The catalogue's model of that name, or a local folder with `config.json` and safetensors weights.

    Raises ValueError for an unknown name (with the nearest ones) and for a folder that cannot be loaded.
    """
    if str(name) in CATALOGUE:
        return CATALOGUE[str(name)]
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{unknown('model', str(name), CATALOGUE)} A local folder would do, too; there is none there.")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder} is no model folder: its config.json cannot be read ({error}).") from error
    weight_files(folder)
    return Model(str(name), folder=folder, positions=config.get("max_position_embeddings"), dtype="auto")


def identity(name: str | Path) -> dict[str, str]:
    """What tells this model's weights from any other's, as plain JSON."""
    model = find(name)
    if model.folder:
        return {"fingerprint": fingerprint(model.folder)}
    if model.package:
        return {"package": model.package, "version": wheels.version(model.package)}
    return {"hub": str(model.hub), "revision": model.revision or "main"}


def commit(name: str | Path) -> str | None:
    """The Hub commit that a loaded model's configuration came from; None for models that are not from the Hub."""
    model = find(name)
    if model.hub is None:
        return None
    path = try_to_load_from_cache(model.hub, "config.json", revision=model.revision or "main")
    return Path(path).parent.name if isinstance(path, str) else None


def load(
    name: str | Path, dtype: str | torch.dtype | None = None, device: str | torch.device | None = None
) -> tuple[Any, Any]:
    """The model in evaluation mode, on `device` (CPU by default), and its tokenizer.

    `dtype` is a torch dtype or its name; None takes the catalogue's, or for a folder the one it was saved in.
    Raises ValueError for weights that are missing, left over or damaged, OSError if the Hub refuses.
    """
    found = find(name)
    source = found.folder or (converted(found.package) if found.package else str(found.hub))
    options = {"revision": found.revision or "main", "trust_remote_code": False}
    with nullcontext() if found.hub else quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=_dtype(dtype or found.dtype),
                device_map={"": device} if device is not None else None,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told apart below, in one sentence
                **options,
            )
        except SafetensorError as error:
            raise ValueError(f"The weights of {name} are damaged ({error}); fetch them again.") from error
        except OSError as error:
            raise OSError(_refused(found, error)) from error
    model, info = loaded
    _check_complete(found, info)
    return model.eval(), tokenizer


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    known = ("float32", "float16", "bfloat16", "float64", "auto")
    if isinstance(dtype, str) and dtype not in known:
        raise ValueError(unknown("dtype", dtype, known))
    return dtype if isinstance(dtype, torch.dtype) or dtype == "auto" else getattr(torch, dtype)


def _check_complete(model: Model, info: dict[str, Any]) -> None:
    """A weight that is missing would be random and one that is left over ignored: the number would look fine."""
    surplus = {key for key in info["unexpected_keys"] if key.endswith((".weight", ".bias"))}
    misfits = {key for key, *_ in info["mismatched_keys"]}
    wrong = {"asks in vain for": info["missing_keys"], "has no place for": surplus, "has other shapes for": misfits}
    for verdict, keys in wrong.items():
        if keys:
            raise ValueError(
                f"{model.name} does not fit its own config.json, which {verdict} {len(keys)} of the weights, e.g. "
                f"{min(keys)}; it was cut (a structurally pruned model), edited or not saved to the end."
            )


def _refused(model: Model, error: OSError) -> str:
    if model.hub is None:
        return f"{model.name} could not be loaded: {error}"
    reason = shorten(str(error) or type(error).__name__, 200)
    return (
        f"{model.name} ({model.hub}) did not come from the Hub: {reason} Check the connection, accept the licence on "
        f"the model's page if it asks ({model.licence}) and run `hf auth login`, or name a local folder with "
        "safetensors weights instead."
    )
