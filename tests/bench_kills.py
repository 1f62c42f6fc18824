"""Kills cells whose weights are on the disk, with -9 at random moments, and looks at what the next process does again.

    python -m tests.bench_kills                      ten kills each of Wanda, SparseGPT and GBLM, some five minutes
    python -m tests.bench_kills sparsegpt --kills 50

A cell is killed while its blocks are pruned (slowly), until it has ended, and begun anew until it was killed so often.
Every record is to equal that of an undisturbed run; no block whose file was whole is to be
pruned again, and of the others one at most had been begun.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

import pruners
from experiments import cells
from experiments.batch import run_table
from experiments.settings import Settings
from experiments.spec import Run
from experiments.store import records
from pruners import unstructured
from tests import small_table as small

SLOWLY = 0.1  # seconds more for projections that share an input, of which a block has four
METHODS = {"wanda": pruners.Wanda(0.5), "sparsegpt": pruners.SparseGPT(0.5), "gblm": pruners.GBLM(0.5)}


def cell(name: str, root: Path, data: Path, log: Path, ready: Any) -> None:
    """Run it; every block that begins to be pruned is a line of `log`, with the seconds since it was begun."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    remove: Callable[..., None] = getattr(type(METHODS[name]), "remove", unstructured.Unstructured.remove)
    begun: set[str] = set()

    def told(self: Any, linears: Mapping[str, Any], *rest: Any) -> None:
        for block in {".".join(linear.split(".")[:3]) for linear in linears} - begun:
            begun.add(block)
            os.write(file, f"{block} {time.monotonic() - since}\n".encode())
        time.sleep(SLOWLY)
        remove(self, linears, *rest)

    type(METHODS[name]).remove = told  # type: ignore[method-assign]
    run = Run(str(small.MODEL), METHODS[name], small.WINDOWS, (small.PPL,))
    since = time.monotonic()
    ready.set()
    run_table("tiny", cells.cells([run]), Settings(root, data_dir=data, weights="disk"))


def started(name: str, root: Path, data: Path, log: Path) -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.small_table", "transformers.models.llama.modeling_llama", "eval.perplexity"])
    ready = context.Event()
    process = context.Process(target=cell, args=(name, root, data, log, ready))
    process.start()
    while process.is_alive() and not ready.wait(1):
        pass
    return process


def whole(root: Path) -> set[str]:
    """Blocks whose pruned weights are on the disk."""
    return {path.stem for path in root.rglob("weights/model.layers.*.safetensors")}


def lines(log: Path) -> list[str]:
    """The blocks."""
    return [line.split()[0] for line in log.read_text().splitlines()] if log.exists() else []


def result(root: Path) -> Any:
    found = list(records.load(root, "tiny").values())
    return [(r.id, r.spec, r.achieved, r.measures, r.data) for r in found]


def killed(name: str, kills: int, data: Path, place: Path, draw: random.Random) -> tuple[Any, ...]:
    place.mkdir()
    log, root = place / "log", place / "results"
    started(name, place / "undisturbed", data, log).join()
    expected = result(place / "undisturbed")
    times = [float(line.split()[1]) for line in log.read_text().splitlines()]
    block, blocks = (times[-1] - times[0]) / (len(times) - 1), len(times)
    log.unlink()
    done, finished_again, redone, ends, under_way = 0, 0, [], 0, 0
    while done < kills or not result(root):
        before, known = whole(root), len(lines(log))
        process = started(name, root, data, log)
        if done < kills:
            while process.is_alive() and len(lines(log)) == known:
                time.sleep(0.001)
            process.join(draw.uniform(0, block * (blocks - len(before))))
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
                done += 1
        process.join()
        now = lines(log)[known:]
        finished_again += len(before.intersection(now))
        if result(root):
            assert result(root) == expected, "another record than that of the undisturbed run"
            ends += 1
            if done < kills:
                shutil.rmtree(root)
            continue
        under_way += 0 < len(whole(root)) < blocks
        redone.append(len(set(now) - whole(root)))
    return name, block, done, under_way, ends, finished_again, max(redone, default=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="*", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if unknown := set(asked.methods) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}")
    draw, rows = random.Random(asked.seed), []
    with tempfile.TemporaryDirectory() as temporary:
        data = small.data(Path(temporary) / "data")
        for name in asked.methods or METHODS:
            rows.append(killed(name, asked.kills, data, Path(temporary) / name, draw))
            print(tabulate([rows[-1]], tablefmt="plain"), flush=True)
    heads = ("method", "s a block", "kills", "amid blocks", "ends", "whole blocks pruned again", "most blocks redone")
    print(tabulate(rows, heads, floatfmt=".2f"))


if __name__ == "__main__":
    sys.exit(main())
