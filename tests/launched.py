"""What ranks of a launch do together, for tests/test_together.py: a few measures by themselves, then a small table.

    torchrun --nproc-per-node 2 tests/launched.py FOLDER run retrained --results DIR --data-dir DIR [--lose RANK STEP]

Every rank leaves what it found in FOLDER/RANK.json.  With --lose, there is only the table, and that rank runs out of
memory at that step.  Without further words, there is no table.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import small_table as small
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import pruners
from experiments import papers
from experiments.__main__ import main
from experiments.models.gguf import quiet
from experiments.rates import RateGrid, Tuning
from experiments.recovery import Retraining
from experiments.spec import Generation, Table, Windows
from pruners.retrain import MaskLoRA, Trainable
from pruners.retrain.schedule import Schedule
from pruners.run import ranks

NORMS = Retraining(Trainable(norms=True), small.WINDOWS, steps=6, learning_rate=1e-3, batch_size=4)
GRID = RateGrid((1e-3, 1e-2), Windows("c4/train", 4, 32, seed=7))
TUNING = Tuning(GRID, pruners.Magnitude(sparsity=0.5), table="retrained.rates")
ROWS: tuple[tuple[Any, Any, Tuning | None], ...] = (
    (pruners.Wanda(sparsity=0.5), replace(NORMS, trainable=Trainable(adapters=MaskLoRA(rank=1000))), None),  # fails
    (pruners.Flap(ratio=0.25), NORMS, None),
    (pruners.Magnitude(sparsity=0.5), NORMS, TUNING),
    (pruners.GBLM(sparsity=0.5), None, None),
    (None, None, None),
)


def table() -> Table:
    plain, measures = small.table(ROWS, "retrained"), (small.PPL, Generation(new_tokens=4))
    return replace(
        plain,
        run=lambda row, model: replace(
            small.table(measures=measures).run(row[0], model), recovery=row[1], tuning=row[2]
        ),
    )


def found(folder: Path, names: Collection[str]) -> dict[str, Any]:
    """By name what ranks make together, or one process alone; plain JSON values."""
    made = {name: work(folder) for name, work in WORKS.items() if name in names}
    return json.loads(json.dumps(made))


@cache
def _loaded() -> tuple[Any, Any]:
    with quiet():
        return AutoModelForCausalLM.from_pretrained(small.MODEL).eval(), AutoTokenizer.from_pretrained(small.MODEL)


def _stories() -> tuple[Any, Any]:
    model, tokenizer = _loaded()
    return copy.deepcopy(model), tokenizer


def _perplexity(folder: Path) -> Any:
    from eval.perplexity import perplexity

    tokens = torch.randint(3, 500, (9 * 32 + 5,), generator=torch.Generator().manual_seed(2))
    steps: list[tuple[int, int]] = []
    result = perplexity(_stories()[0], tokens, 32, batch_size=2, progress=lambda *step: steps.append(step))
    assert steps[-1] == (9, 9) or ranks.here().rank
    return [result.perplexity, result.nll_per_window]


def _written(folder: Path) -> Any:
    from eval.generation import generate
    from eval.greedy import greedy

    model, tokenizer = _stories()
    return [
        greedy(model, tokenizer, ("One day", "She saw a", "The end"), new_tokens=5),
        [continuation.to_dict() for continuation in generate(model, tokenizer, ("One day", "They"), new_tokens=5)],
    ]


def _zero_shot(folder: Path) -> Any:
    """Scores, and how many batches a model is asked for the second time: none, as the file is for all ranks."""
    from eval.zero_shot import zero_shot
    from experiments.data import eval_tasks

    model, tokenizer = _stories()
    tasks = {task: eval_tasks.changes(task, small.SHARED / "data") for task in ("piqa",)}
    asked = {"limit": 5, "batch_size": 2, "resume": folder / "answers"}
    first, calls = zero_shot(model, tokenizer, tasks, **asked), []
    model.register_forward_hook(lambda *_: calls.append(1))
    again = zero_shot(model, tokenizer, tasks, **asked)
    assert again.samples == first.samples
    return [first.samples, {name: score.metrics for name, score in first.tasks.items()}, len(calls)]


def _masks(method: Any) -> Callable[[Path], Any]:
    """A digest of every weight after pruning on windows that no number of ranks divides."""

    def made(folder: Path) -> Any:
        model = _stories()[0]
        windows = torch.randint(3, 500, (11, 24), generator=torch.Generator().manual_seed(3))
        pruners.prune(model, method, windows, batch_size=2)
        state = sorted(model.state_dict().items())
        return hashlib.sha256(b"".join(tensor.numpy().tobytes() for _, tensor in state)).hexdigest()

    return made


def _told(folder: Path) -> Any:
    """What goes wrong on one rank is told on all; a rank alone has no other."""
    together, said = ranks.here(), []

    def fails(rank: int) -> Any:
        if together.rank == rank:
            raise FileNotFoundError(f"Rank {rank} does not find it.")
        return together.rank

    for work in (lambda: together.first(lambda: fails(0)), lambda: together.each(lambda: fails(together.count - 1))):
        try:
            work()
        except FileNotFoundError as error:
            said.append(str(error).replace(str(together.count - 1), "LAST"))
    assert together.each(lambda: together.rank) == list(range(together.count))
    return len(said)


METHODS = (
    pruners.Wanda(sparsity=0.5),
    pruners.SparseGPT(sparsity=0.5),
    pruners.Flap(ratio=0.25),
    pruners.Flap(ratio=0.25, reference=False, metric="WIFN"),
    pruners.GBLM(sparsity=0.5),
    pruners.GBLM(sparsity=0.5, norm="l2"),
)
WORKS: dict[str, Callable[[Path], Any]] = {
    "perplexity": _perplexity,
    "written": _written,
    "zero-shot": _zero_shot,
    "told": _told,
    **{repr(method): _masks(method) for method in METHODS},
}


FEWER = WORKS.keys() - {"zero-shot", "written"}  # what every rank loads for these takes longer than they do


def lose(rank: int, step: int) -> None:
    """That process runs out of memory in its so-many-th step of training."""
    own = Schedule.step

    def failing(self: Schedule, optimizer: Any, number: int) -> None:
        if os.environ["RANK"] == str(rank) and number == step:
            raise MemoryError
        own(self, optimizer, number)

    Schedule.step = failing  # type: ignore[method-assign]


if __name__ == "__main__":
    place, *words = sys.argv[1:]
    papers.TABLES["retrained"] = table()
    if "--lose" in words:
        at = words.index("--lose")
        ranks.ERROR_PATIENCE /= 10
        lose(*map(int, words[at + 1 : at + 3]))
        del words[at : at + 3]
    else:
        Path(place, f"{os.environ['RANK']}.json").write_text(json.dumps(found(Path(place), WORKS if words else FEWER)))
    sys.exit(main(words) if words else ranks.leave())
