"""Notes below a table: protocol, calibration, provenance, failures and missing cells."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from analysis.rows import Row, called, keys
from analysis.tables import measured_notes
from analysis.tables.frames import OTHER_CODE
from experiments.labels import beside_model
from experiments.measures.asked import Costs
from experiments.spec import Efficiency, Table
from experiments.store.records import Before, Record
from pruners.unstructured import Unstructured

SEEN = 0.0003  # of the weights, which a column of per cent with two digits shows
TOLD = 0.01  # of the parameters, by which what was removed misses what was asked
MANY = 0.02  # of the weights, by which rounding and a few equal scores cannot miss it
AGAIN = {  # by whether what was made again by the code of here has the same numbers
    None: "{remedy}",
    True: "{cells} had the same numbers, to the bit",
    False: "of {cells}, {differ} had other numbers; {remedy}",
}
AWAY = {"host": "in CPU memory", "disk": "on the disk"}


def title(table: Table, rows: Sequence[Row]) -> str:
    """The table's title with its models, e.g. `Unstructured pruning without retraining: smollm2-135m`."""
    return f"{table.title}: {', '.join(dict.fromkeys(row.run.model_name for row in rows))}"


def notes(table: Table, rows: Sequence[Row], again: str = "") -> list[str]:
    """One sentence a note, plain text; `again` are the arguments of a command about the same cells."""
    again = again or table.name
    done = [row.record for row in rows if row.record]
    return [
        *(note for key in keys(rows) for note in _protocol(key, rows)),
        *measured_notes.notes(rows, again),
        *_calibration(done),
        *([f"{table.rates}."] if table.rates else []),
        *_rates(rows),
        *_distinct(_trained(record) for record in done),
        *_kept_steps(rows),
        *_distinct(_origin(record) for record in done),
        *_away(rows),
        *_distinct(f"Only a part of {name} was available." for row in rows for name in row.partial),
        *(f"{row.name} failed: {row.failure.message}" for row in rows if row.failure and not row.record),
        *_not_as_asked(rows),
        *_withheld(rows),
        *_of_other_code(rows, again),
        *_missing(rows, again),
    ]


def _protocol(key: str, rows: Sequence[Row]) -> Iterator[str]:
    """On which tokens a perplexity was measured; of several tokenizers each with its models."""
    models: dict[str, dict[str, None]] = {}
    found = [(row, told) for row in rows if (told := row.measure(key)) is not None and "perplexity" in told]
    has_spread = any(told.get("standard_error") is not None for _, told in found)
    spread = "; ± one standard error over windows" if has_spread else ""
    for row, told in found:
        is_counted = "windows" in told and "tokens" in told
        counts = f": {told['windows']:,} windows, {told['tokens']:,} tokens" if is_counted else ""
        stream = f"; tokens {told['token_sha256'][:12]}" if "token_sha256" in told else ""
        models.setdefault(f"{key}{counts}{spread}{stream}", {})[row.run.model_name] = None
    for sentence, of in models.items():
        whose = f" ({', '.join(of)})" if len(models) > 1 else ""
        yield f"{sentence}{whose}."


def _calibration(records: Iterable[Record]) -> Iterator[str]:
    """One note for all draws and orders of the same text."""
    draws: dict[tuple[str, str], dict[int, set[int | None]]] = {}
    for record in records:
        if (windows := record.spec["windows"]) is not None:
            text = f"{windows['count']:,} x {windows['length']:,} tokens of {windows['corpus']}"
            orders = draws.setdefault((text, windows["sampling"]), {}).setdefault(windows["seed"], set())
            orders.add(windows.get("order"))
    for (text, sampling), seeds in draws.items():
        drawn = [seed for seed, orders in seeds.items() if None in orders and sampling != "first"]
        how = [", ".join([sampling, *([_numbered("seed", drawn)] if drawn else [])])]
        for seed, orders in seeds.items():
            if others := [order for order in orders if order is not None]:
                how.append(f"seed {seed} in {_numbered('order', others)}")
        yield f"Calibration: {text} ({'; '.join(how)})."


