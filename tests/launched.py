"""The command line on small tables that are retrained, for processes that are launched together.

    torchrun --nproc-per-node 2 tests/launched.py run retrained --results DIR --data-dir DIR [--lose RANK STEP]

With --lose, that process runs out of memory at that step.  Process 1 loads its first model more slowly than an error of
the other is waited for.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import Any

import small_table as small

import pruners
from experiments import distributed, papers
from experiments.__main__ import main
from experiments.recovery import Retraining
from experiments.spec import Table
from pruners import checkpoint
from pruners.retrain import MaskLoRA, Trainable
from pruners.retrain.layouts import Sharded

NORMS = Retraining(Trainable(norms=True), small.WINDOWS, steps=8, learning_rate=1e-3)
ADAPTERS = replace(NORMS, trainable=Trainable(norms=True, adapters=MaskLoRA(rank=4)), batch_size=4)
ROWS = (
    (pruners.Wanda(sparsity=0.5), replace(NORMS, trainable=Trainable(adapters=MaskLoRA(rank=1000)))),  # fails
    (pruners.Wanda(sparsity=0.5), ADAPTERS),
    (pruners.Flap(ratio=0.25), NORMS),
    (None, None),
)


def table() -> Table:
    plain = small.table(ROWS, "retrained")
    return replace(plain, run=lambda row, model: replace(small.table().run(row[0], model), recovery=row[1]))


def lose(rank: int, step: int) -> None:
    """That process runs out of memory in its so-many-th step."""
    collect, steps = Sharded.collect, []

    def failing(self: Sharded, loss: Any) -> None:
        steps.append(1)
        if self.ranks.rank == rank and len(steps) == step:
            raise MemoryError
        collect(self, loss)

    Sharded.collect = failing  # type: ignore[method-assign]


def load_slowly(seconds: float) -> None:
    """The first model that this process loads to train along takes so long."""
    load = checkpoint.load

    def loading(*arguments: Any, **options: Any) -> Any:
        checkpoint.load = load
        time.sleep(seconds)
        return load(*arguments, **options)

    checkpoint.load = loading


if __name__ == "__main__":
    words = sys.argv[1:]
    papers.TABLES["retrained"] = table()
    distributed.PATIENCE_SECONDS = 3.0
    if os.environ["RANK"] == "1":
        load_slowly(4.0)
    if "--lose" in words:
        place = words.index("--lose")
        lose(*map(int, words[place + 1 : place + 3]))
        del words[place : place + 3]
    sys.exit(main(words))
