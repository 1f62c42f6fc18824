"""What `python -m experiments run` can be told, for every command line that runs cells; and what was meant by it."""

from __future__ import annotations

import argparse
import io
import math
import os
import re
import select
import shlex
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from experiments.data import eval_tasks, sources
from experiments.measures import zero_shot
from experiments.store import redaction
from pruners import ranks

if TYPE_CHECKING:
    from experiments.callbacks import Watcher
    from experiments.cells import Cell
    from experiments.settings import Settings


EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE, EXIT_TERMINATED = 1, 2, 130, 141, 143
RESULTS = Path("results")
LARGEST_GB = 100_000
_SOURCES: dict[
    str, tuple[str, list[str]]
] = {}  # of the tables at hand, what they were asked for by and options before all others
LARGEST = 10**9  # documents or windows: more than any data set has


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {' '.join(message.split())}; --help lists what there is.\n")


def carry_out(asked: argparse.Namespace, stopped: str) -> int:
    """Run the asked command and return its exit status; an error becomes one sentence without secrets.

    0 all well, 1 something failed, 2 asked for something unknown; 130 interrupted and 143 terminated, for which
    `stopped` is said; 141 where nobody reads on, such as `head`.
    """

    _printable()
    lost = False
    try:  # commands import what they need: torch takes seconds, and --help should not
        with _terminable(), redaction.quiet_logs(), _heard_once():
            resolve(asked)
            status = int(asked.command(asked) or 0)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt as error:
        say(stopped)
        return EXIT_TERMINATED if isinstance(error, Terminated) else EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001  (the one place where an error becomes a sentence and an exit status)
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return EXIT_PIPE
        from experiments.errors import sentence
        from pruners.suggest import UsageError

        lost = isinstance(error, ranks.RankLostError)
        status = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
        if _all_have_met_it(error):
            return status
        if asked.debug:
            say(redaction.redacted(traceback.format_exc()))
        say(f"{_whose()}{sentence(error)}")
        return status
    finally:
        _forget()
        if "WORLD_SIZE" in os.environ:
            ranks.leave(lost)


