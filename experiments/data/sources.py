"""Where each corpus comes from (the Hub, a local folder or an installed package) and how its records are read.

Every Hub source is a plain data file of a pinned commit or branch, so no loading script is needed (`datasets` refuses
them since version 4): WikiText-2 and C4 at a commit; PTB and BookCorpus, whose repositories hold scripts, on the
branch `refs/convert/parquet` where the Hub keeps its own conversion; Alpaca-cleaned and LaMini at `main`.
"""

from __future__ import annotations

import gzip
import re
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, TypeGuard

from eval import json_lines
from experiments.data import wheels
from experiments.models import digests, hub

if TYPE_CHECKING:
    from datasets import Dataset

DATA_DIR = "PRUNING_DATA_DIR"


@dataclass(frozen=True)
class Source:
    """One corpus: `rows` texts in full; `join` stands between them, and `head` limits them, in an evaluation stream.

    `column` holds the text of a record (None: the record is an instruction, whose answer is in the column `answer`, or
    a dialogue, whose turns are the list in the column `turns`); every record has texts in the columns
    `also`, too.  One that is `written` has no texts: the dense model writes its windows, sampled with their seed.
    `local` names the files looked for in a data folder, each plain or gzipped, the first found wins; `hub` is (data
    set, revision, files).  A text `file` in a `package` is cut into documents after every `end`, which stays with its
    document.
    """

    rows: int
    join: str
    local: tuple[str, ...] = ()
    hub: tuple[str, str, tuple[str, ...]] | None = None
    column: str | None = "text"
    head: int | None = None
    package: str | None = None
    file: str = ""
    end: str = ""
    answer: str = "output"
    turns: str = ""
    also: tuple[str, ...] = ()
    written: bool = False


def _wikitext2(split: str, rows: int, *local: str) -> Source:
    files = (f"wikitext-2-raw-v1/{split}-00000-of-00001.parquet",)
    return Source(rows, "\n\n", local, ("Salesforce/wikitext", "b08601e04326c79dfdd32d625aee71d232d685c3", files))


def _ptb(split: str, rows: int, join: str, local: str) -> Source:
    files = (f"penn_treebank/{split}/0000.parquet",)
    return Source(rows, join, (local,), ("ptb-text-only/ptb_text_only", "refs/convert/parquet", files), "sentence")


def _c4(shard: str, rows: int, head: int | None, *local: str) -> Source:
    hub = ("allenai/c4", "1588ec454efa1a09f29cd18ddd04fe05fc8653a2", (f"en/{shard}.json.gz",))
    return Source(rows, " ", (f"c4/{shard}.json", *local), hub, head=head)


def _gsm8k(split: str, rows: int) -> Source:
    hub = ("openai/gsm8k", "main", (f"main/{split}-00000-of-00001.parquet",))
    return Source(rows, "\n\n", (f"tasks/gsm8k_{split}.jsonl",), hub, "question", also=("answer",))


