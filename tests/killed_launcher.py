"""`python -m slurm` that is killed with -9 at the moment named first; for the tests of what is left then."""

from __future__ import annotations

import os
import signal
import sys

import slurm_driver

from slurm import launch, ledger
from slurm.__main__ import main


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    slurm_driver.prepare()
    if sys.argv[1] == "before the cluster was asked":
        launch.SENDERS["slurm"] = die  # type: ignore[assignment]
    else:
        write = ledger.write
        ledger.write = lambda entry: die() if entry.complete else write(entry)
    main(sys.argv[2:])
