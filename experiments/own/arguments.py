"""What `experiments prune` can be told besides the options of methods and recovery, which their classes make."""

from __future__ import annotations

import argparse

from experiments import cli
from experiments.spec import DTYPES, SAMPLING


def add_prune(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model", type=cli.word, nargs="?", metavar="MODEL", help="of the catalogue, a Hub id, a folder"
    )
    command.add_argument("--method", type=cli.word, metavar="NAME", help="--help NAME tells its options")
    _add_calibration(command)
    command.add_argument("--sampling", choices=SAMPLING, help="how windows are drawn")
    command.add_argument("--seed", type=cli.number, default=0, metavar="N", help="of all that is drawn (default: 0)")
    command.add_argument("--recover", type=cli.word, metavar="WHAT", help="retrain this afterwards (--help retraining)")
    command.add_argument(
        "--reconstruct",
        type=cli.word,
        metavar="WHAT",
        help="train this block by block while pruning (--help reconstruction)",
    )
    _add_measures(command)
    command.add_argument("--save", type=cli.path, metavar="FOLDER", help="keep the pruned model there")
    command.add_argument("-h", "--help", nargs="?", const="", metavar="METHOD", help="this, or the options of a method")
    cli.add_plugin(command)
    cli.add_results(command)
    cli.add_running(command)


def add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("models", type=cli.word, nargs="+", metavar="MODEL", help="of the catalogue, Hub ids, folders")
    command.add_argument("--methods", type=cli.word, nargs="+", required=True, metavar="NAME")
    command.add_argument(
        "--settings", type=cli.word, nargs="+", required=True, metavar="SETTING", help="shares removed, or n:m patterns"
    )
    command.add_argument("--seeds", type=cli.positive, default=1, metavar="N", help="draws of the text (default: 1)")
    command.add_argument("--name", type=cli.word, default="compare", help="of the table (default: compare)")
    _add_calibration(command)
    _add_measures(command)
    cli.add_plugin(command)
    cli.add_results(command)
    cli.add_running(command)


def _add_calibration(command: argparse.ArgumentParser) -> None:
    command.add_argument("--calibration", type=cli.word, metavar="CORPUS", help="default: that of the method's paper")
    command.add_argument("--nsamples", type=cli.positive, metavar="N", help="calibration windows")
    command.add_argument("--seqlen", type=cli.positive, metavar="TOKENS", help="tokens of a calibration window")


def _add_measures(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--measure",
        dest="measures",
        type=cli.word,
        nargs="+",
        default=[],
        metavar="KEY",
        help="perplexities, e.g. wikitext2/test@2048",
    )
    command.add_argument("--tasks", type=cli.word, nargs="+", default=[], metavar="NAME", help="zero-shot tasks")
    command.add_argument("--limit", type=cli.positive, metavar="N", help="only each task's first N documents")
    command.add_argument("--dtype", choices=DTYPES, help="dtype of the model (default: its own)")