SOURCES: dict[str, Source] = {
    "wikitext2/train": _wikitext2("train", 36_718, "wikitext2/rows_train.jsonl", "wikitext2/rows_train_part.jsonl"),
    "wikitext2/validation": _wikitext2("validation", 3_760, "wikitext2/rows_validation.jsonl"),
    "wikitext2/test": _wikitext2("test", 4_358, "wikitext2/rows_test.jsonl"),
    # LLM-Pruner joins PTB's validation split with blank lines, SparseGPT its train and test splits with blanks.
    "ptb/train": _ptb("train", 42_068, " ", "ptb/ptb_train.jsonl"),
    "ptb/validation": _ptb("validation", 3_370, "\n\n", "ptb/ptb_valid.jsonl"),
    "ptb/test": _ptb("test", 3_761, " ", "ptb/ptb_test.jsonl"),
    "c4/train": _c4("c4-train.00000-of-01024", 356_317, None, "c4/c4_en_train_docs_0000-0799.jsonl"),
    # Documents of the train split that stand in where the validation shard is out of reach, under their own name.
    "c4/heldout": Source(200, " ", ("c4/c4_en_train_docs_0800-0999_heldout.jsonl",)),
    # The next thousand of those documents, and others of the validation split that are not its head.
    "c4/train_1000-1999": Source(1_000, " ", ("c4/c4_en_train_docs_1000-1999.jsonl",)),
    "c4/validation_sample": Source(2_000, " ", ("c4/c4_en_validation_sample_2000.jsonl",)),
    "c4/validation": _c4(
        "c4-validation.00000-of-00008",
        45_576,
        1_100,
        "c4/c4_en_validation_docs.jsonl",
        "c4/c4_en_validation_docs_0000-1024.jsonl",
    ),
    "bookcorpus/train": Source(
        74_004_228,
        " ",
        ("bookcorpus/bookcorpus_train.jsonl",),
        (
            "bookcorpus/bookcorpus",
            "refs/convert/parquet",
            tuple(f"plain_text/train/{part:04}.parquet" for part in range(10)),
        ),
    ),
    "alpaca/train": Source(
        51_760,
        "\n\n",
        ("alpaca/alpaca_data_cleaned.jsonl", "alpaca/alpaca_cleaned_head_5000.jsonl", "alpaca/alpaca_2000.jsonl"),
        ("yahma/alpaca-cleaned", "main", ("alpaca_data_cleaned.json",)),
        column=None,
    ),
    "lamini/train": Source(
        2_585_615,
        "\n\n",
        ("lamini/lamini_instruction.jsonl",),
        (
            "MBZUAI/LaMini-instruction",
            "main",
            tuple(
                f"data/train-0000{part}-of-00003-{digest}.parquet"
                for part, digest in enumerate(("929c6c373c0473cd", "1f823c156c353d51", "752db5e1576f5089"))
            ),
        ),
        column=None,
        answer="response",
    ),
    "dailydialog/train": Source(
        11_118,
        "\n\n",
        ("dailydialog/dailydialog_train.jsonl", "dailydialog/dailydialog_train_400.jsonl"),
        ("li2017dailydialog/daily_dialog", "refs/convert/parquet", ("default/train/0000.parquet",)),
        column=None,
        turns="dialog",
    ),
    "dailydialog/test": Source(
        1_000,
        "\n\n",
        ("dailydialog/dailydialog_test.jsonl",),
        ("li2017dailydialog/daily_dialog", "refs/convert/parquet", ("default/test/0000.parquet",)),
        column=None,
        turns="dialog",
    ),
    "gsm8k/train": _gsm8k("train", 7_473),
    "gsm8k/test": _gsm8k("test", 1_319),
    "own/text": Source(0, "", written=True),
    "embedded/c4": Source(584, "", package="exllamav3", file="standard_cal_data/c4.utf8", end="\n"),
    "embedded/wiki": Source(2_349, "", package="exllamav3", file="standard_cal_data/wiki.utf8", end="</doc>\n"),
}


@dataclass(frozen=True)
class Records:
    """A corpus as read: its records (each a mapping, or a text) and where they came from, as plain JSON."""

    rows: Sequence[Any] | Dataset
    origin: dict[str, Any]


def read(name: str, source: Source, folder: str | Path | None = None) -> Records:
    """The records of a corpus: from its package, else from the data folder where one is given, else from the Hub.

    Raises FileNotFoundError for what the folder lacks, OSError if the Hub refuses, ValueError for damaged files.
    """
    if source.written:
        raise ValueError(f"{name} is text generated by the dense model for calibration; it is not a corpus to read.")
    if source.package:
        return _from_package(source, source.package)
    if folder:
        return _from_folder(name, source, Path(folder).expanduser())
    return _from_hub(name, source)


def origin(name: str, source: Source, folder: str | Path | None = None) -> dict[str, Any]:
    """Where `read` would take the corpus from, as it tells that itself, without reading or downloading it.

    Raises FileNotFoundError for what is not here and cannot be downloaded.
    """
    if source.written:
        return {"source": "written by the dense model"}
    if source.package:
        path = wheels.file(source.package, source.file)
        return {
            "package": source.package,
            "version": wheels.version(source.package),
            "files": _digests(path, path.name),
        }
    if folder:
        path = local(name, source, Path(folder).expanduser())
        return {"files": _digests(path, str(path.relative_to(Path(folder).expanduser())))}
    if source.hub is None:
        raise FileNotFoundError(f"{name} is not on the Hub; name a data folder that holds {source.local[0]}.")
    repository, revision, files = source.hub
    commit = hub.data_commit(repository, revision)
    here = commit and all(hub.is_cached(repository, file, commit, "dataset") for file in files)
    if commit is None or not (here or hub.reachable()):
        raise FileNotFoundError(f"{name} ({repository}) was never downloaded and the Hub does not answer.")
    return {"dataset": repository, "revision": commit, "files": list(files)}


def is_here(source: Source) -> bool:
    """Whether every file of the Hub was downloaded, at the commit or branch that is read."""
    assert source.hub is not None
    repository, revision, files = source.hub
    return all(hub.is_cached(repository, file, revision, "dataset") for file in files)


