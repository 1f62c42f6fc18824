"""Notes below a table on accuracy and speed: tasks, missing ones, shapes, device, and what zeros bring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from analysis.rows import Row, called
from experiments.measures.asked import DenseAnswers, OpenAnswers
from experiments.spec import Efficiency, Generation, ZeroShot


def notes(rows: Sequence[Row], again: str) -> list[str]:
    """One sentence a note; one that does not hold for all rows names those that it holds for.

    `again` are the arguments of a command about the same cells.
    """
    found: dict[str, None] = {}  # two measures may say the same
    for what in dict.fromkeys(what for row in rows for what in row.run.measures):
        done = [row for row in rows if row.measure(what.key) is not None]
        for sentences in SENTENCES.get(type(what), ()):
            found |= dict.fromkeys(_merged(done, what, sentences))
        if isinstance(what, Generation) and done:
            found |= {f"{what.key}: the texts are written by python -m analysis generation {again}": None}
    return list(found)


def _tasks(what: ZeroShot, row: Row) -> list[str]:
    if (version := (row.measure(what.key) or {}).get("lm_eval")) is None:
        return []
    reported = ", ".join(f"{task} {metric}" for task, metric in what.metrics)
    limit = f"the first {what.limit} documents of each task" if what.limit else "all documents"
    if partial := [name for name in row.partial_of(what.key) if name not in row.partial]:
        limit += f" at hand, only a part of {', '.join(partial)}"
    spread = (row.measure(what.key) or {}).get("note") or "± one standard error over documents"
    return [f"{what.key}: {reported}; lm-eval {version}, {limit}; {spread}."]


def _missing(what: ZeroShot, row: Row) -> list[str]:
    tasks: dict[str, list[str]] = {}
    for task, entry in (row.measure(what.key) or {}).get("missing", {}).items():
        tasks.setdefault(entry["reason"], []).append(task)
    return [f"{what.key} lacks {', '.join(lacking)}: {reason}." for reason, lacking in tasks.items()]


def _apart(what: ZeroShot, row: Row) -> list[str]:
    """Rounding differs between the two ways, so that rows asked in unlike ways say so."""
    why = (row.measure(what.key) or {}).get("every_request_by_itself")
    return [f"{what.key}: every request was computed by itself, with its whole context: {why}."] if why else []


def _truncated(what: ZeroShot, row: Row) -> list[str]:
    scores = [(task, row.measure(what.task_key(task, metric)) or {}) for task, metric in what.metrics]
    told = {  # once a task, of whose several metrics each has the same documents
        f"{task}: the beginning of {score['truncated']} of {score['documents']} documents did not fit the model.": None
        for task, score in scores
        if score.get("truncated")
    }
    return list(told)


def _solved(what: OpenAnswers, row: Row) -> list[str]:
    documents = (row.measure(what.key) or {})["documents"]
    return [
        f"{what.key}: {documents:,} problems of GSM8K, right by the last number of a greedy answer of at most "
        f"{what.new_tokens} tokens; the first {what.examples} of its train split are the few-shot examples; ± one "
        "standard error over problems."
    ]


def _as_dense(what: DenseAnswers, row: Row) -> list[str]:
    prompts = (row.measure(what.key) or {})["prompts"]
    return [
        f"{what.key}: greedy answers of {what.new_tokens} tokens to {prompts} fixed prompts, compared with "
        "the dense model's; one that does not differ counts with all its tokens."
    ]


def _counted(what: Efficiency, row: Row) -> list[str]:
    tokens = (row.measure(what.key) or {})["macs_tokens"]
    return [f"MACs of one sequence of {tokens} tokens; tied parameters once."]


def _timed(what: Efficiency, row: Row) -> list[str]:
    if not (timing := (row.measure(what.key) or {}).get("timing")):
        return []
    first = timing["runs"][0]
    return [
        f"Times: median [quartiles] of {first['decode_s']['repetitions']}, {timing['dtype'].removeprefix('torch.')}, "
        f"{timing['device']}, {timing['threads']} threads; decode in the table at batch {first['batch']} after "
        f"{first['length']} tokens; bound: bytes of weights read per step, divided by the measured bandwidth of a copy."
        + (
            " The bound at that time is measured by copies before and after each step."
            if "decode_to_bound" in first
            else ""
        )
    ]


def _noisy(what: Efficiency, row: Row) -> list[str]:
    runs = (row.measure(what.key) or {}).get("timing", {}).get("runs", [])
    noisy = [run["reference"] for run in runs if run.get("noisy")]
    most = max(((told["q3"] - told["q1"]) / told["median"] for told in noisy), default=0)
    return [f"Noisy: the quartiles of the copies around its steps differ by {100 * most:.0f} %."] if noisy else []


def _semi_structured(what: Efficiency, row: Row) -> list[str]:
    probed = (row.measure(what.key) or {}).get("semi_structured", {})
    if "skipped" in probed:
        return [f"2:4 kernels were not timed: {probed['skipped']}."]
    timed = {name: times for name, times in probed.items() if "speed_up" in times}
    faster = ", ".join(f"{name} {times['speed_up']:.2f} times" for name, times in timed.items())
    return [f"2:4 kernels, speed-up over dense ones: {faster}."] if timed else []


def _zeros(what: Efficiency, row: Row) -> list[str]:
    note = (row.measure(what.key) or {}).get("note")
    return [note] if note else []


SENTENCES: dict[type, tuple[Callable[[Any, Row], list[str]], ...]] = {
    ZeroShot: (_tasks, _apart, _missing, _truncated),
    OpenAnswers: (_solved,),
    DenseAnswers: (_as_dense,),
    Efficiency: (_counted, _timed, _noisy, _zeros, _semi_structured),
}


def _merged(rows: Sequence[Row], what: Any, sentences: Callable[[Any, Row], list[str]]) -> list[str]:
    holders: dict[str, list[Row]] = {}
    for row in rows:
        for sentence in sentences(what, row):
            holders.setdefault(sentence, []).append(row)
    return [
        sentence if len(some) == len(rows) else f"{called(some, rows)}: {sentence}"
        for sentence, some in holders.items()
    ]
