"""lm-eval's scoring of a model that is already in memory.

Requests are packed into rows in which what several of them begin with stands once; those of a model that does not
compute such rows as it computes each request alone, into batches of one a row, sorted by length.  What does not fit is
halved, and so is what follows.  The head is applied only where an answer is read off.  The ranks of a launch share rows
and batches; rank 0 keeps what all of them answer, so that another number of ranks goes on from there.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eval.answers import Answer, AnswerStore
from eval.checks import Progress, check_tokenizer
from eval.marks import prefixed
from eval.requests import rows, sharing
from pruners.run import ranks
from pruners.weights import homes, sweep

Request = tuple[Any, list[int], list[int]]  # what was asked, the tokens before, the tokens to score
TOKENS_PER_BATCH = {"cpu": 1_024}  # more fall out of a CPU's caches and take longer
ACCELERATOR_TOKENS_PER_BATCH = 32_768  # halved on out-of-memory
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a weight
WORDS_AT_ONCE = 2**24
logger = logging.getLogger(__name__)


class Seen(Exception):  # noqa: N818  (a signal that a batch's tokens are known, not an error)
    pass


class Scorer(HFLM):
    """The `lm` that lm-eval asks; `batch_size` None packs by tokens, a number puts so many requests into a batch.

    `apart` says why each request has a row of its own, once requests were asked; None where they share rows.
    `truncated` counts, per task, the documents whose beginning did not fit the model's positions (lm-eval cuts it).
    Raises ValueError if the tokenizer has more tokens than the model has embeddings.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int | None = None,
        store: AnswerStore | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_tokenizer(model, tokenizer)
        super().__init__(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=1, softmax_dtype="float32")
        self._max_length = self.max_length
        self.tokenizer.model_max_length = 10**30  # too long prompts are counted here, not warned of one by one
        self.truncated: Counter[str] = Counter()
        self._asked_size, self._store, self._progress = batch_size, store, progress
        self._together = ranks.here(model.device)
        self._largest = batch_size or ACCELERATOR_TOKENS_PER_BATCH
        self._keep = 0
        self._seen: torch.Tensor | None = None  # by a pass that only looks at its tokens
        self._looks = False
        self._takes_keep = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.apart: str | None = f"a batch size of {batch_size} was requested" if batch_size else None
        self._checked = bool(batch_size)
        self._window = min(self._max_length, sharing.window(model) or self._max_length)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[Answer]:
        answers: list[Answer] = super().loglikelihood(requests, disable_tqdm=True)
        long = {(r.task_name, r.doc_id) for r, cut in zip(requests, self._cut, strict=True) if cut}
        self.truncated.update(task for task, _ in long)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Answer]:
        self._refuse_long(requests)
        self._check()
        self._cut = [len(before) + len(scored) > self.max_length + 1 for _, before, scored in requests]
        answers: dict[int, Answer] = {}
        batches = self._batches(requests)
        asked = [[requests[i] for i in batch] for batch in batches]
        for number, found in self._answered(asked):
            answers.update(zip(batches[number], found, strict=True))
            if self._progress:
                self._progress(len(answers), len(requests))
        return [answers[i] for i in range(len(requests))]

    def _check(self) -> None:
        """Find out once whether requests can share rows; no if any rank says so."""
        if self._checked:
            return
        self._checked = True
        told = self._together.each(lambda: sharing.why_apart(self.model))
        self.apart = next(filter(None, told), None)
        if self.apart:
            logger.warning("Every request is computed separately, with its whole context: %s.", self.apart)

    def _answered(self, batches: Sequence[list[Request]]) -> Iterator[tuple[int, list[Answer]]]:
        if self._together.count > 1:
            return self._shared(batches)
        return self._swept(batches) if homes.of(self.model) else enumerate(map(self._known_or_asked, batches))

    def _shared(self, batches: Sequence[list[Request]]) -> Iterator[tuple[int, list[Answer]]]:
        """By all ranks, as many batches at a time as there are ranks; all at once where each reads its weights for it.

        What was answered before and is kept, rank 0 knows.
        """
        keys = [digest(requests) for requests in batches]
        store, self._store = self._store, None
        known = self._together.first(lambda: [None if store is None else store.get(key) for key in keys])
        yield from ((number, _plain(found)) for number, found in enumerate(known) if found)
        new = [number for number, found in enumerate(known) if not found]
        away = homes.of(self.model) is not None
        ask = self._swept if away else lambda mine: enumerate(map(self._known_or_asked, mine))
        size = len(new) if away else self._together.count
        for start in range(0, len(new), max(size, 1)):
            here = new[start : start + size]

            def work(numbers: Sequence[int], here: list[int] = here) -> list[list[Answer]]:
                found = dict(ask([batches[here[number]] for number in numbers]))
                return [found[place] for place in range(len(numbers))]

            for number, found in zip(here, self._together.split(work, len(here)), strict=True):
                if store is not None:
                    store.put(keys[number], _plain(found))
                yield number, _plain(found)
        self._store = store

    def _swept(self, batches: Sequence[list[Request]]) -> Iterator[tuple[int, list[Answer]]]:
        """The same answers of a model whose weights are away from home, read once for many batches."""
        new = []
        for number, requests in enumerate(batches):
            if self._store is not None and (known := self._store.get(digest(requests))):
                yield number, known
            else:
                new.append(number)
        for at in sweep.over(self.model, [self._inputs_of(batches[number]) for number in new]):
            self._largest = max(self._largest, len(batches[new[at]]))  # the blocks have taken them all
            yield new[at], self._known_or_asked(batches[new[at]])

    def _inputs_of(self, requests: list[Request]) -> torch.Tensor | Mapping[str, torch.Tensor]:
        """What the model reads for them."""
        if self._share(requests):
            return sharing.inputs(self.model, self._row(requests))
        self._seen, self._looks = None, True
        try:
            with suppress(Seen):
                self._ask(requests)
        finally:
            self._looks = False
        assert self._seen is not None  # lm-eval calls the model for every batch
        return self._seen

    def _refuse_long(self, requests: Sequence[Request]) -> None:
        """ValueError for an answer that the model cannot take in one piece, or that has no token."""
        for asked, _, scored in requests:
            if not 0 < len(scored) <= self.max_length:
                told = repr(asked[1] if isinstance(asked, tuple) else asked)
                raise ValueError(
                    f"The answer {told[:60]} has {len(scored):,} tokens, and the model takes 1 to {self.max_length:,} "
                    "at once; leave its task out, or use a model with a longer context."
                )

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """Indices of every row or batch, longest first; the same for the same requests, finished or not."""
        shared = [index for index, request in enumerate(requests) if self._share([request])]
        room = rows.TOKENS_PER_ROW.get(self.device.type, rows.ACCELERATOR_TOKENS_PER_ROW)
        longest = min(rows.LONGEST_ROW, self.max_length)
        packed = rows.pack([self._whole(requests[i]) for i in shared], min(room, longest), longest)
        apart = sorted(set(range(len(requests))).difference(shared))
        return [[shared[i] for i in row] for row in packed] + self._apart(requests, apart)

    def _apart(self, requests: Sequence[Request], indices: Sequence[int]) -> list[list[int]]:
        """Batches of these, each with a row of its own."""
        tokens = {i: requests[i][1] + requests[i][2] for i in indices}
        batches: list[list[int]] = []
        room = 0
        for index in sorted(indices, key=lambda i: (-len(tokens[i]), tokens[i])):
            if room <= 0:
                batches.append([])
                room = self._asked_size or max(1, self._tokens_per_batch // min(len(tokens[index]), self.max_length))
            batches[-1].append(index)
            room -= 1
        return batches

    def _share(self, requests: Sequence[Request]) -> bool:
        """Whether these, which are in one row or batch, share a row: all of them or none."""
        return self.apart is None and len(self._whole(requests[0])) - 1 <= self._window

    def _whole(self, request: Request) -> list[int]:
        """Prompt and answer; of a long one the end."""
        _, before, scored = request
        assert before  # lm-eval puts a token before what has no prompt
        return (before + scored)[-(self.max_length + 1) :]

    @property
    def _tokens_per_batch(self) -> int:
        return TOKENS_PER_BATCH.get(self.device.type, ACCELERATOR_TOKENS_PER_BATCH)

    def _known_or_asked(self, requests: list[Request]) -> list[Answer]:
        key = digest(requests)
        if self._store is not None and (known := self._store.get(key)):
            return known
        if len(requests) > self._largest or (answers := self._ask(requests)) is None:
            half = (len(requests) + 1) // 2
            return self._known_or_asked(requests[:half]) + self._known_or_asked(requests[half:])
        if self._store is not None:
            self._store.put(key, answers)
        return answers

    def _ask(self, requests: list[Request]) -> list[Answer] | None:
        """One forward pass; None if it needs more memory than there is and can be split."""
        try:
            answers = self._ask_row(requests) if self._share(requests) else self._ask_apart(requests)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error) or len(requests) == 1:
                raise
        else:
            return _finite(answers)
        self._largest = (len(requests) + 1) // 2
        clear_device_cache(garbage_collection=True)
        return None

    def _row(self, requests: list[Request]) -> rows.Row:
        return rows.row([(self._whole(request), len(request[2])) for request in requests])

    def _ask_row(self, requests: list[Request]) -> list[Answer]:
        row = self._row(requests)
        with torch.inference_mode():
            asked = row.asked.to(self.device)
            inputs = sharing.inputs(self.model, row)
            return row.answers(self.model(**inputs, use_cache=False, logits_to_keep=asked).logits[0])

    def _ask_apart(self, requests: list[Request]) -> list[Answer]:
        self.batch_size_per_gpu = len(requests)
        lengths = [min(len(before) + len(scored), self.max_length + 1) - 1 for _, before, scored in requests]
        starts = [length - len(scored) for length, (_, _, scored) in zip(lengths, requests, strict=True)]
        self._keep = max(lengths) - min(starts)
        answers: list[Answer] = super()._loglikelihood_tokens(requests, disable_tqdm=True)
        return answers

    def _model_call(self, inps: torch.Tensor, attn_mask: Any = None, labels: Any = None) -> torch.Tensor:
        if self._looks:
            self._seen = inps
            raise Seen
        if not self._takes_keep:
            return super()._model_call(inps, attn_mask, labels)
        with torch.inference_mode():
            return self.model(inps, use_cache=False, logits_to_keep=self._keep).logits


