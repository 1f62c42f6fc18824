"""Corpora by name, as texts, as the token stream of an evaluation, and as calibration windows.

Tokens come from one call of the model's own tokenizer per text, which puts BOS where it does by itself: once, at the
start.  The papers used slow tokenizers; the fast ones give the same stream on WikiText-2 and differ in a few C4
documents that have runs of blanks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from experiments.data import sources
from experiments.data.sources import DATA_DIR, SOURCES, Source
from experiments.spec import Windows
from pruners.interface.suggest import unknown
from pruners.lazy import Int, Tensor, torch

MOST_DRAWS = 10_000  # for one window; the released code of PERP gives up there, the others never do

Folder = str | Path | None


def rows(name: str, data_dir: Folder = None) -> Sequence[str]:
    """The texts of the corpus `name` ("corpus/split"), in order; those from the Hub are read as they are asked for.

    Its place is its package, the folder `data_dir` (or the environment variable PRUNING_DATA_DIR) or else the Hub.
    Raises ValueError for an unknown corpus; `sources.read` says what else can fail.
    """
    source = find(name)
    holds_texts = source.column or source.package
    records: Any = _records(name, data_dir).rows if holds_texts else instructions(name, data_dir)
    if not records:
        raise ValueError(f"{name} is empty; fetch it again.")
    if source.package:
        return records
    if sources.is_data_set(records) and source.column:
        return records[source.column]
    if source.column:
        return [record[source.column] for record in records]
    asked = (lambda record: f"{record['instruction']}\n") if source.turns else alpaca_prompt
    return [asked(record) + record["output"] for record in records]


def records(name: str, data_dir: Folder = None) -> Sequence[Mapping[str, Any]]:
    """The records of a corpus with all their columns, in order."""
    found: Sequence[Mapping[str, Any]] = _records(name, data_dir).rows
    if sources.is_data_set(found):
        return found.to_list()
    return found


def instructions(name: str, data_dir: Folder = None) -> Sequence[Mapping[str, str]]:
    """The records of an instruction corpus: `instruction`, `input` and `output`.  ValueError for any other corpus."""
    source = find(name)
    if source.column or source.package:
        raise ValueError(f"{name} holds plain texts, not instructions; use for example alpaca/train.")
    records = _records(name, data_dir).rows
    if source.turns:
        return [_turns(name, row, record.get(source.turns)) for row, record in enumerate(records, start=1)]
    return records if source.answer == "output" else _without_input(records, source.answer)


def _turns(name: str, row: int, turns: Any) -> dict[str, str]:
    """The first turn of a dialogue as an instruction and the second as its answer, without blanks around them."""
    if not isinstance(turns, list) or len(turns) < 2 or not all(isinstance(turn, str) for turn in turns[:2]):
        raise ValueError(f"{name}: record {row:,} is not a dialogue of two or more text turns; fetch it again.")
    return {"instruction": turns[0].strip(), "input": "", "output": turns[1].strip()}


def _without_input(records: Any, answer: str) -> Sequence[Mapping[str, str]]:
    """Records of an `instruction` and an answer as if their input were empty; a data set's stay where they are."""
    if sources.is_data_set(records):
        kept = records.select_columns(["instruction", answer]).rename_column(answer, "output")
        return kept.add_column("input", [""] * len(kept))
    return [{"instruction": record["instruction"], "input": "", "output": record[answer]} for record in records]


def provenance(name: str, data_dir: Folder = None) -> dict[str, Any]:
    """Where the texts came from: data set and commit, or files and their SHA-256; and whether the split is complete."""
    if find(name).written:
        return {**sources.origin(name, find(name)), "rows": 0, "complete": True}
    records = _records(name, data_dir)
    return {**records.origin, "rows": len(records.rows), "complete": len(records.rows) == find(name).rows}


def token_ids(name: str, tokenizer: Any, data_dir: Folder = None) -> Int[Tensor, " tokens"]:
    """The corpus as one stream, joined the way the papers evaluate on it (C4: the first 1,100 documents)."""
    source = find(name)
    return _tokenize(tokenizer, source.join.join(rows(name, data_dir)[: source.head]))