def _numbered(name: str, numbers: Iterable[int]) -> str:
    """E.g. `seed 0`, or `seeds 0, 1, 2`."""
    listed = sorted(numbers)
    return f"{name}{'s' * (len(listed) > 1)} {', '.join(map(str, listed))}"


def _away(rows: Sequence[Row]) -> Iterator[str]:
    """Of weights that were not on the device: how often all of them were read, and how much that was."""
    read: dict[str, list[str]] = {}
    for row in rows:
        about = row.record.made_by.weights if row.record else None
        if about and about.get("sweeps") is not None:
            sweeps = f"{about['sweeps']:,} sweep{'s' * (about['sweeps'] != 1)}"
            read.setdefault(about["home"], []).append(f"{row.name} {sweeps}, {about['bytes_read'] / 1e9:,.1f} GB read")
    for home, cells in read.items():
        yield f"Weights {AWAY[home]}, a block at a time on the device: {'; '.join(cells)}."


def _trained(record: Record) -> str | None:
    """How long and at which rate was trained, of rates that were chosen in a note of their own."""
    recovery = record.spec.get("recovery")
    if not recovery:
        return None
    text = recovery.get("text") or {}
    windows = f" calibration window{'s' * (recovery['batch_size'] > 1)}"
    on = f" x {text['length']:,} tokens of {text['corpus']}" if text else windows
    steps = f"{recovery['steps']:,} steps" if recovery["steps"] > 1 else "1 step"
    chosen = "rate_choice" in record.achieved or recovery.get("learning_rate") is None
    rate = "" if chosen else f", learning rate {recovery['learning_rate']:g}"
    stop = f", stopped after {recovery['stop']:,}" if recovery.get("stop") else ""
    best = f", best of every {recovery['check_every']:,} steps {_judged(recovery)}" if _is_best(recovery) else ""
    return f"{recovery['name'].capitalize()}: {steps} of {recovery['batch_size']}{on}{rate}{stop}{best}."


def _is_best(recovery: Mapping[str, Any]) -> bool:
    return recovery.get("keep") == "best"


def _judged(recovery: Mapping[str, Any]) -> str:
    """By which loss the best step is chosen."""
    if windows := recovery.get("held_out"):
        return f"by the loss on {windows['count']:,} x {windows['length']:,} tokens of {windows['corpus']}"
    return f"by the loss on {recovery['text']['held_out']:,} held-out records of {recovery['text']['corpus']}"


def _kept_steps(rows: Sequence[Row]) -> Iterator[str]:
    """Which step's model each row has, where that is the best one's."""
    kept: dict[int, dict[str, None]] = {}
    for row in rows:
        told = row.record.achieved.get("recovery") or {} if row.record else {}
        if (step := told.get("kept_step")) is not None:
            kept.setdefault(step, {})[_beside_model(row)] = None
    if kept:
        told = "; ".join(f"{step:,} for {', '.join(names)}" for step, names in sorted(kept.items()))
        yield f"Steps kept: {told}."


def _beside_model(row: Row) -> str:
    return f"{row.run.model_name} {beside_model(row.name, row.run.model_name)}"


def _rates(rows: Sequence[Row]) -> Iterator[str]:
    """Of learning rates that were chosen: the grids and texts, and which rate each row took."""
    taken: dict[str, dict[float, dict[str, None]]] = {}
    edges: dict[str, None] = {}
    for row in rows:
        if row.record and (about := row.record.achieved.get("rate_choice")):
            text, tried = about["text"], ", ".join(f"{rate:g}" for rate in about["rates"])
            grid = f"from {tried} by the loss on {text['count']} x {text['length']:,} tokens of {text['corpus']}"
            name = _beside_model(row)
            taken.setdefault(grid, {}).setdefault(about["learning_rate"], {})[name] = None
            edges |= {name: None} if about["at_edge"] else {}
    for grid, rates in taken.items():
        told = "; ".join(f"{rate:g} for {', '.join(names)}" for rate, names in sorted(rates.items()))
        yield f"Learning rates chosen {grid}: {told}."
    if edges:
        yield f"Not tuned, as the best learning rate is at the edge of the grid: {', '.join(edges)}."


