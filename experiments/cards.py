"""Several GPUs of this machine: starts the same command once for each, as torchrun does."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from pruners.interface.suggest import UsageError
from pruners.run import ranks

SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"
ROOT = Path(__file__).resolve().parents[1]


def wanted(count: int, device: str | None) -> bool:
    """Whether processes are to be started for so many cards; False in one of them.

    Raises UsageError where this machine has fewer, ValueError in a launch of another number.
    """
    if "WORLD_SIZE" in os.environ:
        if count > 1 and ranks.launched() != count:
            raise ValueError(
                f"--cards {count} was given to one of {ranks.launched()} launched processes; leave --cards out under "
                "torchrun, or unset WORLD_SIZE."
            )
        return False
    if count == 1:
        return False
    if device not in (None, "cpu", "cuda"):
        raise UsageError(
            f"--cards {count} uses the first {count} GPUs, and --device {device} names one; drop one of the "
            "two options."
        )
    import torch

    there = torch.cuda.device_count()
    if device != "cpu" and there < count:
        raise UsageError(
            f"--cards {count} was given and this machine has {there or 'no'} GPU{'s' * (there != 1)}; use "
            "fewer, or --device cpu for the same number of processes without GPUs."
        )
    return True


def run(count: int, words: Sequence[str]) -> int:
    """The exit status of `count` processes `python -m experiments words`, of which the first is heard."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        start(count, words, "experiments")
    except ChildFailedError as error:
        said = [failure.exitcode for _, failure in sorted(error.failures.items()) if failure.exitcode > 0]
        return said[0] if said else 1  # the others were stopped once one had failed
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0


def start(count: int, words: Sequence[str], module: str, stopped_by: str = SIGNALS) -> None:
    """`count` processes `python -m module words` as torchrun starts them, until all have ended or one of the signals
    `stopped_by` has come, which then stops them.

    Raises torch's ChildFailedError with their exit statuses once one fails, which ends the others.
    """
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say what there is to say
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle=stopped_by,
    )
    elastic_launch(config, sys.executable)("-m", module, *words)
