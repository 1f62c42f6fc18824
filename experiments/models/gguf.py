"""The embedded model, converted once from a wheel's GGUF file to a safetensors folder in the user's cache.

The folder is written beside its place and renamed under a lock, so an interrupted conversion leaves nothing behind
that is ever read, and two processes never convert at once.  `sizes.json` in it lists the bytes of every file; a
folder that disagrees with its list is converted anew.
"""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from tempfile import mkdtemp

from filelock import FileLock
from platformdirs import user_cache_path

from experiments.data import wheels

SIZES = "sizes.json"


def converted(package: str) -> Path:
    """The safetensors folder of the model in `package`, in float32; about 20 seconds the first time.

    It lies under XDG_CACHE_HOME (540 MB for SmolLM2-135M).  Raises OSError if it cannot be written there.
    """
    target = user_cache_path("pruning-tables") / f"{package}-{wheels.version(package)}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not is_complete(target):
                _replace(target, wheels.file(package, ".gguf"))
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise OSError(
            f"The embedded model cannot be written to {target} ({error.strerror or error}); free about 1.1 GB there, "
            "or set XDG_CACHE_HOME to a folder that is writable."
        ) from error
    return target


def is_complete(folder: Path) -> bool:
    """Whether every file of the folder has the size that its list states."""
    try:
        sizes = json.loads((folder / SIZES).read_text())
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def _replace(target: Path, gguf: Path) -> None:
    state = "is damaged and is converted again" if target.exists() else "is converted to safetensors once"
    print(f"The embedded model {gguf.stem} {state} (about 20 s), into {target}", file=sys.stderr)
    for stale in target.parent.glob(f"{target.name}.partial-*"):
        shutil.rmtree(stale)
    beside = Path(mkdtemp(prefix=f"{target.name}.partial-", dir=target.parent))
    try:
        _convert(gguf, beside)
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / SIZES).write_text(json.dumps(sizes, indent=1))


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
