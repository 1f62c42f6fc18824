"""One sentence for an unknown name, with the nearest known ones."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, asked: str, known: Iterable[str]) -> str:
    """E.g. `Unknown method 'wnda'. Did you mean wanda? Known: gblm, magnitude, wanda.`"""
    names = sorted(known)
    near = get_close_matches(str(asked), names, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"Unknown {kind} {asked!r}.{hint} Known: {', '.join(names)}."
