"""Finds a model by name or folder, identifies it, and loads it.

Weights come as safetensors only and no code of a model repository ever runs.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import Any

from safetensors import SafetensorError

from experiments.data import wheels
from experiments.models import catalogue, folders, hub
from experiments.models.catalogue import CATALOGUE, Model
from experiments.models.fingerprint import fingerprint, weight_files
from experiments.models.gguf import converted, quiet
from pruners.interface.suggest import UsageError, unknown
from pruners.lazy import torch
from pruners.weights import homes, sources

__all__ = ["CATALOGUE", "Model", "check", "commit", "find", "identity", "load", "positions"]

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*")
MAIN = "main"


def find(name: str | Path) -> Model:
    """The catalogue's model of that name, a local folder, or, as `NAME=FOLDER`, a folder that is that very model.

    What is known of a folder comes from the folder itself, whatever it is called.  `NAME=FOLDER` has all that the
    catalogue knows (gate, context length, number format) but its weights, which are the folder's.
    Raises ValueError for an unknown name (with the nearest ones), for a folder that cannot be loaded, and for one whose
    blocks or parameters are not those of the model that it is said to be.
    """
    known, place = catalogue.split(name)
    if place is None:
        return CATALOGUE[str(known)]
    if known is None and catalogue.is_hub_id(place):
        return _of_hub(place)
    folder = Path(place).expanduser()
    if not place or not folder.is_dir():
        raise ValueError(_nowhere(str(name), known, place))
    found = folders.shape(folder)
    weight_files(folder)
    if known is not None:
        _check_shape(CATALOGUE[known], found, folder)
        return replace(CATALOGUE[known], hub=None, revision=None, package=None, folder=folder)
    return Model(str(name), folder=folder, dtype="auto", **asdict(found))


@lru_cache
def _of_hub(repository: str) -> Model:
    """What a repository's config.json says of its model, which is fetched; ValueError where it cannot be."""
    revision = hub.model_commit(repository)
    if revision is None:
        raise ValueError(
            f"{repository} is not a folder here, and as a model of the Hub {hub.refusal(repository)}; "
            "check its name and the connection, or name a local folder."
        )
    place = hub.configuration(repository, revision)
    return Model(repository, repository, revision, dtype=folders.dtype(place), **asdict(folders.shape(place)))


def canonical(name: str) -> str:
    """The catalogue's name of a Hub id that it has."""
    return next((model.name for model in CATALOGUE.values() if model.hub == name), name)


def own_dtype(name: str | Path) -> str:
    """The number format in which a model is published or saved."""
    found = find(name)
    return folders.dtype(found.folder) if found.folder else found.dtype


def check(name: str | Path) -> None:
    """UsageError where `find` refuses."""
    try:
        find(name)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _nowhere(name: str, known: str | None, place: str) -> str:
    if known:
        lacking = f"the folder {place}, which is not there" if place else "no folder"
        return f"{name!r} names {lacking}; give {known}=FOLDER."
    left, equals, right = name.partition("=")
    if equals and Path(right).expanduser().is_dir():
        return f"{unknown('catalogue model', left, CATALOGUE)} NAME=FOLDER says which catalogue model the folder holds."
    return (
        f"{unknown('model', name, CATALOGUE)} There is no local folder of this name either; a Hub id, "
        "OWNER/NAME, works as well."
    )


def _check_shape(model: Model, found: folders.Shape, folder: Path) -> None:
    for what in ("blocks", "parameters"):
        wanted, there = getattr(model, what), getattr(found, what)
        if wanted is not None and wanted != there:
            raise ValueError(
                f"{folder} is not {model.name}: it has {there:,} {what} and {model.name} has {wanted:,}; name "
                f"the model that it holds, or give --model {folder} to run it as a model of its own."
            )


def without_weights(name: str | Path) -> Any:
    """The model on the meta device; ValueError where its configuration cannot be had."""
    found = find(name)
    if found.package or found.folder:
        return folders.without_weights(found.folder or converted(str(found.package)))
    return folders.without_weights(hub.configuration(str(found.hub), commit(name) or MAIN))


def positions(name: str | Path) -> int:
    """The context length of a model in tokens; UsageError where its folder does not tell."""
    model = find(name)
    if model.positions is None:
        raise UsageError(
            f"{name} gives no context length, which windows of the full context length need; set "
            "max_position_embeddings in its config.json."
        )
    return model.positions


