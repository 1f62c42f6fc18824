"""One sentence for an unknown name, with the nearest known ones."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

FEW = 25  # names that a sentence can list
NEAR = 0.6  # the share of letters in common below which a name is no suggestion


class UsageError(LookupError, ValueError):
    """What was asked for is unknown, or means nothing here; the message says what would do.

    A class of its own, so that no KeyError of a faulty program passes for one.
    """


def unknown(kind: str, asked: str, known: Iterable[str]) -> str:
    """E.g. `Unknown method 'wnda'. Did you mean wanda? Known: gblm, magnitude, wanda.`

    Of many names those that are near are said alone, or, where none is, how many there are.
    """
    names = sorted(known)
    near = get_close_matches(str(asked), names, n=3, cutoff=NEAR)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    if len(names) <= FEW:
        return f"Unknown {kind} {asked!r}.{hint} Known: {', '.join(names) or 'none'}."
    return f"Unknown {kind} {asked!r}." + (hint or f" None of the {len(names)} known is called alike.")
