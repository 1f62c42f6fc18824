"""Run the cells of the papers' tables on this machine.

python -m experiments list
python -m experiments show embedded.demo
python -m experiments run embedded.demo --method wanda
python -m experiments run flap.perplexity gblm.perplexity --only model=llama-7b "Wanda 50 %"
python -m experiments run perp.magnitude --cards 2    # two GPUs share every cell
python -m experiments prefetch flap.perplexity        # on a machine with a network, for those without
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tabulate import tabulate

from experiments import cli, labels, selection
from experiments.data import corpora
from experiments.own.arguments import add_compare, add_prune
from experiments.store import records

if TYPE_CHECKING:
    from experiments.cells import Cell
    from experiments.spec import Run
    from experiments.store.records import Record

RUNNING = ("plugin", "device", "batch_size", "weights", "data_dir", "again", "no_dense_gate", "wandb")
HOMES = {"device": "device", "away": "host or disk", None: "too large"}


def main(words: Sequence[str] | None = None) -> int:
    """The exit status."""
    made = parser()
    asked, unknown = made.parse_known_args(words)
    asked.hyperparameters = unknown
    asked.words = list(sys.argv[1:] if words is None else words)
    if asked.hyperparameters and asked.command is not _prune:
        made.error(f"unrecognized arguments: {' '.join(asked.hyperparameters)}")
    return cli.carry_out(asked, "Stopped. Finished cells are kept; the same command runs the rest.")


def parser() -> argparse.ArgumentParser:
    top = cli.Parser(prog="python -m experiments", description=(__doc__ or "").splitlines()[0])
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="tables, models, methods and corpora")
    listing.set_defaults(command=_list)
    show = commands.add_parser("show", help="a table's cells: status, estimated cost and missing inputs")
    show.set_defaults(command=_show)
    run = commands.add_parser("run", help="run the cells that have no record yet")
    run.set_defaults(command=_run)
    prune = commands.add_parser(
        "prune", help="prune one model with one method, compare it with the dense model, save it", add_help=False,
        allow_abbrev=False,
    )  # fmt: skip
    prune.set_defaults(command=_prune, parser=prune)
    add_prune(prune)
    compare = commands.add_parser(
        "compare", help="compare methods on models of your own, at several settings and seeds"
    )
    compare.set_defaults(command=_compare)
    add_compare(compare)
    for command in (show, run):
        selection.add(command)
    cli.add_running(run)
    cli.add_saving(run)
    run.add_argument(
        "--allow-missing-tasks",
        action="store_true",
        help="exit status 0 even where tasks were not measured because their documents are missing",
    )
    run.add_argument(
        "--cards", type=cli.positive, default=1, metavar="N",
        help="GPUs of this machine that share every cell; with --device cpu, the number of processes (default: 1)",
    )  # fmt: skip
    run.add_argument(
        "--card",
        type=cli.gigabytes,
        metavar="GB",
        help="leave out cells that need more GPU memory than this (default: that of the device)",
    )
    cli.add_strict(run)
    cli.add_data(show)
    show.add_argument(
        "--card", type=cli.gigabytes, default=80, metavar="GB", help="memory of one GPU, in GB (default: 80)"
    )
    show.add_argument(
        "--cards", type=cli.positive, default=1, metavar="N",
        help="GPUs in the machine; each cell gets the fewest of 1, 2, 4 and 8 that hold it (default: 1)",
    )  # fmt: skip
    fetching = commands.add_parser(
        "prefetch",
        help="download models, corpora and task documents, and list what is still missing (then exit status 1)",
    )
    selection.add(fetching)
    cli.add_data(fetching)
    fetching.set_defaults(command=_prefetch)
    audit = commands.add_parser(
        "check-records", help="check that records are valid and undamaged, and list the cells they fill"
    )
    audit.add_argument("results", nargs="+", type=cli.path, metavar="DIR", help="results folders")
    audit.set_defaults(command=_check_records)
    for command in (listing, show, run, prune, compare, fetching, audit):
        command.add_argument("--debug", action="store_true", help="show the full traceback on error")
    return top


def _list(asked: argparse.Namespace) -> int:
    import pruners
    from experiments import models, protocols
    from experiments.papers import TABLES

    print(tabulate([(t.name, len(t.runs()), t.title) for t in TABLES.values()], ("table", "cells", "title")))
    known: dict[str, Iterable[str]] = {
        "models": models.CATALOGUE,
        "methods": pruners.METHODS,
        "corpora": corpora.SOURCES,
        "zero-shot task sets (for --tasks, as are all tasks of lm-eval)": protocols.TASK_SETS,
    }
    for kind, names in known.items():
        print(f"\n{kind}: {', '.join(names)}")
    print(
        "Wherever a model's name is expected, a local model folder works as well; NAME=FOLDER says which "
        "catalogue model it holds, and BASE+DELTA adds a difference to a model."
    )
    return 0


def _show(asked: argparse.Namespace) -> int:
    told, counts = [], Counter[str]()
    distinct: set[str] = set()
    for one, chosen in selection.chosen(asked):
        states = _states(one, chosen)
        told.append(_shown(one, states))
        counts.update(states.values())
        distinct |= {cell.id for cell in chosen}
    if len(told) > 1:
        stand = ", ".join(f"{count:,} {state}" for state, count in counts.most_common())
        told.append(f"{len(told)} tables, {counts.total():,} cells ({len(distinct):,} distinct): {stand}.")
    print("\n\n".join(told))
    return 0


def _states(asked: argparse.Namespace, chosen: Sequence[Cell]) -> dict[Cell, str]:
    done, failed = records.load(asked.results, asked.table), records.load_failures(asked.results, asked.table)
    return {cell: _state(cell, done.get(cell.id), cell.id in failed, asked) for cell in chosen}


def _shown(asked: argparse.Namespace, states: Mapping[Cell, str]) -> str:
    """One table's cells."""
    from experiments.placement import needs, several

    rows, chosen = [], list(states)
    for cell in chosen:
        cards = several.fewest(cell.run, asked.card, asked.cards)
        home, gigabytes = needs.home_on(cell.run, asked.card, cards)
        hours = "" if home is None else _hours(_card_hours(cell, asked.card, cards))
        cost = (*([str(cards)] if asked.cards > 1 else []), HOMES[home], f"{gigabytes:.1f}", hours)
        about = (labels.calibration(cell.run), ", ".join(_keys(cell.run)))
        label = labels.beside_model(cell.label, cell.run.model_name)
        rows.append((label, cell.id, states[cell], cell.run.model_name, *cost, *about))
    place = (*(["cards"] if asked.cards > 1 else []), "weights", "GPU GB", "A100 h")
    heads = ("cell", "id", "state", "model", *place, "calibration", "measures")
    finished = [cell for cell in chosen if states[cell] == "done"]
    summary = _summary(chosen, finished, asked.data_dir, asked.card, asked.cards)
    lacking = sum(state == "incomplete" for state in states.values())
    partly = [
        f"Incomplete: {lacking} cells have a record that lacks tasks; `run` adds them once their documents are here."
    ]
    heading = [f"{asked.table}:"] if asked.several else []
    return "\n".join([*heading, tabulate(rows, heads, disable_numparse=True), summary, *partly * bool(lacking)])


