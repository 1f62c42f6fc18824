"""One process of a job on several cards: python -m slurm.rank FILE, started by `slurm.launched` on each."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from pruners.run import ranks
from slurm.work import Work


def main(words: Sequence[str] | None = None) -> int:
    """The exit status; an error is one sentence, here and in the job's log of events."""
    (place,) = sys.argv[1:] if words is None else words
    work = _read(Path(place))

    def command(_: Namespace) -> int:
        try:
            work.here()
        except Exception as error:
            from experiments.errors import sentence

            lost = isinstance(error, ranks.RankLostError)
            work.log().write("rank failed", rank=ranks.rank(), lost=lost, message=sentence(error))
            raise
        return 0

    return cli.carry_out(Namespace(command=command, debug=False), "Stopped.")


def _read(place: Path) -> Work:
    told = json.loads(place.read_text(encoding="utf-8"))
    cells = {id: tuple(tables) for id, tables in told["cells"].items()}
    return Work(**{**told, "cells": cells})


if __name__ == "__main__":
    sys.exit(main())
