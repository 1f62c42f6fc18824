"""What a cell costs and where it ran: stage seconds, peak memory, commit, device, package versions."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from importlib import metadata
from pathlib import Path

from pruners.lazy import torch

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "accelerate", "lm-eval", "triton")
OF_A_HOOK = (  # where another repository lies, as `git rev-parse --local-env-vars` lists it without its settings
    "GIT_ALTERNATE_OBJECT_DIRECTORIES", "GIT_CONFIG", "GIT_OBJECT_DIRECTORY", "GIT_DIR", "GIT_WORK_TREE",
    "GIT_IMPLICIT_WORK_TREE", "GIT_GRAFT_FILE", "GIT_INDEX_FILE", "GIT_NO_REPLACE_OBJECTS", "GIT_REPLACE_REF_BASE",
    "GIT_PREFIX", "GIT_INTERNAL_SUPER_PREFIX", "GIT_SHALLOW_FILE", "GIT_COMMON_DIR",
)  # fmt: skip
REPOSITORY = Path(__file__).resolve().parents[1]


class Stages:
    """Seconds per stage of one cell, and the peak memory since it was made."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()
        _forget_peak()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        for index in _used():
            torch.cuda.synchronize(index)
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - started, 3)

    def add(self, name: str, seconds: float) -> None:
        """Seconds of that stage that another process has spent."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self.started -= seconds

    def take_over(self, seconds: Mapping[str, float]) -> None:
        """The stages of the cell that made this one's model; what is told of a part of a stage is in that stage's."""
        for name, spent in seconds.items():
            if "/" in name:
                self.seconds[name] = spent
            else:
                self.add(name, spent)

    def finished(self) -> dict[str, float]:
        return {**self.seconds, "total": round(time.perf_counter() - self.started, 3)}


def peak_bytes(device: torch.device) -> int:
    """Of the accelerator's allocator on CUDA; elsewhere the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _used() -> list[int]:
    """The GPUs on which this process has memory; asking others to wait would take some of theirs."""
    if not torch.cuda.is_available():
        return []
    return [index for index in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(index)]


def _forget_peak() -> None:
    for index in _used():
        torch.cuda.reset_peak_memory_stats(index)
    with suppress(OSError):  # Linux forgets a process's peak when asked; elsewhere it covers the cells before as well
        Path("/proc/self/clear_refs").write_text("5")


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"cuda ({torch.cuda.get_device_name(device)})"
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"


def packages() -> dict[str, str]:
    """Versions of what moves numbers; a package that is not installed is left out."""
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = version(name)
    return found


@cache  # of what this process runs on, whatever is installed meanwhile
def version(package: str) -> str:
    """As installed, torch with the build that it is; PackageNotFoundError where it is not."""
    return str(torch.__version__) if package == "torch" else metadata.version(package)


@cache  # likewise
def commit() -> tuple[str | None, bool | None]:
    """The commit of this code and whether tracked files outside results/ differ from it; None without git."""
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    head = _git("rev-parse", "HEAD")
    return head, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    with suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(REPOSITORY), *arguments]
        ours = {name: value for name, value in os.environ.items() if name not in OF_A_HOOK}
        return subprocess.run(command, capture_output=True, text=True, check=True, env=ours).stdout.strip()
    return None