def _state(cell: Cell, record: Record | None, failed: bool, asked: argparse.Namespace) -> str:
    """`outdated`: of other texts than `run` would read, or at another learning rate; `incomplete`: without a task,
    which `run` cannot make good."""
    from experiments import measures
    from experiments.store import found

    if record is None:
        return "failed" if failed else "missing"
    if not found.stands(record, cell.run, asked.results, asked.data_dir):
        return "outdated"
    return "incomplete" if measures.missing(record.measures) else "done"


def _card_hours(cell: Cell, card: float, cards: int) -> float:
    from experiments import estimate
    from experiments.placement import needs

    return estimate.gpu_hours(cell, away=needs.home_on(cell.run, card, cards)[0] == "away")


def _summary(chosen: Sequence[Cell], done: Sequence[Cell], data_dir: Path | None, card: float, most: int) -> str:
    from experiments import estimate
    from experiments.placement import needs, several

    left = [cell for cell in chosen if cell not in done]
    cards = {cell: several.fewest(cell.run, card, most) for cell in left}
    home = {cell: needs.home_on(cell.run, card, cards[cell])[0] for cell in left}
    large = [cell for cell in left if home[cell] is None]
    fitting, away = [cell for cell in left if home[cell]], [cell for cell in left if home[cell] == "away"]
    others = f"{len(fitting)} of the others" if large else "the others"
    hours = f"about {_hours(estimate.total_gpu_hours(fitting, away))} hours on one A100".replace("about <", "<")
    cost = f"; {others} take {hours}" if fitting else ""
    cost += f", {len(away)} of them with weights in CPU memory or on disk" if away else ""
    lacking = dict.fromkeys(text for cell in left for text in estimate.lacking(cell.run, data_dir))
    partial = dict.fromkeys(text for cell in left for text in estimate.partial(cell.run, data_dir))
    missing = [f"Not on this machine: {'; '.join(lacking)}."] if lacking else []
    missing += [f"Only in part in the data folder: {'; '.join(partial)}."] if partial else []
    return "\n".join([f"{len(done)} of {len(chosen)} cells are done{cost}.", *_too_large(large, card, cards), *missing])


