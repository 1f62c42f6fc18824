"""Unfinished work that a cell resumes from: its own, or that of another cell with the same schedule."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import measures, models, provenance
from experiments.data import corpora
from experiments.recovery import Retraining, schedule
from experiments.spec import Run
from experiments.store import code, records
from experiments.store.described import digest
from pruners.lazy import torch

if TYPE_CHECKING:
    from experiments.cells import Cell
    from experiments.settings import Settings


def unfinished(root: Path, table: str, id: str) -> Path:
    """The folder of what a killed cell resumes from; of no use once its record is written."""
    return root / ".cache" / "unfinished" / table / id


def begun(run: Run, id: str, table: str, settings: Settings) -> Path:
    """The part of the pruning and retraining in `unfinished` that was made as it would be made now."""
    made_by = {"method": code.method(run.method), "recovery": code.recovery(run.recovery)}
    return unfinished(settings.root, table, id) / _origin(made_by, _trained_on(run), settings)


def answers(run: Run, id: str, table: str, settings: Settings) -> Path:
    """The part of the evaluation in `unfinished` that was made as it would be made now; a file names its model."""
    made_by = [code.measure(what) for what in run.measures]
    return unfinished(settings.root, table, id) / _origin({"measures": made_by}, [], settings)


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
    return list(dict.fromkeys([*read, *_trained_on(run)]))


def _trained_on(run: Run) -> list[str]:
    calibration = [run.windows.corpus] if run.windows and run.calibrates else []
    return [*calibration, *(run.recovery.corpora if isinstance(run.recovery, Retraining) else [])]


def _shared(whole: Run, identity: dict[str, Any]) -> str:
    return f"steps of {whole.id(identity)}"


def _origin(made_by: dict[str, Any], corpora_read: Sequence[str], settings: Settings) -> str:
    """What could make the finished part of a broken-off cell differ from the rest, beside the cell itself."""
    data = {name: corpora.provenance(name, settings.data_dir) for name in corpora_read}
    device = provenance.device_name(torch.device(settings.place))
    return digest({"data": data, "code": made_by, "device": device, "packages": code.packages()})
