"""A real table that runs in a second, for tests of everything around the cells; and made-up records."""

from __future__ import annotations

import gzip
import json
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pruners
from experiments import cells
from experiments.batch import Outcome, run_table
from experiments.recovery import Retraining
from experiments.settings import Settings
from experiments.spec import Perplexity, Run, Table, Windows
from experiments.store import code, records
from experiments.store.described import digest
from pruners.retrain import Trainable

SHARED = Path(__file__).resolve().parents[1].parent / "shared"
MODEL = SHARED / "data" / "models" / "stories260K" / "hf"
WINDOWS = Windows("c4/train", count=4, length=32, seed=0)
PPL = Perplexity("ptb/test", window=64, limit=4)
METHODS = (
    None,
    pruners.Magnitude(sparsity=0.5),
    pruners.Wanda(sparsity=0.5),
    pruners.GBLM(sparsity=0.5),
    pruners.GBLM(pattern="2:4"),
)


def table(methods=METHODS, name="tiny", measures=(PPL,)) -> Table:
    return Table(name, "A tiny table", methods, ((str(MODEL),),), lambda m, model: Run(model, m, WINDOWS, measures))


def retrained() -> Table:
    """One pruned model whose norms are trained for eight steps."""
    recovery = Retraining(Trainable(norms=True), WINDOWS, steps=8, learning_rate=1e-3)
    plain = table((pruners.Wanda(sparsity=0.5),), "retrained")
    return replace(plain, run=lambda method, model: replace(plain.run(method, model), recovery=recovery))


def data(folder: Path) -> Path:
    """The first texts of two corpora as a data folder, so that reading them takes no time."""
    for source, target, count in (
        ("ptb/ptb_test.jsonl", "ptb/ptb_test.jsonl", 60),
        ("c4/c4_en_train_docs_0000-0799.jsonl", "c4/c4_en_train_docs_0000-0799.jsonl", 20),
    ):
        (folder / target).parent.mkdir(parents=True)
        (folder / target).write_text("".join(_lines(SHARED / "data" / source)[:count]))
    return folder


def run(root: Path, data_dir: Path, methods=METHODS) -> Outcome:
    """Run the whole table; importable, so that other processes can."""
    return run_table("tiny", cells.cells(table(methods).runs()), Settings(root, data_dir=data_dir))


def record(run: Run, **changes) -> records.Record:
    """A made-up record of this run, on a model that is in the catalogue."""
    spec = run.spec({"package": "made-up", "version": "1"})
    measured = {"perplexity": 25.0, "standard_error": 1.5, "windows": 4, "tokens": 256, "token_sha256": "ab" * 32}
    fields = {
        "achieved": {"asked": 0.5, "sparsity": 0.5 if run.method else 0.0},
        "measures": {measure.key: measured for measure in run.measures},
        "cost": records.Cost(seconds={"prune": 1.0, "total": 2.0}, peak_bytes=10**9),
        "made_by": records.MadeBy(
            commit="a" * 40, dirty=False, device="cpu", dtype=run.dtype, packages={"torch": "2"}, python="3", seed=0,
            batch_size=8, at=records.now(),
        ),
        "code": code.of(run),
    }  # fmt: skip
    return records.Record(**{"id": digest(spec), "table": "tiny", "spec": spec, **fields, **changes})


def failure(run: Run, message: str) -> records.Failure:
    spec = run.spec({"package": "made-up", "version": "1"})
    return records.Failure(
        id=digest(spec), table="tiny", spec=spec, message=message, traceback=["boom"], at=records.now()
    )


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@contextmanager
def full_disk(bytes_left: int = 200) -> Iterator[None]:
    """No file of this process can grow beyond so many bytes; the system refuses as it does when a disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def _lines(path: Path) -> list[str]:
    zipped = path.with_name(path.name + ".gz")
    text = gzip.decompress(zipped.read_bytes()).decode() if zipped.exists() else path.read_text()
    return [json.dumps(json.loads(line)) + "\n" for line in text.splitlines()]