def _too_large(cells: Sequence[Cell], card: float, cards: Mapping[Cell, int]) -> list[str]:
    from experiments.placement import needs

    most: dict[str, float] = {}
    for cell in cells:
        name = cell.run.model_name
        most[name] = max(most.get(name, 0), needs.home_on(cell.run, card, cards[cell])[1])
    models = ", ".join(f"{name} (up to {gigabytes:.0f} GB)" for name, gigabytes in most.items())
    need = f"{len(cells)} cells need" if len(cells) > 1 else "1 cell needs"
    whole = " and ".join(dict.fromkeys(filter(None, (needs.needs_all_weights(cell.run) for cell in cells))))
    why = f", as {whole} needs all weights on the device" if whole else ""
    most_cards = max((cards[cell] for cell in cells), default=1)
    than = f"one {card:g} GB card" if most_cards == 1 else f"{most_cards} cards of {card:g} GB hold"
    return [f"{need} more than {than}{why}: {models}{' on each' * (most_cards > 1)}."] if cells else []


def _hours(hours: float) -> str:
    return "< 0.01" if hours < 0.01 else f"{hours:.2f}" if hours < 1 else f"{hours:.1f}"


def _run(asked: argparse.Namespace) -> int:
    from experiments import cards

    chosen = selection.chosen(asked)
    if cards.wanted(asked.cards, asked.device):
        return cards.run(asked.cards, asked.words)
    from experiments import tables

    return tables.run(chosen)


def _prefetch(asked: argparse.Namespace) -> int:
    from experiments.prefetch import prefetch

    chosen = selection.chosen(asked)
    lacking = prefetch([cell.run for _, some in chosen for cell in some], asked.data_dir, cli.say)
    print("\n".join(f"Missing: {text}." for text in lacking) or "Nothing is missing.")
    return cli.EXIT_FAILED if lacking else 0


def _prune(asked: argparse.Namespace) -> int:
    from experiments.own import prune

    return prune.run(asked)


def _check_records(asked: argparse.Namespace) -> int:
    from experiments.store import audit

    broken = 0
    for root in asked.results:
        found = audit.audit(root)
        broken += len(found.faults)
        print("\n".join(found.faults))
        rows = [(name, f"{filled} of {count}") for name, (filled, count) in found.filled.items()]
        rows += [(name, f"{count} records of a table that is unknown here") for name, count in found.strange.items()]
        print(tabulate(rows, ("table", "cells filled"), disable_numparse=True))
        print(f"{root}: {found.records} records, {len(found.faults)} faults.")
    return cli.EXIT_FAILED if broken else 0


def _compare(asked: argparse.Namespace) -> int:
    from experiments.own import comparison

    path = comparison.file(asked)
    words = ["run", str(path), "--results", str(asked.results)]
    table = argparse.Namespace(**vars(parser().parse_args(words)) | {name: getattr(asked, name) for name in RUNNING})
    cli.resolve(table)
    return _run(table) or comparison.show(path, asked)


def _keys(run: Run) -> list[str]:
    """The protocol keys; of tasks that have no mean, each task's own."""
    kept = (what.keys if getattr(what, "convention", "") is None else (what.key,) for what in run.measures)
    return [key for keys in kept for key in keys]


if __name__ == "__main__":
    sys.exit(main())
