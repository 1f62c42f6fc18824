"""Python as a cluster's jobs start it in the tests: with a tiny table, and pauses in which something happens to it.

A profile's `python` is "python tests/slurm_driver.py"; what follows is submitit's `-u -m submitit.core._submit FOLDER`.
"""

from __future__ import annotations

import inspect
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from experiments.store import blocks

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).parent)]
PAUSES, GREEDY = "TEST_PAUSES", "TEST_GREEDY_GB"


def prepare() -> None:
    """Called once torch is wanted, so that a job can be told to stop before."""
    import small_table as small

    import pruners
    from eval import perplexity
    from experiments import papers
    from pruners import retrain
    from pruners.retrain.schedule import Schedule
    from pruners.unstructured import Unstructured

    papers.TABLES |= {"tiny": small.table(), "retrained": small.retrained()}
    blocks.SECONDS_BETWEEN = 0.0
    inspect.unwrap(retrain.finetune).__kwdefaults__["save_every"] = 2
    for place, name in ((Unstructured, "remove"), (Schedule, "step"), (perplexity, "_nll")):
        setattr(place, name, pausing(name, getattr(place, name)))
    if gigabytes := int(os.environ.get(GREEDY, 0)):
        pruners.Magnitude.remove = lambda *_: eat(gigabytes)


def pausing(name: str, function: Callable) -> Callable:
    """In every life of a job the first line of the file TEST_PAUSES, "function count", says where it stops."""
    calls = []

    def paused(*arguments: Any) -> Any:
        calls.append(1)
        place = Path(os.environ.get(PAUSES, os.devnull))
        lines = place.read_text().splitlines()
        if lines and lines[0] == f"{name} {len(calls)}":
            place.write_text("\n".join(lines[1:]))
            time.sleep(600)
        return function(*arguments)

    return paused


def eat(gigabytes: int) -> None:
    held = []
    for _ in range(4 * gigabytes):
        held.append(bytearray(2**28))
        held[-1][::4096] = b"x" * len(held[-1][::4096])
        time.sleep(0.3)
    time.sleep(30)


if __name__ == "__main__":
    from submitit.core.submission import process_job

    from experiments import cli

    resolve = cli.resolve

    def with_the_table(asked):
        prepare()
        resolve(asked)

    cli.resolve = with_the_table
    process_job(sys.argv[-1])