def _printable() -> None:
    """Signs that the screen's encoding lacks (an ASCII locale) become ?; files and pipes then are UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            if stream.isatty():
                stream.reconfigure(errors="replace")
            else:
                stream.reconfigure(encoding="utf-8")


def _nobody_reads() -> bool:
    """Whether a reader of what this command says is gone; what is left of it is then thrown away."""
    outputs, asked = (sys.stdout.fileno(), sys.stderr.fileno()), select.poll()
    for output in outputs:
        asked.register(output, 0)  # an error is told without being asked for
    gone = [output for output, told in asked.poll(0) if told & select.POLLERR]
    for output in gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # or Python complains at its end
    return bool(gone)


@contextmanager
def _heard_once() -> Iterator[None]:
    """Of ranks that run the same program the first one speaks; what ends another one alone is said behind this."""
    if os.environ.get("RANK", "0") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _whose() -> str:
    return f"Process {rank}: " if (rank := os.environ.get("RANK", "0")) != "0" else ""


def _all_have_met_it(error: Exception) -> bool:
    """Whether this is a rank whose error the first one has met, too, and says."""
    if "WORLD_SIZE" not in os.environ or isinstance(error, ranks.RankLostError):
        return False
    if os.environ.get("RANK", "0") == "0":
        _tell_the_others()
        return False
    try:
        return ranks.here().met("ended")
    except (ValueError, ConnectionError):  # they have not met at all
        return False


def _tell_the_others() -> None:
    """Of the first rank: that it ends with an error, which others need not say."""
    with suppress(ValueError, ConnectionError):
        together = ranks.here()
        if together.count > 1:
            together.reach("ended")


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


def resolve(asked: argparse.Namespace) -> None:
    """Make methods and tables from outside the repository known.

    `table` is then the table's own name and `source` what it was asked for by; of several `tables`, `sources` holds
    what each was asked for by, by its own name.
    """
    several = hasattr(asked, "tables")
    files, source = getattr(asked, "plugin", []), getattr(asked, "source", None) or getattr(asked, "table", None)
    if not files and not source and not several:
        return
    from experiments.own import tables
    from pruners import plugin

    plugin.use(files)
    plugins = [str(file) for file in files]
    options = ["--plugin", *plugins] if plugins else []
    options += ["--rehearse"] if getattr(asked, "rehearse", False) else []
    if source:
        asked.source, asked.table = source, tables.find(source).name
        _SOURCES[asked.table] = (source, options)
    elif several:
        asked.sources = {tables.find(word).name: word for word in _named(asked)}
        _SOURCES.update({name: (word, options) for name, word in asked.sources.items()})
    _rehearse(asked)


def _rehearse(asked: argparse.Namespace) -> None:
    """Put rehearsals in the place of the tables where that is asked for."""
    if not getattr(asked, "rehearse", False):
        return
    from experiments.selection import rehearsal

    rehearsal.use(asked.sources if hasattr(asked, "sources") else [asked.table])
    asked.no_dense_gate = True
    asked.results = {str(RESULTS): rehearsal.RESULTS, str([RESULTS]): [rehearsal.RESULTS]}.get(
        str(asked.results), asked.results
    )


def _forget() -> None:
    """The command is over, and the process may go on to another one."""
    _SOURCES.clear()
    if (rehearsal := sys.modules.get("experiments.selection.rehearsal")) is not None:
        rehearsal.use(())


def _named(asked: argparse.Namespace) -> list[str]:
    from experiments import papers
    from pruners.suggest import UsageError

    if getattr(asked, "idle", False) and not asked.tables and not asked.all:
        return []  # means those that were begun
    if bool(asked.tables) == asked.all:
        raise UsageError(
            "--all is every table, so name none besides." if asked.all else "Name a table, several, or --all of them."
        )
    return list(papers.TABLES) if asked.all else list(asked.tables)


def say(sentence: str) -> None:
    """To the user, naming the process where several were launched together."""
    rank = os.environ.get("RANK", "0")
    print(f"Process {rank}: {sentence}" if rank != "0" else sentence, file=sys.stderr)


def say_lines(lines: Sequence[str]) -> None:
    for line in lines:
        say(line)


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


def selection(
    table: str,
    results: Path,
    model: str | None = None,
    dtype: str | None = None,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    data_dir: Path | None = None,
) -> str:
    """The arguments, quoted for a shell, by which any command finds the same cells again, the table first."""
    told = {"--model": model, "--dtype": dtype, "--limit": limit, "--data-dir": data_dir}
    options = [word for name, value in told.items() if value for word in (name, str(value))]
    asked = ["--tasks", *tasks] if tasks else []
    source, before = _SOURCES.get(table, (table, []))
    return shlex.join([source, *before, *options, *asked, *_results(results)])


def same_cells(asked: argparse.Namespace, data_dir: Path | None = None) -> str:
    """As `selection`, of the cells of this command; of several results folders in the first."""
    results = asked.results if isinstance(asked.results, Path) else asked.results[0]
    return selection(asked.table, results, asked.model, asked.dtype, asked.limit, asked.tasks, data_dir)


def same_tables(asked: argparse.Namespace) -> str:
    """The arguments by which another command finds the records of these tables."""
    sources = ["--all"] if asked.all else list(asked.sources.values())
    before = next(iter(_SOURCES[name][1] for name in asked.sources), [])
    return shlex.join([*sources, *before, *_results(asked.results)])


def _results(folder: Path) -> list[str]:
    return [] if folder.resolve() == RESULTS.resolve() else ["--results", str(folder)]


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


def declared(asked: argparse.Namespace) -> list[Cell]:
    """Every cell of one table on the model, in the format and with the tasks that are asked for."""
    from experiments import cells, papers

    table = papers.find(asked.table)
    refuse_absent(asked.data_dir)
    refuse_unknown(asked.tasks)
    runs = papers.runs(table, asked.model, asked.dtype, asked.limit, asked.tasks)
    return cells.cells(runs, table.label)


def settings(asked: argparse.Namespace, found: Sequence[Cell] = ()) -> Settings:
    """`found` are the cells whose models are kept, if any are."""
    from experiments.own import saved
    from experiments.settings import Settings

    folder = getattr(asked, "save_models", None)
    return Settings(
        asked.results,
        asked.device,
        asked.batch_size,
        asked.data_dir,
        dense_gate=not asked.no_dense_gate,
        again=asked.again,
        save=saved.places(list(found), folder, asked.table) if folder else {},
        weights=asked.weights,
    )


def watchers(asked: argparse.Namespace) -> list[Watcher]:
    if asked.wandb is None:
        return []
    from experiments.wandb_callback import Wandb  # wandb takes a second to import

    return [Wandb(asked.wandb, asked.table, asked.results)]


def refuse_absent(data_dir: Path | None) -> None:
    """UsageError for a data folder that is not there, before every cell would meet that."""
    from pruners.suggest import UsageError

    folder = zero_shot.folder(data_dir)
    if folder and not folder.is_dir():
        name = "--data-dir" if data_dir else sources.DATA_DIR
        raise UsageError(f"{name} {folder} is no folder; name one that is, or leave it out to read from the Hub.")


def refuse_unknown(tasks: Sequence[str]) -> None:
    """UsageError with the nearest names, before any work; lm-eval's index is read only for names that it may know."""
    from experiments import protocols

    if not tasks:
        return
    protocols.named(tasks)
    if unfamiliar := [name for name in tasks if name not in protocols.TASK_SETS and name not in eval_tasks.SOURCES]:
        from eval.tasks import check_names

        check_names(unfamiliar)


def word(text: str) -> str:
    """A name that asks for something; an unset variable of a shell leaves it empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty (an unset variable?); give a name, or leave the option out")
    if not text.isprintable():
        raise argparse.ArgumentTypeError(f"{text!r} holds a control character, which no name has")
    return text


def path(text: str) -> Path:
    """A file or folder."""
    return Path(word(text))


def device(text: str) -> str:
    """By its form alone: a job's machine may have what this one has not."""
    if not re.fullmatch(r"cpu|cuda(:\d{1,4})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device; cpu, cuda and cuda:1 are some")
    return text


def positive(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1)


def number(text: str) -> int:
    """A whole number from 0 on."""
    return _whole(text, 0)


def _whole(text: str, least: int) -> int:
    if not text.isdecimal() or len(text) > len(str(LARGEST)) or not least <= int(text) <= LARGEST:
        raise argparse.ArgumentTypeError(f"{shorten(text)} is no whole number from {least} on (to {LARGEST:,})")
    return int(text)


def shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def gigabytes(text: str) -> float:
    """More than nothing and finite: to Slurm no memory is all that a node has."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found <= LARGEST_GB:
        raise argparse.ArgumentTypeError(f"{shorten(text)} is no number of gigabytes above 0 (to {LARGEST_GB:,})")
    return found
