"""How a command runs and ends: its exit status, signals, and which of several ranks prints."""

from __future__ import annotations

import argparse
import io
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, NoReturn

from experiments.cli.asked import forget, resolve
from experiments.store import redaction
from pruners.run import ranks

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_PIPE, EXIT_TERMINATED = 1, 2, 130, 141, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command as Ctrl-C does."""


class Parser(argparse.ArgumentParser):
    """Complains in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {' '.join(message.split())}; see --help.\n")


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
        from pruners.interface.suggest import UsageError

        lost = isinstance(error, ranks.RankLostError)
        status = EXIT_USAGE if isinstance(error, UsageError) else EXIT_FAILED
        if _all_have_met_it(error):
            return status
        if asked.debug:
            say(redaction.redacted(traceback.format_exc()))
        say(sentence(error))
        return status
    finally:
        forget()
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


def say(sentence: str) -> None:
    """To the user, naming the process where several were launched together."""
    rank = os.environ.get("RANK", "0")
    print(f"Process {rank}: {sentence}" if rank != "0" else sentence, file=sys.stderr)


def say_lines(lines: Sequence[str]) -> None:
    for line in lines:
        say(line)
