"""Examples in training order, and as padded batches."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pruners.interface.checks import shown, typed
from pruners.lazy import Tensor, nn, torch
from pruners.run import inputs
from pruners.run.inputs import IGNORED

EXAMPLES = "Examples are a LongTensor [count, length], or records with `input_ids`"


class Packed:
    """Examples end to end in two arrays, 8 bytes a token for its id and its label: millions of them fit in memory."""

    def __init__(self) -> None:
        self._tokens, self._labels, self._ends = array("i"), array("i"), array("q", [0])

    def append(self, tokens: Tensor, labels: Tensor) -> None:
        self._tokens.frombytes(tokens.int().cpu().numpy().tobytes())
        self._labels.frombytes(labels.int().cpu().numpy().tobytes())
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Tokens and labels [length] in int64."""
        start, end = self._ends[index], self._ends[index + 1]
        kept = (self._tokens, self._labels)
        tokens, labels = (torch.frombuffer(a, dtype=torch.int32, count=end - start, offset=4 * start) for a in kept)
        return tokens.long(), labels.long()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return (self[index] for index in range(len(self)))


class Batches:
    """Examples of tokens and labels, shuffled anew by `seed` every time they have all been seen, or as they come.

    `examples` are windows [count, length], or records with `input_ids` and, where not every token is to be predicted,
    `labels` (-100: no loss); they are read once, one by one.  Raises TypeError for other types, ValueError for
    examples that are absent, too short or not the model's.
    """

    def __init__(self, examples: Iterable[Any], batch_size: int, seed: int, config: Any, shuffle: bool = True) -> None:
        self.examples, self.batch_size, self.seed, self.shuffle = Packed(), batch_size, seed, shuffle
        _check_kind(examples)
        for index, example in enumerate(examples):
            tokens, labels = _tokens_and_labels(index, example, config)
            _check(index, tokens, labels, config)
            self.examples.append(tokens, labels)
        if not len(self.examples):
            raise ValueError("Retraining needs at least one example; got none.")
        self._epoch, self._order = -1, torch.empty(0)

    def indices(self, step: int) -> list[int]:
        """The examples of a step, whatever was asked for before."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._at(place) for place in places]

    def predicted(self, indices: Sequence[int]) -> int:
        """Tokens of these examples that carry loss."""
        return sum(int((self.examples[index][1][1:] != IGNORED).sum()) for index in indices)

    def collated(self, indices: Sequence[int], device: torch.device) -> dict[str, Tensor]:
        """Padded on the right to the longest; a mask only where there is padding."""
        tokens, labels = zip(*(self.examples[index] for index in indices), strict=True)
        batch = {"input_ids": _padded(tokens, 0), "labels": _padded(labels, IGNORED)}
        if len({len(row) for row in tokens}) > 1:
            batch["attention_mask"] = _padded([torch.ones_like(row) for row in tokens], 0)
        return {name: tensor.to(device) for name, tensor in batch.items()}

    def digest(self) -> str:
        total = hashlib.sha256()
        for tokens, labels in self.examples:
            total.update(tokens.numpy().tobytes() + b"|" + labels.numpy().tobytes() + b"\n")
        return total.hexdigest()

    def _at(self, place: int) -> int:
        epoch, position = divmod(place, len(self.examples))
        if not self.shuffle:
            return position
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._epoch, self._order = epoch, torch.randperm(len(self.examples), generator=generator)
        return int(self._order[position])


def _check_kind(examples: Any) -> None:
    if isinstance(examples, str | bytes | Mapping) or not isinstance(examples, Iterable):
        raise TypeError(f"{EXAMPLES}; got {typed(examples)}.")
    if isinstance(examples, Tensor) and (examples.ndim != 2 or examples.dtype != torch.long or examples.is_meta):
        values = " without values" * examples.is_meta
        raise ValueError(f"{EXAMPLES}; got a tensor of {examples.dtype} {list(examples.shape)}{values}.")


def _tokens_and_labels(index: int, example: Any, config: Any) -> tuple[Tensor, Tensor]:
    if isinstance(example, Tensor):
        tokens = _row(f"Example {index}", example)
        return tokens, inputs.labels(config, tokens)
    if not isinstance(example, Mapping):
        raise TypeError(f"{EXAMPLES}; example {index} is {typed(example)}.")
    if "input_ids" not in example:
        raise ValueError(f"Example {index} has no `input_ids`; it has {shown(sorted(map(str, example)))}.")
    tokens = _row(f"`input_ids` of example {index}", example["input_ids"])
    return tokens, _row(f"`labels` of example {index}", example["labels"]) if "labels" in example else inputs.labels(
        config, tokens
    )


def _row(what: str, value: Any) -> Tensor:
    """Whole numbers [length] in int64, on the CPU."""
    try:
        row = torch.as_tensor(value, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} are whole numbers, one a token; got {typed(value)}.") from error
    if row.ndim != 1 or (row.numel() and row.dtype not in (torch.int64, torch.int32, torch.int16)):
        raise ValueError(f"{what} are whole numbers, one a token; got {row.dtype} {list(row.shape)}.")
    return row.long()


def _check(index: int, tokens: Tensor, labels: Tensor, config: Any) -> None:
    if len(tokens) != len(labels):
        raise ValueError(
            f"Example {index} has {len(tokens)} tokens and {len(labels)} labels; their numbers must be equal."
        )
    if len(tokens) < 2 or (labels[1:] == IGNORED).all():
        raise ValueError(f"Example {index} is too short: none of its {len(tokens)} tokens is predicted.")
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and len(tokens) > positions:
        raise ValueError(
            f"Example {index} of {len(tokens)} tokens is longer than the model's context length, {positions}; cut it."
        )
    for part, whose in ((tokens, "example"), (labels[labels != IGNORED], "the labels of example")):
        cause = "it was made with another model's tokenizer"
        inputs.in_vocabulary(part, config.vocab_size, cause, f" of {whose} {index}")


def _padded(rows: Sequence[Tensor], value: int) -> Tensor:
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
