"""Options of `experiments prune` and `compare`, besides those that methods and recovery define themselves."""

from __future__ import annotations

import argparse

from experiments import cli
from experiments.spec import DTYPES, SAMPLING


def add_prune(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "model",
        type=cli.word,
        nargs="?",
        metavar="MODEL",
        help="name in the catalogue (see: experiments list), Hub id or local folder",
    )
    command.add_argument(
        "--method",
        type=cli.word,
        metavar="NAME",
        help="pruning method (see: experiments list); --help NAME explains its options",
    )
    _add_calibration(command)
    command.add_argument(
        "--sampling", choices=SAMPLING, help="how calibration windows are drawn (default: as in the method's paper)"
    )
    command.add_argument(
        "--seed",
        type=cli.number,
        metavar="N",
        help="seed of calibration windows, method and retraining (default: 0)",
    )
    command.add_argument(
        "--recover",
        type=cli.word,
        metavar="WHAT",
        help="retrain these parameters after pruning, on the calibration corpus, e.g. masklora (see --help retraining)",
    )
    command.add_argument(
        "--reconstruct",
        type=cli.word,
        metavar="WHAT",
        help="train these parameters block by block while pruning (see --help reconstruction)",
    )
    command.add_argument(
        "--held-out",
        type=cli.word,
        metavar="CORPUS",
        help="with --recover: keep the model of the step with the lowest loss on this text (default: of the last step)",
    )
    _add_measures(command)
    command.add_argument("--save", type=cli.path, metavar="FOLDER", help="save the pruned model there")
    command.add_argument(
        "-h",
        "--help",
        nargs="?",
        const="",
        metavar="METHOD",
        help="show this message, or the options of a method, of retraining or reconstruction",
    )
    cli.add_plugin(command)
    cli.add_results(command)
    cli.add_running(command)


def add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "models",
        type=cli.word,
        nargs="+",
        metavar="MODEL",
        help="names in the catalogue (see: experiments list), Hub ids or local folders",
    )
    command.add_argument("--methods", type=cli.word, nargs="+", required=True, metavar="NAME")
    command.add_argument(
        "--settings",
        type=cli.word,
        nargs="+",
        required=True,
        metavar="SETTING",
        help="sparsities (shares removed, e.g. 0.5) or n:m patterns (e.g. 2:4)",
    )
    command.add_argument(
        "--seeds", type=cli.positive, default=1, metavar="N", help="number of calibration seeds (default: 1)"
    )
    command.add_argument("--name", type=cli.word, default="compare", help="name of the table (default: compare)")
    _add_calibration(command)
    _add_measures(command)
    cli.add_plugin(command)
    cli.add_results(command)
    cli.add_running(command)


def _add_calibration(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--calibration", type=cli.word, metavar="CORPUS", help="calibration corpus (default: as in the method's paper)"
    )
    command.add_argument(
        "--nsamples",
        type=cli.positive,
        metavar="N",
        help="number of calibration windows (default: as in the method's paper)",
    )
    command.add_argument(
        "--seqlen",
        type=cli.positive,
        metavar="TOKENS",
        help="tokens per calibration window (default: as in the method's paper)",
    )


def _add_measures(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--measure",
        dest="measures",
        type=cli.word,
        nargs="+",
        default=[],
        metavar="KEY",
        help="perplexities to measure, as corpus/split@tokens (default: wikitext2/test at 2048, or the model's context "
        "length where that is shorter)",
    )
    command.add_argument(
        "--tasks",
        type=cli.word,
        nargs="+",
        default=[],
        metavar="NAME",
        help="zero-shot tasks to measure: one task set, or tasks of lm-eval",
    )
    command.add_argument(
        "--limit", type=cli.positive, metavar="N", help="only the first N documents of each task (default: all)"
    )
    command.add_argument("--dtype", choices=DTYPES, help="dtype of the model (default: its own)")
