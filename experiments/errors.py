"""One sentence for any error, and advice where memory ran out."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from experiments.store import modules
from experiments.store.redaction import redacted

OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")
LAST_LINES = 12
FAULTS = (  # of a program: whoever complains of what was asked raises a ValueError or an OSError
    LookupError, AttributeError, TypeError, NameError, AssertionError, ArithmeticError, RecursionError
)  # fmt: skip
ROOT = Path(__file__).resolve().parents[1]


def sentence(error: BaseException) -> str:
    """What a user reads: the error's own first line, with its kind where that is not a plain complaint.

    A fault of the program is told with its place, so that nobody takes it for a complaint about what was asked.  No
    secret is in it.
    """
    if is_out_of_memory(error):
        return (
            "Out of memory: try a smaller --batch-size, --dtype bfloat16, another --device, or a table with fewer or "
            f"shorter calibration windows ({_first_line(error)})."
        )
    message = _first_line(error)
    if (isinstance(error, ValueError | OSError | ImportError) or _is_declared(error)) and " " in message:
        return message
    told = f"{type(error).__name__}: {message}"
    place = _place(error)
    return f"{told.rstrip('.')} ({place})" if place and is_fault(error) else told


def is_fault(error: BaseException) -> bool:
    """Whether the program is to blame."""
    return isinstance(error, FAULTS) and not (isinstance(error, ValueError | FloatingPointError) or _is_declared(error))


def _is_declared(error: BaseException) -> bool:
    """Of a class that this project has made for what may happen, such as training that diverges."""
    return modules.package(type(error).__module__) in modules.PACKAGES + modules.AROUND


def is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")  # who has not loaded it has not raised its error
    if isinstance(error, MemoryError) or (torch and isinstance(error, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error).lower() for phrase in OUT_OF_MEMORY)


def last_lines(error: BaseException) -> list[str]:
    """Of its traceback, without secrets."""
    lines = redacted("".join(traceback.format_exception(error))).splitlines()
    return lines[-LAST_LINES:]


def _first_line(error: BaseException) -> str:
    # str(KeyError("x")) would quote its message
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    lines = [line.strip() for line in redacted(text).splitlines() if line.strip()] or ["no message"]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # a heading says nothing by itself


def _place(error: BaseException) -> str:
    """The innermost line that it passed of a file of the user's own, or else of this project's; empty without one."""
    passed = traceback.extract_tb(error.__traceback__)
    own = {getattr(made, "__file__", "") for name, made in list(sys.modules.items()) if name.startswith("own_")}
    if theirs := [frame for frame in passed if frame.filename in own]:
        return f"raised by {theirs[-1].filename}, line {theirs[-1].lineno}"
    below = [frame for frame in passed if Path(frame.filename).is_relative_to(ROOT)]
    ours = [frame for frame in below if "site-packages" not in frame.filename]
    return f"this is a bug in {Path(ours[-1].filename).relative_to(ROOT)}, line {ours[-1].lineno}" if ours else ""
