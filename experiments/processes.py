"""What the environment says of the processes of one launch, as torchrun sets it."""

from __future__ import annotations

import os

WAY_OUT = "start all of them with torchrun, or unset WORLD_SIZE for one process"


def count() -> int:
    """How many processes were launched together; ValueError for a WORLD_SIZE that is no such number."""
    return _number("WORLD_SIZE", "1", least=1)


def local_rank() -> int:
    """Which of the processes of this machine this is, from 0."""
    return _number("LOCAL_RANK", "0", least=0)


def _number(name: str, default: str, least: int) -> int:
    said = os.environ.get(name, default)
    if not said.isdecimal() or int(said) < least:
        raise ValueError(f"{name} is {said!r}, not a number from {least} on; {WAY_OUT}.")
    return int(said)