def _origin(record: Record) -> str:
    made = record.made_by
    commit = f"commit {made.commit[:10]}{' with local changes' if made.dirty else ''}" if made.commit else "no commit"
    model = Path(record.spec["model"]["name"]).name
    if "hub" in record.spec["model"] and made.model_commit:
        model += f" at {made.model_commit[:10]}"
    return f"{model} in {made.dtype} on {made.device}, {commit}, torch {made.packages['torch']}."


def _not_as_asked(rows: Sequence[Row]) -> Iterator[str]:
    """Of structured methods, which can remove no part of a head or of a group of heads."""
    told: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        structure = row.record.achieved.get("structure") if row.record else None
        if structure and "asked_shares" in structure:
            asked, removed = (structure[which]["decoder"] for which in ("asked_shares", "achieved_shares"))
            if abs(asked - removed) > TOLD:
                shares = f"{removed:.1%} of the decoder blocks' parameters removed, {asked:.1%} requested"
                why = "widths are rounded" if structure.get("rounding") else "groups of heads and channels go whole"
                told.setdefault((shares, why), []).append(row)
    for (shares, why), some in told.items():
        yield f"{called(some, rows)}: {shares}, as {why}."
    off = [row for row in rows if _is_odd(row)]
    if sparse := [row for row in off if row.record and row.record.achieved["sparsity"] - row.run.method.asked > MANY]:
        yield (
            "Far more zeros than requested, as the model had zeros before it was pruned or gives many weights the same "
            f"score: {called(sparse, rows)}."
        )
    if odd := [row for row in off if row not in sparse]:
        yield (
            f"Sparsity that is not quite as requested, as a row loses whole weights and equal ones go together: "
            f"{called(odd, rows)}."
        )


def _is_odd(row: Row) -> bool:
    """Of methods that remove single weights; where training has filled them again, another note says so."""
    achieved = row.record.achieved if row.record else {}
    if achieved.get("structure") or not isinstance(row.run.method, Unstructured) or "sparsity" not in achieved:
        return False
    return abs(achieved["sparsity"] - row.run.method.asked) > SEEN


def _withheld(rows: Sequence[Row]) -> Iterator[str]:
    for why in dict.fromkeys(why for row in rows for why in row.withheld):
        yield f"Not shown, as {why}: {called([row for row in rows if why in row.withheld], rows)}."


def _of_other_code(rows: Sequence[Row], again: str) -> Iterator[str]:
    """With what cells of the same code say of it that were made again by the code of here."""
    told: dict[str, list[Row]] = {}
    known: dict[str, dict[int, bool]] = {}
    remedy = f"python -m experiments run {again} --again reruns them"
    for row in rows:
        if row.code == "other" and row.record:
            same = {id(one): one.same for other in rows for one in _before(other) if one.code == row.record.code}
            if any(isinstance(what, Costs | Efficiency) for what in row.run.measures):
                same = {}  # times are what such a cell is for, and nobody compares those
            said = AGAIN[None if not same else all(same.values())]
            told.setdefault(said, []).append(row)
            known.setdefault(said, {}).update(same)
    for said, others in told.items():
        made, differ = len(known[said]), sum(not same for same in known[said].values())
        cells = f"{made} cell{'s' * (made > 1)} of such code made again by this one"
        which = f"a different version of the method's or measures' code: {called(others, rows)}"
        yield f"{OTHER_CODE} made by {which}; {said.format(cells=cells, differ=differ, remedy=remedy)}."
    if undated := [row for row in rows if row.code == "unknown"]:
        which = "before records stored the version of the method's and measures' code"
        yield f"{OTHER_CODE} made {which}: {called(undated, rows)}; {remedy}."


def _before(row: Row) -> list[Before]:
    return row.record.before if row.record and row.code == "same" else []


def _missing(rows: Sequence[Row], again: str) -> list[str]:
    told = {"missing": "are missing", "failed": "failed, and are tried again by"}
    counted = {words: sum(row.state == state for row in rows) for state, words in told.items()}
    return [
        f"{count} of {len(rows)} cells {words}: python -m experiments run {again}"
        for words, count in counted.items()
        if count
    ]


def _distinct(sentences: Iterable[str | None]) -> list[str]:
    return [sentence for sentence in dict.fromkeys(sentences) if sentence]
