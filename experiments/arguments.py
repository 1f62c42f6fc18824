"""What `python -m experiments run` can be told, for every command line that runs cells; and what was meant by it."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.cells import Cell
    from experiments.run import Settings
    from experiments.watchers import Watcher


EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
RESULTS = Path("results")


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


def carry_out(asked: argparse.Namespace, stopped: str) -> int:
    """Run the asked command and return its exit status; an error becomes one sentence.

    0 all well, 1 something failed, 2 asked for something unknown; 130 interrupted and 143 terminated, for which
    `stopped` is said.
    """
    try:  # commands import what they need: torch takes seconds, and --help should not
        with _terminable():
            return int(asked.command(asked) or 0)
    except KeyboardInterrupt as error:
        say(stopped)
        return EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  (the one place where an error becomes a sentence and an exit status)
        from experiments.failures import sentence

        if asked.debug:
            traceback.print_exc()
        say(sentence(error))
        return EXIT_USAGE if isinstance(error, LookupError) else EXIT_FAILED


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises Terminated meanwhile; not under torchrun, which ends processes by it that wait for lost ones."""
    if "RANK" in os.environ:
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(*_: Any) -> None:
    raise Terminated


def say(sentence: str) -> None:
    """To the user, naming the process where several were launched together."""
    rank = os.environ.get("RANK", "0")
    print(f"Process {rank}: {sentence}" if rank != "0" else sentence, file=sys.stderr)


def add_selection(command: argparse.ArgumentParser) -> None:
    """Which cells of which table, and where their records lie."""
    add_table(command)
    command.add_argument("--method", nargs="+", default=[], metavar="NAME", help="only these methods (or: dense)")
    command.add_argument("--only", nargs="+", default=[], metavar="ID|LABEL", help="only these cells")
    command.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="default: results")


def add_table(command: argparse.ArgumentParser) -> None:
    """A table, and what its cells are beyond what it declares."""
    command.add_argument("table", metavar="TABLE")
    command.add_argument("--model", metavar="NAME|FOLDER", help="the same table on another model")
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="number format of the model")
    command.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N documents of each zero-shot task"
    )
    command.add_argument(
        "--tasks", nargs="+", default=[], metavar="NAME", help="measure these, too: a convention or tasks of lm-eval"
    )


def same_cells(asked: argparse.Namespace) -> str:
    """The arguments by which `python -m analysis` finds the cells of this command again, its table first."""
    told = {"--model": asked.model, "--dtype": asked.dtype, "--limit": asked.limit}
    options = [word for name, value in told.items() if value for word in (name, str(value))]
    tasks = ["--tasks", *asked.tasks] if asked.tasks else []
    return shlex.join([asked.table, *options, *tasks, *_results(asked.results)])


def same_table(asked: argparse.Namespace) -> str:
    """The arguments by which another command finds the table's records."""
    return shlex.join([asked.table, *_results(asked.results)])


def _results(folder: Path) -> list[str]:
    return [] if folder.resolve() == RESULTS.resolve() else ["--results", str(folder)]


def add_running(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    command.add_argument(
        "--batch-size", type=positive, default=8, help="windows at once; changes no number (default: 8)"
    )
    command.add_argument(
        "--data-dir", type=Path, help="local data sets (default: $PRUNING_DATA_DIR, otherwise the Hub)"
    )
    command.add_argument(
        "--no-dense-gate", action="store_true", help="prune even a model that misses its published dense perplexity"
    )
    command.add_argument(
        "--wandb", nargs="?", const="llm-pruning", metavar="PROJECT", help="log cells to Weights & Biases as well"
    )


def chosen(asked: argparse.Namespace) -> list[Cell]:
    from experiments import cells, tables

    table = tables.find(asked.table)
    if table.missing:
        raise ValueError(f"{table.name} cannot run yet. It needs {table.missing}.")
    _refuse_absent(asked.data_dir)
    _refuse_unknown(asked.tasks)
    runs = tables.runs(table, asked.model, asked.dtype, asked.limit, asked.tasks)
    return cells.choose(cells.cells(runs, table.label), asked.method, asked.only)


def settings(asked: argparse.Namespace) -> Settings:
    from experiments.run import Settings

    return Settings(asked.results, asked.device, asked.batch_size, asked.data_dir, not asked.no_dense_gate)


def watchers(asked: argparse.Namespace) -> list[Watcher]:
    if asked.wandb is None:
        return []
    from experiments.tracking import Wandb  # wandb takes a second to import

    return [Wandb(asked.wandb, asked.table, asked.results)]


def _refuse_absent(data_dir: Path | None) -> None:
    """LookupError for a data folder that is not there, before every cell would meet that."""
    from experiments import accuracy, sources

    folder = accuracy.folder(data_dir)
    if folder and not folder.is_dir():
        name = "--data-dir" if data_dir else sources.DATA_DIR
        raise LookupError(f"{name} {folder} is no folder; name one that is, or leave it out to read from the Hub.")


def _refuse_unknown(tasks: list[str]) -> None:
    """LookupError with the nearest names, before any work; lm-eval's index is read only for names that it may know."""
    from experiments import protocols, task_data

    if unfamiliar := [name for name in tasks if name not in protocols.CONVENTIONS and name not in task_data.SOURCES]:
        from eval.tasks import check_names

        check_names(unfamiliar)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(text)
