"""Prunes one model with one method, compares it with the dense model, and saves it.

python -m experiments prune Qwen/Qwen2.5-0.5B --method wanda --sparsity 0.5 --save pruned/qwen-wanda
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabulate import tabulate

import pruners
from experiments import cells, cli, models, recovery
from experiments.cells import Cell
from experiments.labels import calibration, full, labels, seed
from experiments.models import kept, lengths
from experiments.own import defaults, options, saved
from experiments.recovery import Documents, Retraining
from experiments.spec import Run, Windows
from experiments.store import code, records
from experiments.store.records import Record
from pruners.interface.suggest import UsageError, unknown
from pruners.retrain import Reconstruction

if TYPE_CHECKING:
    from experiments.batch import Outcome

TABLE = "adhoc"
SEED = ("seed",)  # one --seed for the windows, the method and the recovery
TRAINED = {"batch_size": "train-batch-size"}  # --batch-size is how many windows go through the model at once
OTHERWISE = {"steps": 1000, "learning_rate": 5e-4}  # PERP's released defaults, where a Retraining leaves it open
BETWEEN = ("trainable", "text", "seed", "keep", "held_out")  # set here
HELD_OUT = 32  # windows, as many tokens each as an example


def explained(name: str) -> str:
    """What a method or kind of recovery does and every option that it has; UsageError for a name nobody knows."""
    kinds: dict[str, Any] = {**pruners.METHODS, "retraining": Retraining, "reconstruction": Reconstruction}
    if name in defaults.TRAINABLE and name not in kinds:
        also = name in defaults.trainable(Reconstruction)
        raise UsageError(
            f"{name} is no method but what --recover{' and --reconstruct train' if also else ' trains'}; see "
            f"--help retraining{' and --help reconstruction' * also}."
        )
    if name not in kinds:
        raise UsageError(unknown("method", name, kinds))
    if name in pruners.METHODS:
        return options.help_of(kinds[name], f"python -m experiments prune MODEL --method {name}", skip=SEED)
    option, otherwise = ("recover", OTHERWISE) if kinds[name] is Retraining else ("reconstruct", {})
    what = f"python -m experiments prune MODEL --method METHOD --{option} WHAT"
    told = options.help_of(kinds[name], what, skip=BETWEEN, names=TRAINED, otherwise=otherwise)
    return f"{told.rstrip()}\n\nWHAT: {', '.join(defaults.trainable(kinds[name]))}"


def run(asked: argparse.Namespace) -> int:
    """The exit status; `asked.hyperparameters` are the options of the method and of the recovery, as typed."""
    if asked.help is not None:
        print(explained(asked.help) if asked.help else asked.parser.format_help())
        return 0
    from experiments import batch

    if asked.model is None or asked.method is None:
        raise UsageError("prune needs a MODEL and a --method NAME; see --help.")
    runs = declared(asked)
    found = cells.cells(runs)
    _refuse_lacking(runs, asked.data_dir)
    _refuse_unfit(runs[-1])
    lengths.check(*runs)
    settings = cli.settings(asked)
    settings = replace(settings, save={found[-1].id: asked.save}) if asked.save else settings
    finished = batch.finished(found, records.load(asked.results, TABLE), settings)
    if asked.save and found[-1].id not in finished:
        _refuse_unkept(runs[-1], asked.save)
    for line in _choices(runs[-1]):
        cli.say(line)
    watchers = cli.watchers(asked, TABLE)
    code.load(cell.run for cell in found if cell.id not in finished)  # of both, before the first is measured
    with kept.lasting():
        outcome = batch.run_table(TABLE, found[:1], settings, watchers)
        if not outcome.failed:  # what fails on the dense model would fail on the pruned one
            outcome.add(batch.run_table(TABLE, found[1:], settings, watchers))
    known = records.load(asked.results, TABLE)
    if all(cell.id in known for cell in found):
        print(beside(found, known))
    return _status(outcome, asked, found[-1])


def declared(asked: argparse.Namespace) -> list[Run]:
    """The dense model's run and the pruned one's; UsageError for what is asked and does not exist or fit."""
    asked.model = models.canonical(asked.model)
    seeded, asked.seed = asked.seed is not None, asked.seed or 0
    if asked.method not in pruners.METHODS:
        raise UsageError(unknown("method", asked.method, pruners.METHODS))
    for option, kind in (("recover", Retraining), ("reconstruct", Reconstruction)):
        if (name := getattr(asked, option)) and name not in (known := defaults.trainable(kind)):
            if name in defaults.TRAINABLE:
                raise UsageError(
                    f"--{option} {name} would train what is no part of a decoder block; choose {', '.join(known)}."
                )
            raise UsageError(unknown(f"choice of what to train (--{option})", name, known))
    if asked.limit and not asked.tasks:
        raise UsageError("--limit applies to the documents of --tasks; give --tasks, or leave --limit out.")
    if asked.recover and asked.reconstruct:
        raise UsageError("--recover and --reconstruct exclude each other; give one of the two.")
    if asked.held_out and not asked.recover:
        raise UsageError("--held-out chooses between the steps of --recover; give --recover, or leave --held-out out.")
    models.check(asked.model)
    cli.refuse_absent(asked.data_dir)
    cli.refuse_unknown(asked.tasks)
    try:
        method, rest = _method(asked, asked.hyperparameters)
        windows = _windows(asked)
        after = _recovery(asked, rest, windows)
        measures = defaults.measures(asked.model, asked.measures, asked.tasks, asked.limit)
        pruned = Run(asked.model, method, windows, measures, asked.dtype or models.own_dtype(asked.model), after)
    except (ValueError, TypeError) as error:
        raise error if isinstance(error, UsageError) else UsageError(str(error)) from error
    pruned = pruned if pruned.calibrates else replace(pruned, windows=None)
    _refuse_unread(asked, pruned)
    if seeded and seed(pruned) is None:
        raise UsageError("Nothing is drawn here, so a seed moves nothing; leave out --seed.")
    return [replace(pruned, method=None, windows=None, recovery=None), pruned]


def _method(asked: argparse.Namespace, rest: Sequence[str]) -> tuple[Any, list[str]]:
    kind = pruners.METHODS[asked.method]
    own = defaults.hyperparameters(asked.method, asked.model)
    given, rest = options.parse(kind, rest, f"--method {asked.method}", skip=SEED, otherwise=own)
    return kind(**given, **defaults.seed(kind, asked.seed)), rest


def _windows(asked: argparse.Namespace) -> Windows:
    own = defaults.windows(asked.method, asked.model)
    return Windows(
        asked.calibration or own.corpus,
        asked.nsamples or own.count,
        asked.seqlen or own.length,
        asked.seed,
        asked.sampling or own.sampling,
    )


def _recovery(asked: argparse.Namespace, rest: Sequence[str], windows: Windows) -> Any:
    kinds = {"--recover": (asked.recover, Retraining), "--reconstruct": (asked.reconstruct, Reconstruction)}
    known: dict[str, list[str]] = {
        f"--method {asked.method}": options.names_of(pruners.METHODS[asked.method], skip=SEED)
    }
    made: Any = None
    for option, (name, kind) in kinds.items():
        if name:
            known[option] = options.names_of(kind, skip=BETWEEN, names=TRAINED)
            otherwise = OTHERWISE if kind is Retraining else {}
            given, rest = options.parse(kind, rest, option, skip=BETWEEN, names=TRAINED, otherwise=otherwise)
            try:
                made = _made(kind, defaults.TRAINABLE[name], given, asked, windows)
            except ValueError as error:
                raise UsageError(options.in_options(str(error), kind, TRAINED)) from error
    options.refuse(rest, known)
    return made


def _made(kind: type[Any], trainable: Any, given: dict[str, Any], asked: argparse.Namespace, windows: Windows) -> Any:
    if kind is Reconstruction:
        return Reconstruction(trainable, seed=asked.seed, **given)
    text = Documents(windows.corpus, given["steps"] * given["batch_size"], windows.length)
    if asked.held_out == text.corpus:
        raise UsageError(f"--held-out {text.corpus} is the text that is trained on; name another.")
    if asked.held_out:
        held_out = Windows(asked.held_out, HELD_OUT, windows.length, asked.seed, "stream")
        given = {**given, "keep": "best", "held_out": held_out}
    elif given["check_every"] != Retraining.check_every:
        raise UsageError("--check-every is how often the loss on --held-out is taken; give --held-out, too.")
    return Retraining(trainable, text, seed=asked.seed, **given)


def _refuse_unread(asked: argparse.Namespace, pruned: Run) -> None:
    """UsageError for options of the calibration text that neither method nor recovery reads."""
    told = {"--nsamples": asked.nsamples, "--sampling": asked.sampling}
    said = f"--method {asked.method} uses no calibration text"
    if asked.recover:
        said += ", and --recover reads its corpus and length alone"
    else:
        told |= {"--calibration": asked.calibration, "--seqlen": asked.seqlen}
    given = [name for name, value in told.items() if value]
    if given and not pruned.calibrates:
        raise UsageError(f"{said}; leave out {', '.join(given)}.")


def _refuse_lacking(runs: Sequence[Run], data_dir: Path | None) -> None:
    """UsageError for texts that are not here where nothing can be downloaded."""
    from experiments import estimate
    from experiments.models import hub

    try:
        lacking = dict.fromkeys(text for run in runs for text in estimate.lacking(run, data_dir))
    except ValueError as error:  # a corpus that nobody knows
        raise UsageError(str(error)) from error
    if lacking and not hub.reachable():
        raise UsageError(
            f"Missing on this machine, and the Hub does not answer: {'; '.join(lacking)}. Download it on a "
            "machine with network access, or name a folder that has it (--data-dir for texts; "
            "CONTRIBUTING.md says under which names)."
        )


def _refuse_unfit(run: Run) -> None:
    """UsageError, before the dense model is measured, for a method that does not work on a model of this shape."""
    empty = models.without_weights(run.model)
    try:
        pruners.check(empty, run.method)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _refuse_unkept(run: Run, folder: Path) -> None:
    try:
        saved.check(run, folder)
    except ValueError as error:
        raise UsageError(str(error)) from error


def _choices(run: Run) -> list[str]:
    """What was left open and what stands for it."""
    keys = [key for what in run.measures for key in (what.keys or (what.key,))]
    after = recovery.label(run.recovery).removeprefix(" + ")
    steps = f" ({run.recovery.steps} steps, learning rate {run.recovery.learning_rate:g})" if run.recovery else ""
    read = f" on {text}" if (text := recovery.text(run.recovery)) else ""
    lines = [
        f"Method: {run.method!r}",
        f"Calibration: {calibration(run)}",
        f"Recovery: {after}{steps}{read}" if after else "",
    ]
    return [*filter(None, lines), f"Measures in {run.dtype}: {', '.join(keys)}"]


def beside(found: Sequence[Cell], known: dict[str, Record]) -> str:
    """Every measured value of the dense and the pruned model with its interval, and what each cell cost."""
    dense, pruned = (known[cell.id] for cell in found)
    names = [full(label) for label in labels([cell.run for cell in found])]
    shown = [key for key, value in pruned.measures.items() if saved.shown(value)]
    lines = [(key, saved.shown(dense.measures[key]), saved.shown(pruned.measures[key])) for key in shown]
    lines.append(("sparsity of the pruned weights", "", pruned.sparsity_told))
    lines.append(("sparsity requested", "", f"{pruned.achieved['asked']:.4f}"))
    lines.append(("cost", _cost(dense), _cost(pruned)))
    return tabulate(lines, ("", *names), disable_numparse=True)


def _cost(record: Record) -> str:
    return f"{record.cost.seconds['total']:.0f} s, peak {record.cost.peak_bytes / 1e9:.1f} GB"


def _status(outcome: Outcome, asked: argparse.Namespace, pruned: Cell) -> int:
    if outcome.failed:
        return cli.EXIT_FAILED
    path = records.folder(asked.results, TABLE) / f"{pruned.id}.json"
    print(f"Record: {path}{f'; model: {asked.save}' if asked.save else ''}", file=sys.stderr)
    return cli.EXIT_FAILED if outcome.incomplete else 0