def calibration(windows: Windows, tokenizer: Any, data_dir: Folder = None) -> Int[Tensor, "count length"]:
    """Windows of tokens, drawn as the released code draws them; `random.Random(seed)` gives its very sequence.

    A model that needs marks in front of text (ChatGLM: `[gMASK] <sop>`) has them as the first of a window's tokens.
    Raises ValueError where the corpus is too short for them, saying what there is and what was asked.
    """
    if windows.sampling not in SAMPLINGS:
        raise ValueError(unknown("sampling", windows.sampling, SAMPLINGS))
    if windows.count < 1 or windows.length < 1:
        raise ValueError(f"Calibration needs at least one window of one token; got {windows.count} x {windows.length}.")
    drawn = ordered(windows, SAMPLINGS[windows.sampling](windows, tokenizer, data_dir))
    if windows.sampling == "dialogues" or not (marks := _marks(tokenizer)):
        return drawn
    if windows.length <= len(marks):
        raise ValueError(
            f"Windows of {windows.length} tokens leave no room for text after the {len(marks)} special tokens "
            "that this model needs in front; use longer ones."
        )
    return torch.cat([torch.tensor(marks).expand(len(drawn), -1), drawn[:, : -len(marks)]], 1)


def ordered(windows: Windows, drawn: Int[Tensor, "count length"]) -> Int[Tensor, "count length"]:
    """The windows as they were drawn, or shuffled by the seed that `windows.order` is."""
    if windows.order is None:
        return drawn
    places = list(range(len(drawn)))
    random.Random(windows.order).shuffle(places)
    return drawn[places]


def _documents(windows: Windows, tokenizer: Any, data_dir: Folder) -> Tensor:
    """Wanda, SparseGPT, GBLM-Pruner and PERP: a random window of a random document longer than the window."""
    return _from_rows(windows, tokenizer, data_dir, shortest=windows.length + 1, once=False)


def _sentences(windows: Windows, tokenizer: Any, data_dir: Folder) -> Tensor:
    """LLM-Pruner: a random window of a random row that is long enough and was not taken before."""
    return _from_rows(windows, tokenizer, data_dir, shortest=windows.length, once=True)


def _from_rows(windows: Windows, tokenizer: Any, data_dir: Folder, shortest: int, once: bool) -> Tensor:
    texts, draw = rows(windows.corpus, data_dir), random.Random(windows.seed)
    tokens = lru_cache(maxsize=None)(lambda row: _tokenize(tokenizer, texts[row]))
    taken: set[int] = set()

    def window() -> Tensor:
        row = _long_row(windows, draw, len(texts), lambda row: len(tokens(row)), shortest, taken if once else set())
        taken.add(row)
        start = draw.randint(0, len(tokens(row)) - shortest)
        return tokens(row)[start : start + windows.length]

    return torch.stack([window() for _ in range(windows.count)])


def _long_row(
    windows: Windows, draw: random.Random, count: int, length: Callable[[int], int], shortest: int, barred: set[int]
) -> int:
    longest = 0
    for _ in range(MOST_DRAWS):
        row = draw.randint(0, count - 1)
        if row not in barred and length(row) >= shortest:
            return row
        longest = max(longest, 0 if row in barred else length(row))
    besides = f" besides the {len(barred)} already used" if barred else ""
    raise ValueError(
        f"{windows.corpus} has no text of {shortest:,} tokens or more{besides}: {MOST_DRAWS:,} draws found {longest:,} "
        f"tokens at most. Use windows shorter than {windows.length:,}, fewer windows, or another corpus."
    )


def _stream(windows: Windows, tokenizer: Any, data_dir: Folder) -> Tensor:
    """FLAP: random windows of all texts joined with blanks."""
    tokens, draw = _tokenize(tokenizer, " ".join(rows(windows.corpus, data_dir))), random.Random(windows.seed)
    _need(windows, len(tokens), windows.length + 1)
    starts = [draw.randint(0, len(tokens) - windows.length - 1) for _ in range(windows.count)]
    return torch.stack([tokens[start : start + windows.length] for start in starts])


def _first(windows: Windows, tokenizer: Any, data_dir: Folder) -> Tensor:
    """The head of the evaluation stream, cut into windows."""
    tokens, needed = token_ids(windows.corpus, tokenizer, data_dir), windows.count * windows.length
    _need(windows, len(tokens), needed)
    return tokens[:needed].view(windows.count, windows.length)


