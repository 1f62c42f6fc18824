"""Where a cell finds what it had reached when it was broken off, or what another cell of its schedule has reached."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from experiments import corpora, cost, measures, models, records
from experiments.recovery import Retraining, schedule
from experiments.spec import Run, digest

if TYPE_CHECKING:
    from experiments.cells import Cell
    from experiments.run import Settings


def unfinished(root: Path, table: str, id: str) -> Path:
    """The folder of what a killed cell resumes from; of no use once its record is written."""
    return root / ".cache" / "unfinished" / table / id


def begun(run: Run, id: str, table: str, settings: Settings) -> Path:
    """The part of `unfinished` that was made as it would be made now."""
    return unfinished(settings.root, table, id) / _origin(run, settings)


def steps(run: Run, id: str, table: str, settings: Settings) -> Path:
    """Where the cell's retraining keeps its state: one place for all that stop the same schedule, each at its step."""
    whole = schedule(run)
    if whole is None:
        return begun(run, id, table, settings) / "retrained"
    return begun(whole, _shared(whole, models.identity(run.model)), table, settings)


def tidy(root: Path, table: str, cells: Sequence[Cell]) -> None:
    """Remove the state of schedules all of whose cells have a record; `cells` are the table's."""
    done = records.load(root, table)
    stopped = [(whole, cell.id in done) for cell in cells if (whole := schedule(cell.run))]
    for finished in {whole for whole, _ in stopped} - {whole for whole, is_done in stopped if not is_done}:
        shutil.rmtree(unfinished(root, table, _shared(finished, models.identity(finished.model))), ignore_errors=True)


def read_by(run: Run) -> list[str]:
    """The corpora that a cell reads, by name."""
    read = [name for what in run.measures for name in measures.corpora_of(what)]
    if run.windows and run.calibrates:
        read.append(run.windows.corpus)
    if isinstance(run.recovery, Retraining):
        read.append(run.recovery.text.corpus)
    return list(dict.fromkeys(read))


def _shared(whole: Run, identity: dict[str, Any]) -> str:
    return f"steps of {whole.id(identity)}"


def _origin(run: Run, settings: Settings) -> str:
    """What could make the finished part of a broken-off cell differ from the rest, beside the cell itself."""
    data = {name: corpora.provenance(name, settings.data_dir) for name in read_by(run)}
    where = {"device": cost.device_name(torch.device(settings.device or "cpu")), "torch": torch.__version__}
    return digest({"data": data, "code": cost.commit(), **where})
