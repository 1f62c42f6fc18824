"""Runs a table's cells: what has a record is never done again, and one failure stops nothing else."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

from filelock import Timeout

from experiments import errors, measures, models
from experiments.callbacks import Watcher, Watchers
from experiments.cells import Cell, ordered
from experiments.models import kept
from experiments.own import saved
from experiments.placement import several
from experiments.progress import Board, duration
from experiments.recovery import Retraining
from experiments.resume import unfinished
from experiments.settings import Settings
from experiments.store import atomic, code, elsewhere, found, records
from experiments.store.locks import held
from experiments.store.records import Failure, Record
from pruners.retrain import Reconstruction
from pruners.run import ranks
from pruners.run.ranks import RankLostError, Ranks

_PLACES = count()  # where ranks tell each other that a cell has failed
WAIT_SECONDS = 60.0  # for another process at a cell, before the other ranks of this launch are told that it goes on


@dataclass
class Outcome:
    """Labels of the cells that were found finished, that finished now, and that failed.

    `incomplete` are those of the first two whose record lacks a task.
    """

    found: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)

    def add(self, other: Outcome) -> None:
        """Those of other cells of the same table."""
        for name, labels in vars(other).items():
            getattr(self, name).extend(labels)


def run_table(
    table: str,
    chosen: Sequence[Cell],
    settings: Settings,
    watchers: Sequence[Watcher] = (),
) -> Outcome:
    """Run the chosen cells that have no record; one that fails does not stop the others, nor does a watcher.

    A cell that another table has a record of, from the same texts and code, is taken over from there.
    A record that lacks tasks whose documents have turned up since, or that was made from other texts than this run
    would read, is made again, and with `settings.again` one that other code of its method or measures made.
    Two processes may run the same table: each cell is done by one of them.  The ranks of a launch run each cell
    together: rank 0 says which, keeps it, and alone has an outcome to tell.
    Raises StorageError before any work where there is some and the results folder cannot be written, ValueError for
    cells that so many ranks cannot share, RankLostError where one is lost.
    """
    together = ranks.here(settings.device or "cpu")
    refuse_unshared(chosen, together.count)
    with kept.lasting():
        if together.rank:
            _run_along(table, chosen, settings, together)
            return Outcome()
        return _run_first(table, chosen, settings, watchers, together)


def _run_first(
    table: str, chosen: Sequence[Cell], settings: Settings, watchers: Sequence[Watcher], together: Ranks
) -> Outcome:
    """Of rank 0, which lets the others go at the end."""
    try:
        outcome = _run_table(table, chosen, settings, watchers, together)
    except RankLostError:
        raise
    except Exception:
        together.first(lambda: None)
        raise
    together.first(lambda: None)
    return outcome


def refuse_unshared(chosen: Sequence[Cell], processes: int) -> None:
    """ValueError for cells that so many processes cannot share, before any of them is pruned."""
    if processes == 1:
        return
    if rebuilt := [cell.label for cell in chosen if isinstance(cell.run.recovery, Reconstruction)]:
        raise ValueError(
            f"Block-wise reconstruction runs in one process, and {processes} were launched for {rebuilt[0]}"
            f"{f' and {len(rebuilt) - 1} more cells' if rebuilt[1:] else ''}; run these cells with one "
            "process, and the others with --only."
        )
    trained = [(cell, cell.run.recovery) for cell in chosen if isinstance(cell.run.recovery, Retraining)]
    if uneven := [(cell, recovery) for cell, recovery in trained if not several.shared_by(cell.run, processes)]:
        (cell, recovery), *others = uneven
        more = f" and {len(others)} more cells" if others else ""
        parts = f" in micro-batches of {recovery.batch_size // recovery.shared}" if recovery.reference else ""
        raise ValueError(
            f"{processes} processes cannot share a batch of {recovery.batch_size}{parts} evenly, which "
            f"{cell.label}{more} would need; launch a divisor or a multiple of the batch size, or choose "
            "cells with --only."
        )


def finished(chosen: Sequence[Cell], known: Mapping[str, Record], settings: Settings) -> dict[str, Record]:
    """Of these cells, by id, the records that are to be kept and whose model is where it was asked for."""
    standing = found.finished(chosen, known, settings.root, settings.data_dir, settings.again)
    return {id: record for id, record in standing.items() if _is_kept(record, settings)}


def _run_along(table: str, chosen: Sequence[Cell], settings: Settings, together: Ranks) -> None:
    """Of the other ranks: every cell that rank 0 names, until it lets them go."""
    from experiments.run import execute

    cells = {cell.id: cell for cell in chosen}
    while told := together.first(lambda: None):
        if told["cell"] is None:  # rank 0 waits for another process
            continue
        try:
            execute(cells[told["cell"]].run, table, settings, Board(silent=True))
        except RankLostError:
            raise
        except Exception:
            if not together.met(told["place"]):
                raise


def _run_table(
    table: str, chosen: Sequence[Cell], settings: Settings, watchers: Sequence[Watcher], together: Ranks
) -> Outcome:
    known = records.load(settings.root, table)
    recorded = [(cell, known[cell.id]) for cell in chosen if cell.id in known]
    standing = finished(chosen, known, settings)
    if any(cell.id not in standing for cell in chosen):
        atomic.check_writable(records.folder(settings.root, table))
    unmade = [cell for cell in chosen if cell.id not in standing and _adoptable(cell, table, settings)]
    taken = elsewhere.adopt_all(settings.root, table, unmade, settings.data_dir)
    standing |= taken
    todo = ordered([cell for cell in chosen if cell.id not in standing])
    outcome, watcher = Outcome([cell.label for cell in chosen if cell.id in standing]), Watchers(watchers)
    with Board([cell.work for cell in todo], _pace(chosen, standing), watcher) as board:
        for line in found.lines(
            [pair for pair in recorded if pair[0].id not in taken], settings.root, settings.data_dir, settings.again
        ):
            board.say(line)
        if taken:
            board.say(f"Reused from other tables: {len(taken)} of {len(chosen)} cells.")
        code.load(cell.run for cell in todo)
        worker = _Worker(table, settings, board, outcome, watcher, together)
        busy = [cell for cell in todo if not worker.attempt(cell, wait=False)]
        for cell in busy:
            board.say(f"Waiting for another process that runs {cell.label}.")
            while not worker.attempt(cell, wait=True):
                together.first(lambda: {"cell": None})
        known = records.load(settings.root, table)
        made = [(cell.label, known[cell.id]) for cell in chosen if cell.id in known]
        outcome.incomplete += [label for label, record in made if measures.missing(record.measures)]
        for line in found.incomplete(made):
            board.say(line)
    return outcome


@dataclass(frozen=True)
class _Worker:
    table: str
    settings: Settings
    board: Board
    outcome: Outcome
    watcher: Watcher
    together: Ranks

    def attempt(self, cell: Cell, *, wait: bool) -> bool:
        """False if another process is at this cell; one that cannot be begun has failed."""
        try:
            with self._started(cell, wait=wait) as resumed:
                if self._is_done(cell):
                    self.outcome.found.append(cell.label)
                    self.board.finish(cell.work, f"{cell.label}: done by another process")
                else:
                    self._run(cell, resumed)
        except Timeout:
            return False
        except atomic.StorageError as error:
            self.watcher.started(cell, 0)
            self._fail(cell, error)
            self._refuse_full(error)
        return True

    def _is_done(self, cell: Cell) -> bool:
        """Another process may have been faster, for this table or for another one."""
        root, data_dir = self.settings.root, self.settings.data_dir
        record = records.find(root, self.table, cell.id)
        if record is not None and finished([cell], {cell.id: record}, self.settings):
            return True
        return (
            _adoptable(cell, self.table, self.settings)
            and elsewhere.adopt(root, self.table, cell, data_dir) is not None
        )

    def _run(self, cell: Cell, resumed: int) -> None:
        from experiments.run import execute  # with the libraries, which nobody waits for where all is done

        started, place = time.monotonic(), f"failed/{next(_PLACES)}"
        self.board.begin(cell.label)
        self.watcher.started(cell, resumed)
        try:
            self.together.first(lambda: {"cell": cell.id, "place": place})
            record = execute(cell.run, self.table, self.settings, self.board, resumed)
        except (BrokenPipeError, RankLostError):  # nobody reads, or a process is lost: no fault of the cell
            raise
        except Exception as error:  # whatever it was, the other cells go on and the table shows it
            self._fail(cell, error)
            if not self.together.met(place):
                raise RankLostError(
                    f"{errors.sentence(error)} The other processes did not meet this error, and stop."
                ) from error
            self._refuse_full(error)
        else:
            shutil.rmtree(unfinished(self.settings.root, self.table, cell.id), ignore_errors=True)
            self.outcome.done.append(cell.label)
            self.watcher.finished(record, records.path_of(record, self.settings.root))
            seconds = time.monotonic() - started
            self.board.finish(cell.work, f"{cell.label}: {record.headline} in {duration(seconds)}")

    @contextmanager
    def _started(self, cell: Cell, *, wait: bool) -> Iterator[int]:
        """Hold the cell; yields how often it was started before and broken off.

        Another process at it is waited for, once there is no other cell to do: both would write the same unfinished
        state.  Of two jobs of a cluster none waits so, as a cell that one has is not sent with the other.
        """
        place = self.settings.root / ".cache" / "started" / self.table
        patience = (WAIT_SECONDS if self.together.count > 1 else -1) if wait else 0
        everywhere = held(place.parent / f"{cell.id}.lock", patience)  # whatever table asks for it
        with held(place / f"{cell.id}.lock", patience), everywhere:
            marker = place / cell.id
            before = marker.read_bytes().count(b".") if marker.is_file() else 0
            atomic.write(marker, "." * (before + 1))
            yield before
            with suppress(OSError):  # somebody removed the folder; the cell is done
                marker.unlink()

    def _refuse_full(self, error: Exception) -> None:
        """StorageError, which ends the table, where no cell could be kept any more: its work would be for nothing."""
        if isinstance(error, atomic.StorageError):
            try:
                atomic.check_writable(records.folder(self.settings.root, self.table))
            except atomic.StorageError as full:
                told = f"{str(full).rstrip('.')}. The other cells were not begun; the same command runs them"
                raise atomic.StorageError(f"{told} once records can be written.") from error

    def _fail(self, cell: Cell, error: Exception) -> None:
        self.outcome.failed.append(cell.label)
        self._keep_failure(cell, error)
        self.board.finish(cell.work, f"{cell.label}: failed: {errors.sentence(error)}")

    def _keep_failure(self, cell: Cell, error: Exception) -> None:
        failure = Failure(
            id=cell.id,
            table=self.table,
            spec=cell.run.spec(models.identity(cell.run.model)),
            message=errors.sentence(error),
            traceback=errors.last_lines(error),
            at=records.now(),
        )
        self.watcher.failed(failure)
        root, data_dir, again = self.settings.root, self.settings.data_dir, self.settings.again
        record = records.find(root, self.table, cell.id)
        if record is not None and found.stands(record, cell.run, root, data_dir, again):
            return  # only its model could not be kept
        try:
            records.write_failure(failure, self.settings.root)
        except atomic.StorageError as second:
            self.board.say(str(second))


def _is_kept(record: Record, settings: Settings) -> bool:
    """Whether the model that this record measured lies where it is wanted, if it is."""
    return record.id not in settings.save or saved.holds(settings.save[record.id], record)


def _adoptable(cell: Cell, table: str, settings: Settings) -> bool:
    """Whether another table's record would do: its model is where it is wanted, if it is."""
    if cell.id not in settings.save:
        return True
    record = elsewhere.known(settings.root, table, cell, settings.data_dir)
    return record is not None and _is_kept(record, settings)


def _pace(chosen: Sequence[Cell], finished: Mapping[str, Record]) -> float | None:
    """Seconds per unit of work in the records at hand; None without one."""
    known = [(finished[cell.id].cost.seconds["total"], cell.work) for cell in chosen if cell.id in finished]
    return sum(seconds for seconds, _ in known) / sum(work for _, work in known) if known else None
