"""One sentence for an unknown name, with the nearest known ones."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

FEW = 25  # names that a sentence can list


def unknown(kind: str, asked: str, known: Iterable[str]) -> str:
    """E.g. `Unknown method 'wnda'. Did you mean wanda? Known: gblm, magnitude, wanda.`

    Of many names only the nearest are said.
    """
    names = sorted(known)
    near = get_close_matches(str(asked), names, n=3, cutoff=0.5 if len(names) <= FEW else 0.0)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"Unknown {kind} {asked!r}.{hint}" + (f" Known: {', '.join(names)}." if len(names) <= FEW else "")