def identity(name: str | Path) -> dict[str, str]:
    """What tells this model's weights from any other's, as plain JSON: a folder's fingerprint (and which
    of the catalogue it is said to be), a package's version (of one in parts, the digest of the whole) or a Hub commit.

    Where no commit can be known (never downloaded, and the Hub does not answer) the name of the revision stands in its
    place, and `load` refuses.
    """
    model = find(name)
    if model.folder:
        known, _ = catalogue.split(name)
        return {"fingerprint": fingerprint(model.folder), **({"catalogue": known} if known else {})}
    if model.package:
        return {"package": model.package, **wheels.identity(model.package)}
    return {"hub": str(model.hub), "revision": commit(name) or MAIN}


def commit(name: str | Path) -> str | None:
    """The Hub commit that `load` loads; None where it cannot be known, and for models that are not from the Hub."""
    model = find(name)
    return hub.model_commit(model.hub, model.revision or MAIN) if model.hub else None


def load(
    name: str | Path,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    weights: str = "device",
    work: Path | None = None,
    mark: str = "",
) -> tuple[Any, Any]:
    """The model in evaluation mode, on `device` (CPU by default), and its tokenizer.

    `weights` says where they are: on the `device`, in CPU memory (host), from where they come there block by block, or
    on the disk, where changes go to the folder `work` with `mark` (see `opened`).  `dtype` is a torch dtype or
    its name; None takes the catalogue's, or for a folder the one it was saved in.
    Raises ValueError for weights that are missing, left over or damaged, OSError if the Hub refuses.
    """
    from transformers import AutoModelForCausalLM

    from pruners.weights import opening

    found = find(name)
    source = found.folder or (converted(found.package) if found.package else str(found.hub))
    options: dict[str, Any] = {"revision": _commit_to_load(found) if found.hub else MAIN, "trust_remote_code": False}
    with nullcontext() if found.hub else quiet():
        try:
            tokenizer = _tokenizer(found, source, options)
            kind: Any = _dtype(dtype or found.dtype)
            if weights == "disk":
                folder = hub.downloaded(found.hub, options["revision"]) if found.hub else Path(source)
                loaded: Any = opening.opened(folder, dtype=kind, device=device, work=work, mark=mark)
            else:
                loaded = AutoModelForCausalLM.from_pretrained(
                    source,
                    dtype=kind,
                    device_map={"": device} if device is not None and weights == "device" else None,
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
    if weights == "host":
        homes.settle(model, sources.Memory(model), device or "cpu")
    return model.eval(), tokenizer


def _tokenizer(model: Model, source: str | Path, options: dict[str, Any]) -> Any:
    if model.folder and not any(path for pattern in TOKENIZER_FILES for path in model.folder.glob(pattern)):
        raise ValueError(  # transformers would take an empty one for some families
            f"{model.folder} has no tokenizer (e.g. tokenizer.json or tokenizer.model); save its model's "
            "tokenizer there: AutoTokenizer.from_pretrained(NAME).save_pretrained(FOLDER)."
        )
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        if model.hub and isinstance(error, OSError):
            raise
        raise ValueError(
            f"The tokenizer files of {model.folder or model.name} are damaged or of another version "
            f"({folders.reason(error)}); save those of its model there again."
        ) from error


def _commit_to_load(model: Model) -> str:
    if (known := commit(model.name)) is not None:
        return known
    raise OSError(
        f"{model.name} means {model.hub} at {model.revision or MAIN}, and its commit is unknown: it was never "
        "downloaded and the Hub does not answer. Check the connection, or name a local folder with "
        "safetensors weights instead."
    )


def _dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    known = (*folders.DTYPES, "auto")
    if isinstance(dtype, str) and dtype not in known:
        raise ValueError(unknown("dtype", dtype, known))
    return dtype if isinstance(dtype, torch.dtype) or dtype == "auto" else getattr(torch, dtype)


def _check_complete(model: Model, info: dict[str, Any]) -> None:
    """A weight that is missing would be random and one that is left over ignored: the number would look fine."""
    surplus = {key for key in info["unexpected_keys"] if key.endswith((".weight", ".bias"))}
    misfits = {key for key, *_ in info["mismatched_keys"]}
    wrong = {"missing": info["missing_keys"], "unexpected": surplus, "of another shape": misfits}
    for verdict, keys in wrong.items():
        if keys:
            raise ValueError(
                f"{model.name} does not fit its own config.json: {len(keys)} weights are {verdict}, e.g. "
                f"{min(keys)}; it was structurally pruned, edited, or not saved completely."
            )


def _refused(model: Model, error: OSError) -> str:
    if model.hub is None:
        return f"{model.name} could not be loaded: {error}"
    reason = shorten(str(error) or type(error).__name__, 200)
    return (
        f"{model.name} ({model.hub}) could not be downloaded from the Hub: {reason} Check the connection, "
        "accept the licence on "
        f"the model's page if it has to be accepted ({model.licence}) and run `hf auth login`, or name a "
        "local folder with "
        "safetensors weights instead."
    )
