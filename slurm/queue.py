"""Reads Slurm's queue through its own commands; their error messages are passed on."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

OVER = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "REVOKED", "TIMEOUT",
}  # fmt: skip
PATIENCE_SECONDS = 120
REMEDIES = {
    r"Unable to contact slurm|connect failure|Connection refused|Communication connection failure": (
        "Is the controller running (scontrol ping)?  If so, SLURM_CONF must name the slurm.conf of its cluster."
    ),
    r"configuration (source|file)|Unable to (read|open) .*conf": (
        "Set SLURM_CONF to the slurm.conf of the cluster, or log in to a machine that belongs to it."
    ),
    r"munge|authentication credential": "Is munged running here, with the key of the cluster?",
}


class SlurmError(OSError):
    """Slurm could not be asked, or refused."""


@dataclass(frozen=True)
class Queued:
    """One line of the queue; `left` is the time to the limit, `reason` why it waits or ended."""

    state: str
    node: str
    left: str
    reason: str

    @property
    def over(self) -> bool:
        return self.state in OVER


def jobs(names: Sequence[str]) -> dict[str, Queued]:
    """Jobs of these names by id, array tasks as 12_3; Slurm forgets jobs some minutes after they ended.

    Tasks that were cancelled before they began are one line with the id of their array, 12.
    """
    if not names:
        return {}
    lines = ask(
        "squeue", "--noheader", "--array", "--states=all", f"--name={','.join(names)}", "--format=%i|%T|%N|%L|%r"
    ).splitlines()
    found = (line.strip().split("|", 4) for line in lines if line.strip())
    return {id: Queued(state, node, left, reason) for id, state, node, left, reason in found}


def largest_array(otherwise: int) -> int:
    """How many tasks this site allows in one array; `otherwise` where it does not say, and sbatch then does."""
    if not shutil.which("scontrol"):
        return otherwise
    with suppress(SlurmError):
        told = re.search(r"MaxArraySize\s*=\s*(\d+)", ask("scontrol", "show", "config"))
        return max(1, int(told[1]) - 1) if told else otherwise
    return otherwise


def cancel(ids: Sequence[str]) -> None:
    if ids:
        ask("scancel", *ids)


def cancel_named(name: str) -> None:
    ask("scancel", f"--name={name}")


def check() -> None:
    """Raises SlurmError where there is no Slurm to talk to."""
    if missing := [program for program in ("sbatch", "srun", "squeue", "scancel") if not shutil.which(program)]:
        raise SlurmError(
            f"{missing[0]} is not on the path, so jobs cannot be submitted from this machine: log in to one "
            "that can, or run the same "
            "jobs here with --executor local."
        )


def ask(*command: str) -> str:
    """Its output; raises SlurmError with its own words."""
    check()
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]} did not answer in {PATIENCE_SECONDS} s; try again later.") from None
    if done.returncode:
        raise refusal(command[0], done.stderr or done.stdout)
    return done.stdout


def refusal(program: str, text: str) -> SlurmError:
    """What that program wrote, and what to do about it where that is known."""
    found = (remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, text, re.IGNORECASE))
    said = f"{program} refused: {complaint(text)}"
    return SlurmError(f"{said.rstrip('.')}. {remedy}" if (remedy := next(found, "")) else said)


def complaint(text: str) -> str:
    """What Slurm's commands wrote to their error output, in one line."""
    return " ".join(line.strip() for line in text.splitlines() if "error:" in line.lower()) or " ".join(text.split())
