"""Options that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.cli.kinds import device, path, positive, word

RESULTS = Path("results")


def add_results(command: argparse.ArgumentParser) -> None:
    command.add_argument("--results", type=path, default=RESULTS, metavar="DIR", help="default: results")


def add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data-dir", type=path, metavar="DIR", help="local data sets (default: $PRUNING_DATA_DIR, otherwise the Hub)"
    )


def add_table(command: argparse.ArgumentParser) -> None:
    """A table, and what its cells are beyond what it declares."""
    command.add_argument("table", type=word, metavar="TABLE", help="of a paper, or FILE.py or FILE.py:NAME of your own")
    add_plugin(command)
    add_variant(command)


def add_variant(command: argparse.ArgumentParser) -> None:
    """The same tables on another model, in another number format, on fewer documents or more tasks."""
    command.add_argument(
        "--model",
        type=word,
        metavar="NAME|FOLDER|NAME=FOLDER",
        help="the same on another model; NAME=FOLDER: a folder that is that model of the catalogue",
    )
    command.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the model")
    command.add_argument(
        "--limit", type=positive, metavar="N", help="only the first N documents of each zero-shot task"
    )
    command.add_argument(
        "--tasks",
        nargs="+",
        type=word,
        default=[],
        metavar="NAME",
        help="additional zero-shot tasks: a task set, or tasks of lm-eval",
    )
    command.add_argument(
        "--rehearse",
        action="store_true",
        help="a few cells of every kind at toy scale, into results/rehearsal; their numbers mean nothing",
    )


def add_plugin(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--plugin", nargs="+", type=path, default=[], metavar="FILE", help="Python files with methods of your own"
    )


def add_running(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", type=device, help="cpu, cuda, cuda:1, ... (default: cuda where there is one)")
    command.add_argument(
        "--batch-size", type=positive, default=8, help="windows at once; changes no number (default: 8)"
    )
    command.add_argument(
        "--weights",
        choices=("device", "host", "disk", "auto"),
        default="auto",
        help="where weights are while they are not used: on the device, in CPU memory, on the disk, or by the room "
        "that there is; changes no number (default: auto)",
    )
    add_data(command)
    command.add_argument(
        "--again", action="store_true", help="make records again that other code of their method or measures made"
    )
    command.add_argument(
        "--no-dense-gate", action="store_true", help="prune even a model that misses its published dense perplexity"
    )
    command.add_argument(
        "--wandb",
        nargs="?",
        type=word,
        const="llm-pruning",
        metavar="PROJECT",
        help="log cells to Weights & Biases as well",
    )


def add_strict(command: argparse.ArgumentParser) -> None:
    command.add_argument("--strict", action="store_true", help="exit status 1 where cells are left out as too large")


def add_saving(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--save-models", type=path, metavar="DIR", help="keep the model of every cell that changes it, a folder each"
    )
