"""A job on several GPUs: starts a process of `slurm.rank` on each, and says why one of them failed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments import callbacks, cards
from experiments.callbacks import Events
from experiments.store import atomic
from pruners.run import ranks

SIGNALS = "SIGINT,SIGHUP,SIGQUIT"  # which end a launch; SIGTERM announces that Slurm will, and work goes on until then


class ProcessFailedError(RuntimeError):
    """A process of a launch failed or was killed, which has ended the others."""


def run(count: int, payload: Mapping[str, Any], log: Events, said: str) -> None:
    """`count` processes that do the work of `payload`, the plain fields of a Work; `said` names the file that has what
    they say, if there is one.

    Raises ProcessFailedError with the sentence that is written to the job's `log` of events, too, unless they were
    told to stop: then Slurm knows why.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    told = log.path.with_name(log.path.name.replace(".events.jsonl", ".work.json"))
    atomic.write(told, json.dumps(dict(payload)))
    if said:
        os.environ[ranks.LOG] = said
    before = len(callbacks.read(log.path))
    try:
        cards.start(count, [str(told)], "slurm.rank", SIGNALS)
    except ChildFailedError as error:
        statuses = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if set(statuses.values()) == {-signal.SIGTERM}:  # as where all processes of a job are told that it will end
            raise ProcessFailedError("All processes received a signal to stop.") from None
        message = _why(count, statuses, log.path, before)
        log.write("job failed", message=message)
        raise ProcessFailedError(message) from None


def _why(count: int, statuses: Mapping[int, int], events: Path, before: int) -> str:
    """A process that was killed says nothing; of those that say why they end, one that met no lost process."""
    for rank, status in sorted(statuses.items()):
        if status < 0 and -status != signal.SIGTERM:
            why = ", usually for running out of memory" if -status == signal.SIGKILL else ""
            return (
                f"Process {rank} of {count} was killed ({signal.Signals(-status).name}){why}; submit again; "
                "finished cells are kept."
            )
    failed = [event for event in callbacks.read(events)[before:] if event["event"] == "rank failed"]
    for event in sorted(failed, key=lambda event: event["lost"]):
        return f"Process {event['rank']} of {count}: {event['message']}"
    told = ", ".join(f"{status} of process {rank}" for rank, status in sorted(statuses.items()))
    return f"One of {count} processes ended early (exit status {told}); see `logs` for its output."
