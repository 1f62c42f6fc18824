"""Check pruning methods of your own.

python -m pruners check my_method.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from tabulate import tabulate

from pruners.families import FAMILIES
from pruners.interface import plugin
from pruners.interface.suggest import UsageError, unknown


def main(words: Sequence[str] | None = None) -> int:
    """The exit status: 0 where every promise is kept, 1 where one is broken, 2 for what cannot be tried."""
    top = argparse.ArgumentParser(prog="python -m pruners", description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    check = commands.add_parser(
        "check", help="check that the methods in a file meet the contract of every pruning method"
    )
    check.add_argument("file", metavar="FILE", help="a Python file that defines methods")
    check.add_argument(
        "--family",
        nargs="+",
        default=list(FAMILIES),
        metavar="NAME",
        help="decoder families to check on (default: all)",
    )
    asked = top.parse_args(words)
    try:
        return _check(asked.file, asked.family)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 2


def _check(file: str, families: Sequence[str]) -> int:
    from pruners.interface import contract

    for name in families:
        if name not in FAMILIES:
            raise UsageError(unknown("family", name, FAMILIES))
    found = plugin.methods(plugin.module(file))
    if not found:
        raise UsageError(plugin.NONE.format(file=file))
    broken = 0
    for kind in found:
        told = list(contract.check(kind, tuple(families)))
        promises = list(dict.fromkeys(one.promise for one in told))
        kept = {(one.family, one.promise): not one.broken for one in told}
        tried = list(dict.fromkeys(one.family for one in told))
        rows = [(family, *("yes" if kept[family, promise] else "NO" for promise in promises)) for family in tried]
        print(f"{kind.__name__}\n{tabulate(rows, ('family', *promises))}")
        for one in told:
            if one.broken:
                print(f"{one.family}, {one.promise}: {one.broken}")
        broken += sum(bool(one.broken) for one in told)
        print(f"{kind.__name__}: {len(told) - broken} of {len(told)} promises kept.")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
