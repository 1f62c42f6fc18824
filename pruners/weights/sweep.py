"""Forward passes over many inputs that read the weights once: a block's weights come, all inputs go through it.

    for number in sweep.over(model, inputs):
        logits = model(inputs[number], use_cache=False).logits      # or the decoder's hidden states

What stands in the loop runs what lies before and behind the blocks; the blocks hand on what they have made of that
input.  Every input keeps its own shape, so the numbers are those of separate passes to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pruners import anatomy
from pruners.lazy import Tensor, nn, torch
from pruners.run.stream import Arguments, handing_on, inputs_of
from pruners.weights import homes, memory

if TYPE_CHECKING:
    Input = Tensor | Mapping[str, Tensor]  # tokens [rows, tokens], or what the model is called with by name

FEW = 16  # tokens
COPIES = 3  # of an input's hidden states: before and after a block, and what stands beside them


def over(model: nn.Module, inputs: Sequence[Input]) -> Iterator[int]:
    """The numbers of the inputs in order; where weights are in place the loop's own passes compute everything."""
    if homes.of(model) is None:
        yield from range(len(inputs))
        return
    done = 0
    while done < len(inputs):
        together = _fitting(model, inputs[done:])
        for number in _one(model, inputs[done : done + together]):
            yield done + number
        done += together


def _one(model: Any, inputs: Sequence[Input]) -> Iterator[int]:
    hidden: list[Any] = []
    others: list[list[Arguments]] = []
    returned: list[tuple[Any, ...]] = []
    with homes.held(model.get_input_embeddings()):
        if isinstance(inputs[0], Tensor):  # the first to come runs a block to tell what blocks return; a few tokens do
            inputs_of(model, inputs[0][:1, :FEW], returned)
        for tokens in inputs:
            states, arguments = inputs_of(model, tokens, returned)
            hidden.append(states)
            others.append(arguments)
    for index, module in enumerate(anatomy.modules(model)):
        with homes.held(module), torch.no_grad():  # a graph would hold every block's weights
            for number, states in enumerate(hidden):
                made = module(states, **others[number][index])
                hidden[number] = made if isinstance(made, Tensor) else made[0]
    with homes.held(*homes.around_the_blocks(model)):
        for number, states in enumerate(hidden):
            with handing_on(model, states, returned):
                yield number
            hidden[number] = None


def _fitting(model: Any, inputs: Sequence[Input]) -> int:
    """How many inputs from the first on have room for their hidden states; one at least."""
    room = memory.SHARE * memory.free_bytes(model.device)
    width = model.config.hidden_size * model.dtype.itemsize * COPIES
    for number, told in enumerate(inputs):
        tokens, others = (told, ()) if isinstance(told, Tensor) else (told["input_ids"], told.values())
        room -= tokens.numel() * width + sum(other.nbytes for other in others)  # masks grow with their square
        if room < 0:
            return max(number, 1)
    return len(inputs)