def _dialogues(windows: Windows, tokenizer: Any, data_dir: Folder) -> Tensor:
    """LLM-Pruner's ChatGLM: of the first dialogues, `prompt [gMASK] <sop> answer <eop>`, padded on the right.

    Half of a window's tokens, and one, are the most that a prompt has with its marks; the answer is cut to the rest.
    """
    marks, source = _marks(tokenizer), windows.length // 2
    if not marks or windows.length < 2 * len(marks) + 2:
        raise ValueError(
            "Dialogues are formatted as `prompt [gMASK] <sop> answer <eop>`, which needs a model with these "
            f"special tokens (ChatGLM) and windows of {2 * len(marks) + 2} tokens or more; this model has "
            f"{len(marks)} of them and the windows have {windows.length} tokens. Use another sampling."
        )
    records = instructions(windows.corpus, data_dir)
    if len(records) < windows.count:
        raise ValueError(f"{windows.corpus} has {len(records):,} dialogues; {windows.count:,} were requested.")
    rows = torch.full((windows.count, windows.length), tokenizer.pad_token_id)
    for row, record in zip(rows, records[: windows.count], strict=True):
        asked, answer = (tokenizer.encode(record[part], add_special_tokens=False) for part in ("instruction", "output"))
        room = windows.length - source - len(marks)
        whole = tokenizer.build_inputs_with_special_tokens(asked[: source - 1], answer[:room])
        row[: len(whole)] = torch.tensor(whole)
    return rows


SAMPLINGS: dict[str, Callable[[Windows, Any, Folder], Tensor]] = {
    "documents": _documents,
    "sentences": _sentences,
    "stream": _stream,
    "first": _first,
    "dialogues": _dialogues,
}


def _need(windows: Windows, found: int, needed: int) -> None:
    if found < needed:
        raise ValueError(
            f"{windows.count} windows of {windows.length} tokens ({windows.sampling}) need {needed:,} tokens; "
            f"{windows.corpus} has {found:,}. Use fewer or shorter windows, or another corpus."
        )


def _tokenize(tokenizer: Any, text: str) -> Int[Tensor, " tokens"]:
    # verbose=False: a stream longer than the model's window is meant, and no reason to warn.
    plain = {"add_special_tokens": False} if _marks(tokenizer) else {}  # which would stand behind the text
    return tokenizer(text, return_tensors="pt", verbose=False, **plain).input_ids[0].long()


def _marks(tokenizer: Any) -> tuple[int, ...]:
    """What must stand in front of plain text; nothing for most models."""
    return tuple(getattr(tokenizer, "text_prefix", ()))


def find(name: str) -> Source:
    """Where a corpus lies and how it is read; ValueError with the nearest names for one that nobody knows."""
    if name not in SOURCES:
        raise ValueError(unknown("corpus", name, SOURCES))
    return SOURCES[name]


def origin(name: str, data_dir: Folder = None) -> dict[str, Any]:
    """Where the texts would come from, as `provenance` tells it, without reading them.

    Raises FileNotFoundError, or ModuleNotFoundError for a package, where they cannot be had here.
    """
    return sources.origin(name, find(name), folder(data_dir))


def version(name: str, data_dir: Folder = None) -> str | None:
    """What changes with the local file that the texts are read from; None for packages and the Hub."""
    return sources.version(name, find(name), folder(data_dir))


def folder(data_dir: Folder = None) -> str | None:
    """The data folder that was asked for, or the environment's; None is the Hub."""
    asked = data_dir or os.environ.get(DATA_DIR)
    return str(asked) if asked else None


@lru_cache(maxsize=8)
def _read(name: str, folder: str | None, version: str | None) -> sources.Records:
    return sources.read(name, SOURCES[name], folder)


def _records(name: str, data_dir: Folder) -> sources.Records:
    """Cached: a table asks for the same few corpora in every cell."""
    return _read(name, folder(data_dir), version(name, data_dir))


def alpaca_prompt(record: Mapping[str, str]) -> str:
    """The prompt of Stanford Alpaca for a record's `instruction` and `input`, up to where the answer begins."""
    task = "Below is an instruction that describes a task"
    if record.get("input"):
        context = f"{task}, paired with an input that provides further context."
        given = f"### Input:\n{record['input']}\n\n"
    else:
        context, given = f"{task}.", ""
    return (
        f"{context} Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{record['instruction']}\n\n{given}### Response:\n"
    )
