"""Options that several commands share."""

from __future__ import annotations

import argparse
from pathlib import Path

from experiments.cli.kinds import device, path, positive, word

RESULTS = Path("results")


def add_results(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--results", type=path, default=RESULTS, metavar="DIR", help="results folder (default: results)"
    )


def add_data(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--data-dir",
        type=path,
        metavar="DIR",
        help="folder of local data sets (default: $PRUNING_DATA_DIR, otherwise the Hub)",
    )


def add_table(command: argparse.ArgumentParser) -> None:
    """A table, and what its cells are beyond what it declares."""
    command.add_argument(
        "table",
        type=word,
        metavar="TABLE",
        help="name of a table (see: experiments list), or FILE.py or FILE.py:NAME of your own",
    )
    add_plugin(command)
    add_variant(command)


def add_variant(command: argparse.ArgumentParser) -> None:
    """The same tables on another model, in another number format, on fewer documents or more tasks."""
    command.add_argument(
        "--model",
        type=word,
        metavar="NAME|FOLDER|NAME=FOLDER",
        help="run the table on another model; NAME=FOLDER: a local copy of that catalogue model",
    )
    command.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the model (default: the table's)"
    )
    command.add_argument(
        "--limit",
        type=positive,
        metavar="N",
        help="only the first N documents of each zero-shot task (default: the table's)",
    )
    command.add_argument(
        "--tasks",
        nargs="+",
        type=word,
        default=[],
        metavar="NAME",
        help="additional zero-shot tasks: one task set (see: experiments list), or tasks of lm-eval",
    )
    command.add_argument(
        "--rehearse",
        action="store_true",
        help="run a few cells of every kind at toy scale, into results/rehearsal; the numbers mean nothing",
    )


def add_plugin(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--plugin",
        nargs="+",
        type=path,
        default=[],
        metavar="FILE",
        help="Python files that define methods of your own",
    )


def add_running(command: argparse.ArgumentParser) -> None:
    command.add_argument("--device", type=device, help="cpu, cuda, cuda:1, ... (default: cuda if available, else cpu)")
    command.add_argument(
        "--batch-size", type=positive, default=8, help="windows per forward pass; does not affect results (default: 8)"
    )
    command.add_argument(
        "--weights",
        choices=("device", "host", "disk", "auto"),
        default="auto",
        help="where weights are kept while they are not in use: on the device, in CPU memory (host), on disk, or "
        "chosen by "
        "the free memory (auto); does not affect results (default: auto)",
    )
    add_data(command)
    command.add_argument(
        "--again",
        action="store_true",
        help="rerun cells whose records were made by a different version of the method's or measures' code",
    )
    command.add_argument(
        "--no-dense-gate", action="store_true", help="prune even if the dense model misses its published perplexity"
    )
    command.add_argument(
        "--wandb",
        nargs="?",
        type=word,
        const="llm-pruning",
        metavar="PROJECT",
        help="also log cells to Weights & Biases (default project: llm-pruning)",
    )


def add_strict(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--strict", action="store_true", help="exit status 1 if cells are left out because they are too large"
    )


def add_saving(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--save-models", type=path, metavar="DIR", help="save the pruned model of every cell, one folder each"
    )
