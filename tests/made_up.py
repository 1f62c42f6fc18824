"""Made-up records for any cell of any table: every measure has numbers of its kind, drawn from the cell's id."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import small_table as small

from analysis.rows import Row
from eval.answers import write_samples
from experiments.cells import Cell, cells
from experiments.data.eval_tasks import documents
from experiments.models import catalogue
from experiments.recovery import Retraining
from experiments.spec import Efficiency, Generation, MaskPatterns, Perplexity, Run, Table, ZeroShot
from experiments.store import records

WINDOWS = 8
SHA = "ab" * 32
MATRICES = ("self_attn.q_proj", "mlp.down_proj")


def fill(table: Table, root: Path, *, answers: bool = True, every: int = 1, runs: Sequence[Run] | None = None) -> int:
    """A record for every cell, or for those of `runs`, or for one of `every` so many; how many there are."""
    found = cells(table.runs() if runs is None else runs, table)[::every]
    for cell in found:
        records.write(_record(table, cell, root, answers), root)
    return len(found)


def rows(table: Table) -> list[Row]:
    """The table's rows with such records, without a disk and without single answers."""
    found = cells(table.runs(), table)
    made = [_record(table, cell, Path(), answers=False) for cell in found]
    return [
        Row(*cell.title, cell.run, one, None, words=cell.words, called=cell.label)
        for cell, one in zip(found, made, strict=True)
    ]


def _record(table: Table, cell: Cell, root: Path, answers: bool) -> records.Record:
    run, draw = cell.run, random.Random(cell.id)
    measures: dict[str, dict[str, Any]] = {}
    for what in run.measures:
        measures |= _measured(what, draw, cell, table, root, answers)
    identity = {"hub": "made/up", "revision": "c" * 40} if run.model in catalogue.CATALOGUE else {}
    asked = run.method.asked if run.method else 0.0
    achieved: dict[str, Any] = {"asked": asked, "sparsity": asked}
    if isinstance(run.recovery, Retraining):
        achieved["recovery"] = {"losses": [3.0, 2.5, 2.2], "seconds": 60.0, "processes": 1}
    record = small.record(run, measures=measures, achieved=achieved)
    spec = run.spec(identity)
    return record.model_copy(update={"table": table.name, "spec": spec, "id": records.digest(spec)})


def _measured(
    what: Any, draw: random.Random, cell: Cell, table: Table, root: Path, answers: bool
) -> dict[str, dict[str, Any]]:
    if isinstance(what, Perplexity):
        likelihoods = [draw.uniform(1.5, 4.0) for _ in range(WINDOWS)]
        told = {"perplexity": draw.uniform(5, 50), "standard_error": 0.2, "windows": WINDOWS, "tokens": 256}
        return {what.key: {**told, "token_sha256": SHA, "nll_per_window": likelihoods}}
    if isinstance(what, ZeroShot):
        scores = {
            what.task_key(task, metric): {"score": draw.random(), "standard_error": 0.01, "truncated": 0,
                                          "documents_sha256": SHA, "documents": what.limit or documents(task) or 4}
            for task, metric in what.metrics
        }  # fmt: skip
        mean: dict[str, Any] = {"missing": {}, "lm_eval": "0"}
        if what.convention:
            mean |= {"score": draw.random(), "standard_error": 0.01}
        if answers:
            mean["samples"] = _samples(what, records.folder(root, table.name) / f"{cell.id}.jsonl.gz")
        return {**scores, what.key: mean}
    if isinstance(what, Efficiency):
        return {what.key: {name: draw.uniform(1e9, 7e9) for name in what.shown} | {"macs_tokens": 64}}
    if isinstance(what, Generation):
        row = {"prompt": "a", "decoding": "greedy", "text": "b", "distinct_1": 0.5, "distinct_2": 0.5, "repeated_4": 0}
        return {what.key: {"continuations": [row], "distinct_2": 0.5, "repeated_4": 0.0}}
    if not isinstance(what, MaskPatterns):
        return {what.key: {"documents": 4, "prompts": 8, "truncated": 0} | {name: draw.random() for name in what.shown}}
    told = {name: {"rows": [1.0], "columns": [2.0]} for name in MATRICES}
    maps = {name: ["0199", "9901"] for name in MATRICES}
    return {what.key: {"block": 0, "maps": maps, "matrices": told, "column_dispersion": 2.0}}


def _samples(what: ZeroShot, path: Path) -> dict[str, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        path.write_bytes(_answers(what.metrics))
    return {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@lru_cache
def _answers(metrics: tuple[tuple[str, str], ...]) -> bytes:
    import tempfile

    rows = [{"task": task, "document": n, metric: float(n % 2)} for task, metric in metrics for n in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answers.jsonl.gz"
        write_samples(rows, path)
        return path.read_bytes()