def fetch(source: Source) -> None:
    """Download its files of the Hub, by the name of the branch, which is then known without the Hub.

    Raises OSError, or what the Hub's client raises, where it refuses.
    """
    from huggingface_hub import hf_hub_download

    assert source.hub is not None
    repository, revision, files = source.hub
    for file in files:
        hf_hub_download(repository, file, repo_type="dataset", revision=revision)


def version(name: str, source: Source, folder: str | Path | None) -> str | None:
    """What changes with the content of the local file that `read` reads; None for packages and the Hub."""
    return (
        digests.sha256(local(name, source, Path(folder).expanduser()))
        if folder and not (source.package or source.written)
        else None
    )


def count(path: Path) -> int:
    """Lines with anything in them, which are the records of a file of JSON lines; read once for a file as it is.

    ValueError for what is no such file, or a damaged one.
    """
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file, so no records are counted in it.")
    state = path.stat()
    return _counted(path, (state.st_size, state.st_mtime_ns, state.st_ino))


@lru_cache(maxsize=64)
def _counted(path: Path, state: tuple[int, ...]) -> int:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return sum(bool(line.strip()) for line in file)
    except (EOFError, zlib.error, OSError) as error:  # of which gzip's own is one
        raise ValueError(f"{path} cannot be read to its end ({error}); fetch it again.") from error


def _digests(path: Path, name: str) -> dict[str, str]:
    return {name: digests.sha256(path)}


def _from_package(source: Source, package: str) -> Records:
    path = wheels.file(package, source.file)
    documents = re.split(f"(?<={re.escape(source.end)})", path.read_bytes().decode())
    told = {"package": package, "version": wheels.version(package), "files": _digests(path, path.name)}
    return Records(tuple(document for document in documents if document), told)


def _from_folder(name: str, source: Source, folder: Path) -> Records:
    path = local(name, source, folder)
    optional = () if source.column else ("input",)
    read = json_lines.read(path, _texts(source), optional)
    return Records(read, {"files": _digests(path, str(path.relative_to(folder)))})


def local(name: str, source: Source, folder: Path) -> Path:
    """The file of a data folder that holds the corpus; FileNotFoundError, with what it may be called, for none."""
    paths = [folder / f"{file}{zipped}" for file in source.local for zipped in ("", ".gz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        looked_for = " or ".join(f"{file}[.gz]" for file in source.local)
        raise FileNotFoundError(
            f"{name} is not in the data folder {folder}: looked for {looked_for}. Put it there, or leave the folder "
            f"out (--data-dir, {DATA_DIR}) to fetch it from the Hub."
        )
    return path


def _texts(source: Source) -> tuple[str, ...]:
    """The columns that hold text in every record; an instruction's `input` may be empty."""
    if source.turns:
        return ()
    return (source.column, *source.also) if source.column else ("instruction", source.answer)


def _from_hub(name: str, source: Source) -> Records:
    if source.hub is None:
        raise FileNotFoundError(f"{name} is not on the Hub; name a data folder that holds {source.local[0]}.")
    from huggingface_hub import hf_hub_download

    repository, revision, files = source.hub
    try:
        commit = hub.data_commit(repository, revision) or revision
        paths = [hf_hub_download(repository, file, repo_type="dataset", revision=commit) for file in files]
    except OSError as error:
        raise OSError(
            f"{name} ({repository}) could not be downloaded from the Hub: {shorten(str(error), 200)} Check "
            "the connection, or "
            f"name a folder that holds {source.local[0]} (--data-dir or {DATA_DIR})."
        ) from error
    kind = "parquet" if files[0].endswith(".parquet") else "json"
    commit = Path(paths[0]).parents[len(Path(files[0]).parts) - 1].name
    from datasets import load_dataset

    data = load_dataset(kind, data_files=paths, split="train")
    _refuse_gaps(name, data, _texts(source))
    return Records(data, {"dataset": repository, "revision": commit, "files": list(files)})


def is_data_set(records: Any) -> TypeGuard[Dataset]:
    """Whether these are a data set of the datasets library rather than plain records."""
    library = sys.modules.get("datasets")  # what it has made, it has made here
    return library is not None and isinstance(records, library.Dataset)


def _refuse_gaps(name: str, data: Dataset, texts: tuple[str, ...]) -> None:
    """ValueError where a record of a data set has no text."""
    for column in texts:
        if column not in data.column_names:
            raise ValueError(f"{name} has no column {column!r}, only {', '.join(data.column_names)}.")
        if data.features[column].dtype not in ("string", "large_string"):
            raise ValueError(f"{name} holds {data.features[column].dtype} in {column!r}, where a text must be.")
        if gaps := data.data.column(column).null_count:
            raise ValueError(f"{name} has {gaps:,} records without a text in {column!r}; fetch it again.")
