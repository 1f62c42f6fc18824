"""Weights & Biases, if requested: one run per cell, grouped by table. The record stays the truth.

Without an account, WANDB_MODE=offline keeps everything under results/wandb; `wandb sync` sends it later.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import wandb
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments.callbacks import Watcher
from experiments.cells import Cell
from experiments.store.records import Failure, Record
from experiments.store.redaction import cleaned

SECONDS_BETWEEN = 5.0  # progress more often than this is not sent
PATIENCE_SECONDS = 60  # for the service to start or to take what is left; the cells wait no longer


class Wandb(Watcher):
    """Needs what `wandb login` or the environment says, and never asks for it; a `ValueError` says what is missing.

    See `Watchers` for how the cells then go on.
    """

    def __init__(self, project: str, table: str, root: Path) -> None:
        self.project, self.table, self.folder = project, table, root
        self.run: Any = None
        self.name, self.sent = "", 0.0

    def started(self, cell: Cell, resumed: int) -> None:
        self._close(exit_code=1)
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with _nobody_to_ask():
                self.run = wandb.init(
                    project=self.project,
                    group=self.table,
                    name=cell.label,
                    job_type="cell",
                    dir=self.folder,
                    config={"cell": cell.id, "table": self.table, "resumed": resumed, **cleaned(cell.run.spec())},
                    settings=wandb.Settings(
                        silent=True, console="off", init_timeout=PATIENCE_SECONDS, finish_timeout=PATIENCE_SECONDS
                    ),
                )
        except wandb.errors.UsageError as error:
            raise ValueError(
                f"Weights & Biases did not start ({str(error).rstrip('.')}); run `wandb login`, set WANDB_API_KEY, or "
                "keep its runs on this disk with WANDB_MODE=offline."
            ) from error

    def stage(self, name: str) -> None:
        self.name, self.sent = name, 0.0

    def progress(self, done: int, total: int) -> None:
        if self.run and (done == total or time.monotonic() - self.sent > SECONDS_BETWEEN):
            self.sent = time.monotonic()
            self.run.log({f"progress/{self.name}": done / total})

    def finished(self, record: Record, path: Path) -> None:
        if not self.run:
            return
        self.run.log(_numbers(record) | _figures(record))
        artifact = wandb.Artifact(f"{record.table}-{record.id}", type="record")
        artifact.add_file(str(path))
        self.run.log_artifact(artifact)
        self._close(exit_code=0)

    def failed(self, failure: Failure) -> None:
        if self.run:
            self.run.summary["failure"] = failure.message
        self._close(exit_code=1)

    def _close(self, exit_code: int) -> None:
        if self.run:
            self.run.finish(exit_code=exit_code)
        self.run = None


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Without a terminal at standard input wandb refuses where it would wait for an answer, which may never come."""
    asked = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            yield
        finally:
            sys.stdin = asked


def _numbers(record: Record) -> dict[str, float]:
    """Every single number of the record by its path, e.g. `wikitext2/test@128/perplexity`."""
    found = {f"seconds/{stage}": value for stage, value in record.cost.seconds.items()}
    found["peak_bytes"] = record.cost.peak_bytes
    for name, values in {"achieved": {**record.achieved, "sparsity": record.sparsity}, **record.measures}.items():
        found |= {f"{name}/{key}": value for key, value in values.items() if isinstance(value, int | float)}
    return found


def _figures(record: Record) -> dict[str, Any]:
    """Sparsity by projection, and the spread of the windows' losses."""
    figures: dict[str, Any] = {
        f"{key}/nll_per_window": wandb.Histogram(value["nll_per_window"])
        for key, value in record.measures.items()
        if value.get("nll_per_window")
    }
    if projections := record.achieved.get("projections"):
        axes = (figure := Figure(figsize=(7, 3), layout="constrained")).subplots()
        axes.plot([projection["achieved"] for projection in projections], ".", markersize=3)
        axes.set(xlabel="projection, in the order of the blocks", ylabel="sparsity after pruning", ylim=(0, 1))
        (canvas := FigureCanvasAgg(figure)).draw()  # handed over as pixels: wandb looks for pyplot in a figure
        figures["sparsity"] = wandb.Image(np.asarray(canvas.buffer_rgba()))
    return figures
