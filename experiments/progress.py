"""Progress display of a table: bars and the time left on a terminal, one plain line per cell elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from experiments.callbacks import Watcher

Callback = Callable[[int, int], None]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command, which knows its exit status; rich would end the process with 1."""
        raise  # the error at hand


class Board:
    """`works` is the rough work of every cell to come; `seconds_per_work` what is known before the first is done.

    `watcher` is told of stages and of their progress.
    """

    def __init__(
        self,
        works: Sequence[float] = (),
        seconds_per_work: float | None = None,
        watcher: Watcher | None = None,
        silent: bool = False,
    ) -> None:
        self.watcher = watcher or Watcher()
        self.console = _Console(stderr=True, soft_wrap=True, highlight=False, markup=False, quiet=silent)
        self.total, self.cells = sum(works), len(works)
        self.finished_work, self.finished_cells, self.partial = 0.0, 0, 0.0
        self.prior, self.label = seconds_per_work, ""
        self.said: set[Hashable] = set()
        self.started = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"))
        self.bars = Progress(*columns, console=self.console, disable=not self.console.is_terminal, transient=True)
        self.overall = self.bars.add_task("cells", total=self.total or None, note="")
        self.current = self.bars.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> Board:
        self.started = time.monotonic()
        self.bars.start()
        self._show()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.bars.stop()

    def begin(self, label: str) -> None:
        """The next cell."""
        self.label = label

    def stage(self, name: str, work: float = 0.0) -> Callback:
        """Start a stage of the current cell that counts as `work`; call the result with (done, total)."""
        before = self.partial
        self.watcher.stage(name)
        description = f"{self.label}: {name}" if self.label else name
        self.bars.update(self.current, description=description, completed=0, total=None, note="", visible=True)

        def advance(done: int, total: int) -> None:
            self.partial = before + work * done / total
            self.watcher.progress(done, total)
            self.watcher.pace(done / total if total else 1.0, self.seconds_left())
            self.bars.update(self.current, completed=done, total=total, note=f"{done}/{total}")
            self._show()

        return advance

    def note(self, text: str) -> None:
        """Say how the current stage is going, beside its bar, until it advances."""
        self.bars.update(self.current, note=text)

    def finish(self, work: float, line: str) -> None:
        """The current cell is over, done or failed; say so."""
        self.finished_work, self.finished_cells, self.partial = self.finished_work + work, self.finished_cells + 1, 0.0
        self._show()
        left = f"; {self.left()}" if self.finished_cells < self.cells else ""
        self.say(f"[{self.finished_cells}/{self.cells}] {line}{left}")

    def say(self, line: str) -> None:
        self.console.print(line)

    def say_once(self, about: Hashable, line: str) -> None:
        """Whatever the line says then, only the first of what it is about."""
        if about not in self.said:
            self.said.add(about)
            self.say(line)

    def left(self) -> str:
        """E.g. `about 4 min left`."""
        seconds = self.seconds_left()
        return "time left unknown" if seconds is None else f"about {duration(seconds)} left"

    def seconds_left(self) -> float | None:
        """None where neither these cells nor earlier ones tell a pace."""
        done, elapsed = self.finished_work + self.partial, time.monotonic() - self.started
        known = self.finished_cells or done > 0.02 * self.total
        rate = elapsed / done if known and done else self.prior
        return None if rate is None else rate * max(0.0, self.total - done)

    def _show(self) -> None:
        done = min(self.finished_work + self.partial, self.total)
        self.bars.update(self.overall, completed=done, note=f"{self.finished_cells}/{self.cells}, {self.left()}")


def duration(seconds: float) -> str:
    """`40 s`, `4 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:,.1f} h"
