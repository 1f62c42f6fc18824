"""Retrainings that one process and ranks of a launch do alike, for tests/test_sharded.py.

    python tests/sharded.py FOLDER

forks launches of four ranks and of two, which leave FOLDER/WORK.RANK.pt: what became of every job, as plain values and
tensors.  The last of four ranks dies in the middle of a training; one process and two ranks go on with others' states.
"""

from __future__ import annotations

import dataclasses
import io
import logging
import multiprocessing
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import families
import small_table as small
import torch
from conftest import hollow, tiny

import pruners
from experiments import batch, papers
from experiments.__main__ import main
from pruners.retrain import Diverged, LoRA, LoRAPrune, MaskLoRA, ScaleLoRA, Trainable, choose_rate, finetune, layouts
from pruners.run import ranks
from pruners.unstructured import Unstructured
from pruners.weights import homes, sources

STEPS = 20


@dataclass
class Job:
    """A pruned model and what is trained of it."""

    made: Callable[[], Any]
    trainable: Trainable
    settings: dict[str, Any] = field(default_factory=dict)
    words: bool = False  # records of several lengths with labels, not windows
    away: bool = False  # weights come from CPU memory block by block

    def model(self) -> Any:
        model = self.made()
        pruners.prune(model, pruners.Magnitude(sparsity=0.5))
        if self.away:
            homes.settle(model, sources.Memory(model), "cpu")
        return model

    def run(self, **more: Any) -> tuple[Any, Any]:
        model, settings = self.model(), {"steps": STEPS, "learning_rate": 1e-3, "batch_size": 4} | self.settings | more
        report = finetune(model, self.trainable, records() if self.words else windows(), **settings)
        if self.away:
            homes.of(model).leave()
        return model, report


def windows() -> torch.Tensor:
    return torch.randint(3, 96, (12, 16), generator=torch.Generator().manual_seed(1))


def records() -> list[dict[str, Any]]:
    lengths = (16, 3, 9, 16, 5, 12, 4, 7)
    rows = [{"input_ids": row[:length].tolist()} for row, length in zip(windows(), lengths, strict=False)]
    return [{**row, "labels": [-100, *row["input_ids"][1:]]} for row in rows]


def dry(kind: str) -> Any:
    """A model that drops out nothing: its micro-batches may be of any size."""
    model: Any = tiny(kind)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


ONE, FEW = {"micro_batch_size": 1}, {"steps": 6}
BEST = {"held_out": torch.randint(3, 96, (5, 16), generator=torch.Generator().manual_seed(9)), "check_every": 2}
LLAMA = partial(tiny, "llama multi-head")
JOBS = {
    "all weights": Job(partial(tiny, "llama grouped-query"), Trainable.full()),
    "all weights, blocks recomputed": Job(
        partial(dry, "opt"), Trainable.full(), FEW | {"checkpointing": True}, words=True
    ),
    "all weights of experts": Job(partial(families.tiny, "mixtral"), Trainable.full(), FEW),
    "biases and norms": Job(partial(tiny, "opt"), Trainable(biases=True, norms=True), ONE, words=True),
    "MaskLoRA, norms and head": Job(partial(dry, "opt"), Trainable(norms=True, head=True, adapters=MaskLoRA(rank=3))),
    "ScaleLoRA": Job(LLAMA, Trainable(adapters=ScaleLoRA(rank=4)), FEW),
    "LoRA-Prune by reference": Job(
        partial(dry, "opt"),
        Trainable(adapters=LoRAPrune(rank=4)),
        {"reference": True, "micro_batch_size": 2},
        words=True,
    ),
    "LoRA that stays": Job(LLAMA, Trainable(adapters=LoRA(rank=4)), ONE | FEW),
    "a block without heads": Job(partial(hollow, "llama multi-head", "nothing"), Trainable.full(), FEW),
    "the best of the steps": Job(
        LLAMA,
        Trainable.full(),
        ONE | FEW | BEST | {"learning_rate": 0.05, "warmup": 0},
    ),
    "bfloat16": Job(lambda: LLAMA().bfloat16(), Trainable.full(), ONE | FEW),
}
STREAMED = Job(partial(dry, "opt"), Trainable(norms=True, adapters=MaskLoRA(rank=3)), FEW, words=True, away=True)
PAIRS = Job(partial(dry, "opt"), Trainable.full(), FEW | {"batch_size": 2}, words=True)
RESUMED = Job(partial(tiny, "llama grouped-query"), Trainable.full(), {"save_every": 5, "learning_rate": 5e-3} | BEST)


def told(model: Any, report: Any) -> dict[str, Any]:
    names = ("losses", "sparsity", "merging", "lost_by_merging", "untied", "checked", "kept_step")
    about = {name: getattr(report, name) for name in names}
    plain = all(type(p) is torch.nn.Parameter for p in model.parameters())
    return {**about, "state": model.state_dict(), "plain": plain, "kind": type(model).__name__}


def diverged() -> str:
    try:
        JOBS["all weights"].run(learning_rate=1e6, warmup=0)
    except Diverged as error:
        return str(error)
    return ""


def chosen() -> Any:
    job = JOBS["biases and norms"]
    model = job.model()

    def attempt(rate: float) -> None:
        finetune(model, job.trainable, windows(), steps=4, learning_rate=rate, batch_size=4, micro_batch_size=1)

    choice = choose_rate(model, attempt, (1e-4, 1e-2), records(), batch_size=3)
    return choice.to_dict(), model.state_dict()


