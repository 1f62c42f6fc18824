"""Types of command line arguments."""

from __future__ import annotations

import argparse
import math
import re
import unicodedata
from pathlib import Path

LARGEST_GB = 100_000
LARGEST = 10**9  # documents or windows: more than any data set has


def word(text: str) -> str:
    """A name that asks for something; an unset variable of a shell leaves it empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("empty value (an unset variable?); give one or leave the option out")
    if any(unicodedata.category(sign) in ("Cc", "Cs") for sign in text):  # other signs stand in names of folders
        raise argparse.ArgumentTypeError(f"{text!r} contains a control character, which names cannot have")
    return text


def path(text: str) -> Path:
    """A file or folder; `~` is the home folder also where a shell leaves it, as in `--results=~/x`."""
    try:
        return Path(word(text)).expanduser()
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} begins with a user who has no home folder here") from error


def device(text: str) -> str:
    """By its form alone: a job's machine may have what this one has not."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a device; use for example cpu, cuda or cuda:1")
    return text


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1)


def number(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or len(text) > len(str(LARGEST)) or not least <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{shorten(text)} is not a whole number from {least} to {LARGEST:,}")
    return int(text)


def shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def gigabytes(text: str) -> float:
    """More than nothing and finite: to Slurm no memory is all that a node has."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found <= LARGEST_GB:
        raise argparse.ArgumentTypeError(
            f"{shorten(text)} is not a number of gigabytes above 0 and up to {LARGEST_GB:,}"
        )
    return found
