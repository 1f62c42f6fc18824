"""Carries out a Retraining: text to examples, training, and its results for the record."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from experiments.data import corpora, tokens
from experiments.data.tokens import Tokenizer
from experiments.recovery import Documents, Instructions, Retraining
from experiments.spec import Windows
from pruners import retrain
from pruners.calibrate import Progress
from pruners.retrain import Retrained
from pruners.retrain.batches import IGNORED
from pruners.retrain.finetune import Watch
from pruners.retrain.state import OtherRunError
from pruners.run import ranks
from pruners.weights import storage

Record = dict[str, list[int]]
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


def retrained(
    model: Any,
    recovery: Retraining,
    examples: Any,
    held_out: Any,
    folder: Path,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Retrained:
    """Retrain `model` in place on its text's `examples`; what a killed process had reached lies in `folder`.

    `held_out` is that by which the best model is kept, where it is.

    A state there that is another run's, which only a file in a wrong place can be, is begun anew.  On a GPU blocks
    recompute their activations, so that memory is left for the weights.
    """
    train = partial(
        retrain.finetune,
        model,
        recovery.trainable,
        examples,
        steps=recovery.steps,
        learning_rate=recovery.learning_rate,
        batch_size=recovery.batch_size,
        warmup=recovery.warmup,
        seed=recovery.seed,
        micro_batch_size=recovery.micro_batch_size,
        checkpointing=model.device.type == "cuda",
        stop=recovery.stop,
        reference=recovery.reference,
        held_out=held_out if recovery.checks else None,
        check_every=recovery.check_every,
        folder=folder,
        progress=progress,
        watch=watch,
    )
    return own_state(folder, train)


def own_state(folder: Path, work: Callable[[], Result]) -> Result:
    """What `work` returns, which keeps its state in this folder of its own; another run's state is removed first."""
    try:
        return work()
    except OtherRunError as error:
        logger.warning("Starting over: %s", error)
        ranks.here().first(lambda: storage.remove(folder))
        return work()


def examples(text: Windows | Documents | Instructions, tokenizer: Tokenizer, data_dir: Path | None) -> Any:
    """Packed windows [count, length], or records of `input_ids` and `labels`; those of instructions are made as they
    are read, for there are millions of them."""
    if isinstance(text, Windows):
        return tokens.calibration(text, tokenizer, data_dir)
    if isinstance(text, Documents):
        return _documents(text, tokenizer.inner, data_dir)
    return _instructions(text, tokenizer.inner, data_dir, "train")


def held_out(text: Windows | Documents | Instructions, tokenizer: Tokenizer, data_dir: Path | None) -> list[Record]:
    """The records that are kept back from training; none of windows and documents."""
    return list(_instructions(text, tokenizer.inner, data_dir, "test")) if isinstance(text, Instructions) else []


def checked_on(recovery: Retraining, tokenizer: Tokenizer, data_dir: Path | None) -> Any:
    """What the best model is kept by; None where the last one is."""
    if not recovery.checks:
        return None
    if recovery.held_out:
        return examples(recovery.held_out, tokenizer, data_dir)
    return held_out(recovery.text, tokenizer, data_dir)


def _documents(text: Documents, tokenizer: Any, data_dir: Path | None) -> list[Record]:
    documents = corpora.rows(text.corpus, data_dir)[: text.count]
    found = [_cut(tokenizer, document, text.length) for document in documents]
    kept = [{"input_ids": ids} for ids in found if len(ids) > 1]
    if len(kept) < text.count:
        raise ValueError(
            f"{text.corpus} has {len(kept):,} documents of two tokens or more; {text.count:,} were requested."
        )
    return kept


@dataclass(frozen=True)
class _Answered:
    """The records of these `rows` as prompt and answer, made anew every time they are read.

    ValueError where every prompt fills the length, so that no answer is left to train on.
    """

    corpus: str
    records: Sequence[Any]
    rows: Sequence[int]
    tokenizer: Any
    length: int

    def __iter__(self) -> Iterator[Record]:
        answered = False
        for row in self.rows:
            record = _answered(self.tokenizer, self.records[row], self.length)
            if record["labels"][-1] != IGNORED:
                answered = True
                yield record
        if not answered:
            raise ValueError(
                f"None of the {len(self.rows):,} records of {self.corpus} that were drawn has an answer "
                f"within its first {self.length} tokens; use longer examples."
            )


def _instructions(text: Instructions, tokenizer: Any, data_dir: Path | None, part: str) -> _Answered:
    """`part` is `train` or `test`, which is held out."""
    records = corpora.instructions(text.corpus, data_dir)
    if len(records) <= text.held_out:
        raise ValueError(
            f"{text.corpus} has {len(records):,} records here, of which {text.held_out:,} are held out, so "
            "nothing is left to train on. Hold out fewer, or download the whole corpus."
        )
    from datasets import Dataset

    numbers = Dataset.from_dict({"row": range(len(records))})
    split = numbers.train_test_split(test_size=text.held_out, shuffle=True, seed=text.seed)
    return _Answered(text.corpus, records, split[part]["row"][:], tokenizer, text.length)


def _answered(tokenizer: Any, record: Any, length: int) -> Record:
    """Prompt and answer, ended where they fit; loss on the answer alone."""
    prompt = corpora.alpaca_prompt(record)
    if marks := getattr(tokenizer, "text_prefix", ()):
        told = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, record["output"]))
        ids = tokenizer.build_inputs_with_special_tokens(*told)[:length]
        before = min(ids.index(marks[-1]) if marks[-1] in ids else length, len(ids))
        return {"input_ids": ids, "labels": [IGNORED] * before + ids[before:]}
    asked, ids = _cut(tokenizer, prompt, length), _cut(tokenizer, prompt + record["output"], length)
    if len(ids) < length and ids[-1] != tokenizer.eos_token_id:
        ids = [*ids, tokenizer.eos_token_id]
    return {"input_ids": ids, "labels": [IGNORED] * min(len(asked), len(ids)) + ids[len(asked) :]}


def _cut(tokenizer: Any, text: str, length: int) -> list[int]:
    if marks := getattr(tokenizer, "text_prefix", ()):  # which it would put behind the text
        return [*marks, *tokenizer.encode(text, add_special_tokens=False)][:length]
    return tokenizer(text, truncation=True, max_length=length).input_ids