def _plain(answers: Sequence[Sequence[Any]]) -> list[Answer]:
    """As they come from JSON."""
    return [(float(nats), bool(greedy)) for nats, greedy in answers]


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 of the logits for a few fixed tokens and of a checksum of every weight: another weight, dtype or kind of
    device gives another one."""
    rows = len(model.get_input_embeddings().get_parameter("weight"))
    tokens = prefixed(model, torch.arange(1, 17, device=model.device).remainder(rows)[None])
    with torch.inference_mode():
        for _ in sweep.over(model, [tokens]):
            logits = model(tokens, use_cache=False).logits
        each = (named for part in homes.each(model) for named in part.items())
        sums = sorted((name, _checksum(p)) for name, p in each if not p.is_meta)
    return hashlib.sha256(logits.float().cpu().numpy().tobytes() + repr(sums).encode()).hexdigest()


def _checksum(weight: torch.Tensor) -> int:
    """Of its bits and where they stand, modulo 2^64, computed where it is."""
    words = weight.detach().contiguous().flatten().view(WORDS[weight.element_size()])
    total = 0
    for number, some in enumerate(words.split(WORDS_AT_ONCE)):
        places = torch.arange(len(some), device=some.device) + number * WORDS_AT_ONCE
        total += int((some.long() * (2 * places + 1)).sum())
    return total % 2**64


def digest(requests: Sequence[Request]) -> str:
    """Names a batch by its tokens."""
    tokens = [(before, scored) for _, before, scored in requests]
    return hashlib.sha256(repr(tokens).encode()).hexdigest()


def out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)


def _finite(answers: list[Answer]) -> list[Answer]:
    if any(nats != nats for nats, _ in answers):
        raise FloatingPointError(
            "The model's log-likelihoods are NaN, so no accuracy can be computed; look for NaN or "
            "overflow in its weights, or run it with --dtype float32."
        )
    return answers
