"""The identity of a model in a folder: digests of all its weights and of the small files beside them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments.models import digests

SMALL = (
    "config.json", "generation_config.json", "adapter_config.json", "*.safetensors.index.json", "tokenizer*", "*.model",
    "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a model folder, sorted, with those in its subfolders that its index names.

    Raises ValueError where there is nothing in safetensors format, where two sets of weights lie side by side or where
    the index names a file outside the folder, and FileNotFoundError for a shard that it names and that is not there.
    """
    from pruners.modeling_pruned import check_shards, indexed

    named = indexed(folder)
    if outside := [name for name in named if not _is_within(name)]:
        raise ValueError(
            f"The index in {folder} names {outside[0]!r} as a file of weights, which is none within the folder; put it "
            "there and name it so in model.safetensors.index.json."
        )
    check_shards(folder)
    weights = sorted(
        path for path in {*folder.glob("*.safetensors"), *(folder / name for name in named)} if path.is_file()
    )
    if weights:
        return weights
    pickled = sorted(path.name for ending in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{ending}"))
    found = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "none"
    raise ValueError(f"{folder} needs weights as *.safetensors and has {found}; save the model as safetensors there.")


def fingerprint(folder: Path, weights: Sequence[Path] | None = None) -> str:
    """SHA-256 of names and contents of the weight files and of what else moves a number: configuration and tokenizer.

    Two folders that differ in one byte of these have two fingerprints.  `weights` are the weight files where they are
    not those of `weight_files`, whose errors it raises.
    """
    paths = sorted({*_small_files(folder), *(weight_files(folder) if weights is None else weights)})
    lines = [f"{_name(path, folder)}\0{digest}\n" for path, digest in zip(paths, digests.all_of(paths), strict=True)]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _is_within(name: object) -> bool:
    return isinstance(name, str) and not os.path.isabs(name) and Path(os.path.normpath(name)).parts[:1] != ("..",)


def _name(path: Path, folder: Path) -> str:
    """As the index names it, where it lies in a subfolder."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name


def _small_files(folder: Path) -> Iterator[Path]:
    """The configuration and what makes tokens, both of which move a number as surely as weights do."""
    yield from (path for pattern in SMALL for path in folder.glob(pattern) if path.is_file())
