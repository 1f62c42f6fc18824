"""Packs requests into one sequence (a row) in which a common prefix of several requests is computed once.

The row is a tree: a token's parent is the token before it in its request, and requests with a common beginning (the
answers to a question, questions after the same examples) part where they differ.  A token attends to its ancestors and
to itself, at the position that it has in its request, so each request is computed as it would be alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from eval.answers import Answer

TOKENS_PER_ROW = {"cpu": 256}  # more take longer, since all tokens of a row are compared with each other
ACCELERATOR_TOKENS_PER_ROW = 2_048
LONGEST_ROW = 4_096  # of requests that begin with a lot in common
WORTH_A_LONGER_ROW = 4  # times what all requests of a row have in common
HEAD_ROWS = 256  # whose log-probabilities over all tokens are in memory at once


@dataclass(frozen=True)
class Row:
    """`tokens` and `positions` [tokens]; `ends`: behind the last descendant of each, which follow it without a gap.

    `asked` [heads] are the tokens behind which an answer is read off.  The scored tokens of all requests one after the
    other, `counts` of each: which one of `asked` stands before it (`places`), and what it is (`targets`).
    """

    tokens: Int[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    ends: Int[Tensor, " tokens"]
    asked: Int[Tensor, " heads"]
    places: list[int]
    targets: list[int]
    counts: list[int]

    def inputs(self, device: torch.device, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What a model is called with; the mask is True where a token attends, or of `dtype` to be added to scores."""
        tokens, positions, ends = torch.stack([self.tokens, self.positions, self.ends]).to(device)
        index = torch.arange(len(tokens), device=device)
        mask = (index <= index[:, None]) & (index[:, None] < ends)
        if dtype is not None:
            mask = torch.zeros(mask.shape, dtype=dtype, device=device).masked_fill(~mask, torch.finfo(dtype).min)
        return {"input_ids": tokens[None], "position_ids": positions[None], "attention_mask": mask[None, None]}

    def answers(self, logits: Float[Tensor, "heads vocabulary"]) -> list[Answer]:
        """Of every request, from the logits behind `asked`; read off the device once."""
        places = torch.tensor(self.places, device=logits.device)
        targets = torch.tensor(self.targets, device=logits.device)
        nats, greedy = torch.empty_like(targets, dtype=torch.float32), torch.empty_like(targets, dtype=torch.bool)
        for start in range(0, len(logits), HEAD_ROWS):
            logs = logits[start : start + HEAD_ROWS].log_softmax(-1, dtype=torch.float32)
            here = (places >= start) & (places < start + HEAD_ROWS)
            rows = (places - start).clamp(0, len(logs) - 1)
            nats = torch.where(here, logs[rows, targets], nats)
            greedy = torch.where(here, logs.argmax(-1)[rows] == targets, greedy)
        each = torch.stack([nats.double(), greedy.double()]).tolist()
        bounds = accumulate(self.counts, initial=0)
        return [(sum(each[0][start:end]), all(each[1][start:end])) for start, end in pairwise(bounds)]


def row(requests: Sequence[tuple[Sequence[int], int]]) -> Row:
    """Of requests in the order of their tokens: what the model reads, and how many of its last tokens are asked for.

    A request is the tokens of prompt and answer; the last one is scored and not read.
    """
    tokens: list[int] = []
    positions: list[int] = []
    ends: list[int] = []
    places: list[int] = []
    targets: list[int] = []
    heads: dict[int, int] = {}
    path: list[int] = []
    before: np.ndarray = np.empty(0, np.int64)
    for whole, scored in requests:
        read = np.asarray(whole[:-1], np.int64)
        common = _common(before, read)
        for node in path[common:]:
            ends[node] = len(tokens)
        path[common:] = range(len(tokens), len(tokens) + len(read) - common)
        tokens += read[common:].tolist()
        positions += range(common, len(read))
        ends += [0] * (len(read) - common)
        places += [heads.setdefault(node, len(heads)) for node in path[-scored:]]
        targets += whole[-scored:]
        before = read
    for node in path:
        ends[node] = len(tokens)
    counts = [scored for _, scored in requests]
    each = [torch.tensor(numbers) for numbers in (tokens, positions, ends, list(heads))]
    return Row(each[0], each[1], each[2], each[3], places, targets, counts)


def pack(requests: Sequence[Sequence[int]], room: int, longest: int) -> list[list[int]]:
    """Numbers of the requests of every row, in the order of their tokens; the longest row first.

    A row has at most `room` tokens, or up to `longest` where all its requests have much in common, or is one request
    with those that continue it.  Rows end where the fewest tokens have to be read again.
    """
    reads = [np.asarray(tokens[:-1], ">u4") for tokens in requests]
    keys = [read.tobytes() for read in reads]
    order = sorted(range(len(reads)), key=lambda number: (keys[number], requests[number][-1]))
    sizes = [len(reads[number]) for number in order]
    common = [0, *(_common(reads[a], reads[b]) for a, b in pairwise(order))][: len(order)]
    found = [(order[start:end], size) for start, end, size in _cut(sizes, common, room, longest)]
    return [numbers for numbers, _ in sorted(found, key=lambda told: -told[1])]


def _cut(sizes: Sequence[int], common: Sequence[int], room: int, longest: int) -> Iterator[tuple[int, int, int]]:
    """First request, the one behind the last, and the tokens of every row."""
    start = 0
    while start < len(sizes):
        totals, by_all = [sizes[start]], longest
        for number in range(start + 1, len(sizes)):
            by_all = min(by_all, common[number])
            total = totals[-1] + sizes[number] - common[number]
            if total > max(totals[0], room, min(WORTH_A_LONGER_ROW * by_all, longest)):
                break
            totals.append(total)
        end = start + len(totals)
        if end < len(sizes):
            late = [n for n in range(start + 1, end + 1) if totals[n - 1 - start] >= totals[-1] / 2]
            end = min(late, key=lambda n: (common[n], -n))
        yield start, end, totals[end - 1 - start]
        start = end


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Of how many tokens both begin."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    return int(differ.argmax()) if differ.any() else size
