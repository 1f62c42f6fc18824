"""Saves a pruned model: a folder that transformers opens, with a model card of what was done and measured."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from experiments import models, recovery
from experiments.cells import Cell
from experiments.labels import calibration
from experiments.models.gguf import quiet
from experiments.spec import Run
from experiments.store import atomic, records
from experiments.store.records import Record
from pruners.retrain import LoRA
from pruners.weights import storage

CARD = """---
{front}
---

# {title}

{model} pruned by `{method}`{recovery}. {sparsity}

Calibration: {calibration}.{retraining}

| measure | before | this model |
| --- | --- | --- |
{values}

{opening}

Record {id} of the table {table}, made {at} on {device} by commit {commit} with {packages}.{licence}
"""
LONGEST = 120  # characters of a folder's name before the id; file systems take 255 bytes
MADE = "record.json"  # in the folder: of which record the model is
CARD_MADE = re.compile(r"^Record (?P<id>\w+) of the table \S+, made (?P<at>\S+) on ", re.MULTILINE)  # older
STOCK = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```"""
OWN = """Its blocks have different widths. With this project on the path, `import pruners` and then

{stock}

or without it, through the two modules in this folder: `from_pretrained("{folder}", trust_remote_code=True)`."""


def places(cells: list[Cell], folder: Path, table: str) -> dict[str, Path]:
    """By id, the folder of every cell that changes its model."""
    changed = [cell for cell in cells if cell.run.method is not None or cell.run.recovery is not None]
    named = {cell.id: f"{_slug(f'{cell.run.model_name} {cell.label}')}-{cell.id}" for cell in changed}
    # a model whose cell has another name by now is found all the same
    there = {path.name.rpartition("-")[2]: path.name for path in sorted((folder / table).glob("*-*"))}
    return {id: folder / table / there.get(id, name) for id, name in named.items()}


def holds(folder: Path, record: Record) -> bool:
    """Whether the model that this very record measured lies there, whatever its card says by now."""
    return (folder / "config.json").is_file() and _made(folder) == (record.id, record.made_by.at)


def _made(folder: Path) -> tuple[str, str] | None:
    """Of which record the model there is, by its id and when it was made; None where that is not said."""
    for name, read in ((MADE, json.loads), ("README.md", CARD_MADE.search)):
        with suppress(OSError, ValueError, KeyError, TypeError):
            told: Any = read(atomic.read(folder / name))
            return told["id"], told["at"]
    return None


def check(run: Run, folder: Path) -> None:
    """ValueError, before any work, for what `write` could not keep, StorageError where the disk refuses."""
    if made := _made(folder):
        raise ValueError(
            f"{folder} already holds a model, of the record {made[0]} as it was made {made[1]}, and is never written "
            "over; name another folder, or move that one away."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} already exists and is not empty; name another folder for the model, or empty it.")
    if run.quantised:
        raise ValueError("LLM.int8 models cannot be saved; save the model of the cell without it.")
    adapters = getattr(getattr(run.recovery, "trainable", None), "adapters", None)
    if isinstance(adapters, LoRA) and not adapters.merge:
        raise ValueError("LoRA that stays beside its matrices is not saved with the model; train it with merge=True.")
    atomic.check_writable(folder.absolute().parent, storage.OTHERWISE)


def write(model: Any, tokenizer: Any, run: Run, record: Record, folder: Path, root: Path) -> None:
    """All of it or nothing; FileExistsError for a folder that holds something, StorageError where the disk refuses."""
    from pruners import checkpoint

    with storage.filling(folder) as partial, quiet():
        checkpoint.save(model, tokenizer, partial)
        (partial / MADE).write_text(json.dumps({"id": record.id, "at": record.made_by.at}) + "\n", encoding="utf-8")
        (partial / "README.md").write_text(card(run, record, partial, folder.name, root), encoding="utf-8")


def card(run: Run, record: Record, folder: Path, name: str, root: Path) -> str:
    """The model card of the model that lies in `folder`."""
    kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    stock = STOCK.format(folder=name)
    known, made = models.find(run.model), record.made_by
    method = type(run.method).__name__ if run.method else "no pruning"
    return CARD.format(
        front=_front(known.hub, method),
        title=f"{run.model_name}, {method}",
        model=run.model_name,
        method=run.method,
        recovery=f", then `{run.recovery}`" if run.recovery else "",
        sparsity=_removed(record),
        calibration=calibration(run),
        retraining=f" Retraining: {text}." if (text := recovery.text(run.recovery)) else "",
        values="\n".join(_values(record.measures, _dense(record, root))),
        opening=OWN.format(stock=stock, folder=name) if kind.startswith("pruned_") else stock,
        id=record.id,
        table=record.table,
        at=made.at,
        device=made.device,
        commit=made.commit or "unknown",
        packages=", ".join(f"{name} {version}" for name, version in made.packages.items()),
        licence=f" The weights are under the licence of the original model: {known.licence}." if known.licence else "",
    )


def _front(hub: str | None, method: str) -> str:
    base = [f"base_model: {hub}"] if hub else []
    return "\n".join([*base, "library_name: transformers", "tags:", "- pruning", f"- {method.lower()}"])


def _removed(record: Record) -> str:
    return f"Sparsity of the pruned weights: {record.sparsity_told} (requested: {record.achieved['asked']:.4f})."


def _values(measured: dict[str, dict[str, Any]], dense: dict[str, dict[str, Any]]) -> Iterator[str]:
    for key, value in measured.items():
        if told := shown(value):
            yield f"| {key} | {shown(dense.get(key, {})) or 'not measured'} | {told} |"


def shown(measured: dict[str, Any]) -> str:
    """A perplexity or an accuracy with its interval or standard error; empty for other measures."""
    for name, scale, unit in (("perplexity", 1, ""), ("score", 100, " %")):
        if (value := measured.get(name)) is not None:
            low, high, error = measured.get("low"), measured.get("high"), measured.get("standard_error")
            if low is not None and high is not None:
                return f"{scale * value:.2f}{unit} [{scale * low:.2f}, {scale * high:.2f}]"
            return f"{scale * value:.2f}{unit}" + (f" ± {scale * error:.2f}" if error else "")
    return ""


def _dense(record: Record, root: Path) -> dict[str, dict[str, Any]]:
    """By protocol key, what the model as it was has on the same text in the same number format."""
    found: dict[str, dict[str, Any]] = {}
    for other in records.load(root, record.table).values():
        same = all(other.spec.get(part) == record.spec.get(part) for part in ("model", "dtype", "rehearsal"))
        if same and other.spec["method"] is None and not {"recovery", "quantised"} & set(other.spec):
            found |= {
                key: value for key, value in other.measures.items() if _read_same(value, record.measures.get(key))
            }
    return found


def _read_same(one: dict[str, Any], other: dict[str, Any] | None) -> bool:
    return other is not None and all(one.get(text) == other.get(text) for text in ("token_sha256", "documents_sha256"))


def _slug(text: str) -> str:
    """Short enough for a name of a file, of which others are made while it is written."""
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-").lower()[:LONGEST].rstrip("-")