def sizes() -> dict[str, Any]:
    """Numbers that this rank keeps of a model that is all trained, and of one with adapters."""
    kept: dict[str, Any] = {}
    for name in ("all weights", "MaskLoRA, norms and head"):
        model = JOBS[name].model()
        attached = JOBS[name].trainable.attach(model, spread=True)
        whole = {name: p.numel() for name, p in attached.tensors.items()}
        lengths = {name: len(p) for name, p in attached.tensors.items()}
        every = list(model.parameters())
        layout = layouts.Sharded(attached, ranks.here())
        held = [p.to_local().numel() for p in layout.model.parameters()]
        kept[name] = {
            "trained": {name: p.numel() for name, p in layout.tensors.items()},
            "whole": whole,
            "lengths": lengths,
            "held": sum(held),
            "all": sum(p.numel() for p in every),
            "left": sum(p.untyped_storage().nbytes() for p in every),
            "count": len(every),
            "masks": sum(mask.bits.numel() for mask in (layout._masks | attached.masks).values()),
        }
    return kept


def refused(work: Callable[[], Any]) -> str:
    try:
        work()
    except (ValueError, ConnectionError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def four(here: ranks.Ranks, folder: Path) -> Iterator[tuple[str, Any]]:
    yield from ((name, told(*JOBS[name].run())) for name in ("all weights", "MaskLoRA, norms and head"))
    yield "more than examples", told(*PAIRS.run())
    yield "sizes", sizes()

    def dying(step: int, _: int) -> None:
        if step == 13 and here.rank == here.count - 1:
            os._exit(1)

    yield "lost", refused(lambda: RESUMED.run(folder=folder / "of four", progress=dying))


def two(here: ranks.Ranks, folder: Path) -> Iterator[tuple[str, Any]]:
    yield from ((name, told(*job.run())) for name, job in JOBS.items())
    yield from (("diverged", diverged()), ("chosen", chosen()), ("sizes", sizes()))
    yield "uneven", refused(lambda: RESUMED.run(batch_size=3))
    yield "other", refused(lambda: RESUMED.run(seed=here.rank))
    for begun in ("of four", "of one"):
        yield begun, told(*RESUMED.run(folder=folder / begun, stop=15))
    yield "streamed", told(*STREAMED.run(folder=folder / "streamed"))
    foreign = dataclasses.replace(RESUMED, settings={"learning_rate": 1e-4})
    yield "foreign", refused(lambda: foreign.run(folder=folder / "of one"))
    damaged(folder / "of two", here)
    yield "damaged", told(*RESUMED.run(folder=folder / "of two", stop=5))


def damaged(folder: Path, here: ranks.Ranks) -> None:
    """A state of two ranks, of which the second one's rows are not what was written."""
    RESUMED.run(folder=folder, stop=5)
    if here.rank == 0:
        path = folder / "retrain.5.2-of-2.safetensors"
        path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0@")
    here.wait()


def one(here: ranks.Ranks, folder: Path) -> Iterator[tuple[str, Any]]:
    yield "begun", told(*RESUMED.run(folder=folder / "of one", stop=10))


def hung(here: ranks.Ranks, folder: Path) -> Iterator[tuple[str, Any]]:
    if here.rank:
        yield "waited", TOLD.wait(60)
    else:
        yield "hung", refused(RESUMED.run)
        TOLD.set()


def hung_table(here: ranks.Ranks, folder: Path) -> Iterator[tuple[str, Any]]:
    """What each rank says, and its exit status, where rank 1 of three comes no further in a cell of a table."""
    assert batch  # loaded before the fork
    papers.TABLES["tiny"] = small.table()
    os.environ[ranks.LOG] = "the.log"
    if here.rank == 1:
        Unstructured.remove = lambda *_: TOLD.wait(60)  # type: ignore[method-assign]
    elif here.rank == 0:
        small.data(folder / "data")
    here.wait()
    words = ["run", "tiny", "--only", "Dense", "Wanda 50 %", "--device", "cpu", "--results", str(folder / "results")]
    with redirect_stderr(io.StringIO()) as said:
        status = main([*words, "--data-dir", str(folder / "data")])
    TOLD.set()
    yield "status", status
    yield "said", said.getvalue().splitlines()


def rank(work: Any, number: int, count: int, port: int, folder: Path) -> None:
    logging.disable()
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    here, answers = ranks.here(patience=timedelta(seconds=3 if work in (hung, hung_table) else 300)), {}
    for name, answer in work(here, folder):
        answers[name] = answer
        torch.save(answers, folder / f"{work.__name__}.{number}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    fork = multiprocessing.get_context("fork")  # one process that has loaded torch is enough
    table = [(hung_table, 3)] if small.MODEL.is_dir() else []  # whose cells are of that model
    for work, count in ((four, 4), (one, 1), (two, 2), (hung, 2), *table):
        TOLD = fork.Event()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        together = [fork.Process(target=rank, args=(work, number, count, port, folder)) for number in range(count)]
        for process in together:
            process.start()
        for process in together:
            process.join()
        if count == 4:
            shutil.copytree(folder / "of four", folder / "as four left it")
