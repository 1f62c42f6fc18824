"""Where and how cells run; nothing here moves a number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pruners.interface import checks
from pruners.interface.checks import AnyPath, Count, Flag, Folder, Text
from pruners.run import ranks

WEIGHTS = ("device", "host", "disk", "auto")


@dataclass(frozen=True)
class Settings:
    """Where and how cells run; nothing here moves a number.

    `root` is the results folder; `device` None is CUDA where there is some (`place` says), of several processes
    launched together each its own.  ValueError for a device that is not there.  `again` makes records again that other
    code of their method or measures made, or that do not tell.  `save` says, by the ids of cells, in which new folder a
    cell's model is to be kept; a cell whose folder is not there yet is run, whether or not it has a record.  `weights`
    is where they are while they are not used: device, host (CPU memory), disk, or auto by the room that there is.
    """

    root: AnyPath = Path("results")
    device: Text | None = None
    batch_size: Count = 8
    data_dir: Folder | None = None
    dense_gate: Flag = True
    again: Flag = False
    save: Mapping[str, Path] = field(default_factory=dict)
    weights: Text = "auto"

    def __post_init__(self) -> None:
        checks.fields(self)
        checks.mapping("Settings: save", self.save, "folders by the ids of cells")
        checks.choice("weights", self.weights, WEIGHTS)
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "data_dir", None if self.data_dir is None else Path(self.data_dir))
        if self.device is not None or ranks.launched() > 1:
            object.__setattr__(self, "device", _device(self.device))

    @property
    def place(self) -> str:
        """The device by torch's name; not looked for before a cell is to run, as it takes torch to do so."""
        return self.device or _device(None)


def _device(asked: str | None) -> str:
    """Raises ValueError, listing what there is, for a device that torch does not know or does not have."""
    import torch

    found = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    name = f"cuda:{ranks.local_rank()}" if asked == "cuda" or (asked is None and len(found) > 1) else asked or "cpu"
    if name not in found:
        raise ValueError(
            f"There is no device {name!r} here; found {', '.join(found)}."
            + (" Launch at most one process per GPU." if ranks.local_rank() else "")
        )
    if asked == name != "cpu" and ranks.launched() > 1:
        raise ValueError(f"{ranks.launched()} processes cannot share {name}; leave --device out, or use --device cpu.")
    return name
