"""What tells the model in a folder from any other, without reading all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

SAMPLE_BYTES = 2**20


def weight_files(folder: Path) -> list[Path]:
    """ValueError where there is nothing in safetensors format."""
    weights = sorted(folder.glob("*.safetensors"))
    if weights:
        return weights
    pickled = sorted(path.name for ending in ("bin", "pt", "pth", "ckpt") for path in folder.glob(f"*.{ending}"))
    found = f"only pickled weights ({pickled[0]}), which can run code" if pickled else "none"
    raise ValueError(f"{folder} needs weights as *.safetensors and has {found}; save the model as safetensors there.")


def fingerprint(folder: Path) -> str:
    """SHA-256 of the configuration and tokenizer files and, of each weight file, of its name, size, first and last MiB.

    Enough to tell checkpoints apart and cheap for 130 GB, but no proof against tampering.  ValueError without weights.
    """
    digest = hashlib.sha256()
    for path in _small_files(folder):
        digest.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(size - SAMPLE_BYTES, 0))
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _small_files(folder: Path) -> Iterator[Path]:
    """The configuration and what makes tokens, both of which move a number as surely as weights do."""
    patterns = ("config.json", "tokenizer*", "*.model", "vocab*", "merges.txt", "special_tokens_map.json")
    yield from sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
