"""Published numbers that no table here reproduces, each with the reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from analysis import published
from analysis.compare import quantities
from analysis.published import Key, Published
from experiments.labels import labels
from experiments.models.catalogue import CATALOGUE
from experiments.spec import Table

# Why a printed table, or the rows of it named by a word of their method or setting, has no cell here.
REASONS: tuple[tuple[str, str, str], ...] = (
    ("reruns", "", "a rerun by another group, kept for its spread"),
    ("perp: Abstract", "", "a statement of the abstract, checked as a claim"),
    ("perp: (v1", "", "a note of the transcription, not a cell"),
    ("perp: derived", "", "arithmetic on public configurations, checked by tests of the trained parameters"),
    ("flap: README", "", "a statement of the README, not a table"),
    ("llm_pruner: Section", "", "a statement of the text, checked as a claim"),
    ("llm_pruner: Appendix", "", "a statement of the text, checked as a claim"),
    ("llm_pruner: README", "", "repeats tables 3 and 10 with the numbers of the first arXiv version"),
    ("wanda: Section", "", "a statement of the text, not a table"),
    ("wanda: issue", "", "from a GitHub issue, not a table"),
    ("sparsegpt: issue", "", "from a GitHub issue, not a table"),
    ("wanda: table 4", "", "seconds on an A6000 for the metric alone, which is not timed here"),
    ("wanda: table 6", "full, masked", "recovery after Wanda on data and budgets that the paper gives in part"),
    ("llm_pruner: table 6", "w/o dependency", "every method here prunes coupled weights together"),
    ("llm_pruner: table 8", "DistilBERT", "leaving out every second block is not implemented here"),
    ("gblm: table 5", "sum of raw gradients", "raw summed gradients are not implemented here"),
    ("gblm: table 2", "minus", "a difference of two other cells"),
    ("sparsegpt: ", "AdaPrune", "AdaPrune is not implemented here"),
)


def expected(table: Table) -> list[tuple[Key, str]]:
    """(key, name of the run) of every number that the table declares."""
    runs = table.runs()
    named = zip(runs, labels(runs, table.label), strict=True)
    keys = {(run.model, *label, key, metric) for run, label in named for key, metric in quantities(run)}
    return [(key, table.name) for key in sorted(keys)]


def claimed(tables: Iterable[Table]) -> dict[Published, list[str]]:
    """The names of the tables that have a cell for each published value."""
    found: dict[Published, list[str]] = {cell: [] for paper in published.papers() for cell in published.read(paper)}
    for table in tables:
        keys = {key for key, _ in expected(table)} if table.rows else set()
        for cell in published.of(table.published):
            if _base(cell) in keys:
                found[cell].append(table.name)
    return found


def unmatched(tables: Iterable[Table]) -> dict[Published, str]:
    """Why each value that no table claims is left out; empty where nobody knows."""
    tables = list(tables)
    return {cell: _reason(cell) for cell, names in claimed(tables).items() if not names}


def summary(left: dict[Published, str]) -> list[tuple[str, int]]:
    """(reason, number of cells), the most frequent first."""
    return Counter(left.values()).most_common()


def _reason(cell: Published) -> str:
    if cell.caveat.startswith(("superseded", "LLM-Pruner copied", "time and memory")) and "table 1 " not in cell.place:
        return cell.caveat
    for place, word, reason in REASONS:
        if cell.place.startswith(place) and word in f"{cell.method} {cell.setting}":
            return reason
    return f"{cell.model} is not in the catalogue" if cell.model not in CATALOGUE else ""


def _base(cell: Published) -> Key:
    return (*cell.key[:-1], cell.metric.partition(",")[0])
