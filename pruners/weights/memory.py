"""How much memory is free, and tensors stored on disk where it does not suffice."""

from __future__ import annotations

import functools
import math
import resource
import tempfile
from contextlib import suppress
from pathlib import Path

from pruners.lazy import Tensor, torch

M_MMAP_THRESHOLD, LARGE = -3, 2**22  # malloc.h's number; bytes
SHARE = 0.5  # of the free memory that one large tensor may take


def free_bytes(device: torch.device | str = "cpu") -> int:
    """What a process may still take: of the accelerator, or of this machine within its limits and its cgroup's."""
    place = torch.device(device)
    if place.type == "cuda":  # what torch's allocator keeps of freed tensors is free, too
        kept = torch.cuda.memory_reserved(place) - torch.cuda.memory_allocated(place)
        return int(torch.cuda.mem_get_info(place)[0]) + kept
    return max(0, min(_machine(), _limit(), _cgroup()))


def total_bytes(device: torch.device | str) -> int:
    """Of an accelerator, used or not."""
    return int(torch.cuda.mem_get_info(torch.device(device))[1])


def roomy(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None = None) -> Tensor:
    """An empty tensor in CPU memory, or where that is short in a file under `folder` (None: temporary files' place).

    The file has no name any more, so that nothing stays of it.  Raises ValueError where neither has the room.
    """
    size = math.prod(shape) * dtype.itemsize
    if size <= SHARE * (free := free_bytes()):
        return torch.empty(shape, dtype=dtype)
    import shutil

    place = Path(folder or tempfile.gettempdir())
    place.mkdir(parents=True, exist_ok=True)
    if size > (room := shutil.disk_usage(place).free):
        raise ValueError(
            f"{size / 1e9:.1f} GB have to be stored, and there are {free / 1e9:.1f} GB of memory and "
            f"{room / 1e9:.1f} GB on the disk of {place}; free some, or take fewer or shorter calibration windows."
        )
    with tempfile.NamedTemporaryFile(dir=place, prefix=".aside-") as file:
        # shared, so that the pages are the file's own and count towards no limit of the process
        return torch.from_file(file.name, shared=True, size=math.prod(shape), dtype=dtype).view(shape)


@functools.cache
def give_back() -> None:
    """From now on what large tensors leave goes back to the system at once.

    glibc raises the size from which on it does so to 32 MB as soon as such a tensor is freed; smaller ones then come
    from a heap whose holes add up, block after block.  Other C libraries have no such call.
    """
    import ctypes

    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE)


def _machine() -> int:
    told = dict(line.split(":") for line in _lines("/proc/meminfo"))
    return int(told["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in told else 2**62


def _limit() -> int:
    """What RLIMIT_DATA and RLIMIT_AS leave."""
    status = dict(line.split(":", 1) for line in _lines("/proc/self/status") if ":" in line)
    left = [2**62]
    for which, used in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        most = resource.getrlimit(which)[0]
        if most != resource.RLIM_INFINITY and used in status:
            left.append(most - int(status[used].split()[0]) * 1024)
    return min(left)


def _cgroup() -> int:
    """What the process's own group of the second version leaves; file pages that the kernel may drop are free."""
    left = [2**62]
    for line in _lines("/proc/self/cgroup"):
        place = Path("/sys/fs/cgroup") / line.rpartition(":")[2].lstrip("/")
        with suppress(OSError, ValueError):
            most = int((place / "memory.max").read_text())
            stat = dict(pair.split() for pair in _lines(str(place / "memory.stat")))
            used = int((place / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
            left.append(most - used)
    return min(left)


def _lines(path: str) -> list[str]:
    with suppress(OSError):
        return Path(path).read_text(encoding="utf-8").splitlines()
    return []
