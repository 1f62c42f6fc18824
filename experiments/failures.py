"""One sentence for any error, and advice where memory ran out."""

from __future__ import annotations

import traceback

import torch

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
LAST_LINES = 12


def sentence(error: BaseException) -> str:
    """What a user reads: the error's own first line, with its kind where that is not a plain complaint."""
    if is_out_of_memory(error):
        return (
            "Out of memory: try a smaller --batch-size, --dtype bfloat16, another --device, or a table with fewer or "
            f"shorter calibration windows ({_first_line(error)})."
        )
    message = _first_line(error)
    if isinstance(error, ValueError | LookupError | OSError | ImportError) and " " in message:
        return message
    return f"{type(error).__name__}: {message}"


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in OUT_OF_MEMORY)


def last_lines(error: BaseException) -> list[str]:
    lines = "".join(traceback.format_exception(error)).splitlines()
    return lines[-LAST_LINES:]


def _first_line(error: BaseException) -> str:
    # str(KeyError("x")) would quote its message
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = text.strip().splitlines()
    return lines[0] if lines else "no message"
