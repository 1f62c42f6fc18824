"""What a model costs: parameters, multiply-accumulates, weight bytes, and how fast it runs here.

Counts are exact and need no particular hardware (a model on the meta device will do); timings belong to the device,
dtype and shapes written beside them and to nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from eval import latency
from eval.checks import Progress, check_fits, check_model
from eval.int8 import as_floats
from eval.marks import begun
from eval.matrices import decoder_matrices
from pruners.interface import checks
from pruners.interface.checks import Count
from pruners.run.stream import evaluating
from pruners.weights import homes

MACS_TOKENS = 64  # as LLM-Pruner counts, one sequence
GROUPED = (torch.ops.aten._grouped_mm, torch.ops.transformers.grouped_mm_fallback)  # of experts, unknown to torch
ZEROS_WORTH_A_NOTE = 0.01
NO_SPEED_UP = (
    "Unstructured: no speed-up from dense kernels, which move the zeros and multiply by them; sparse ones report "
    "1.3 to 1.5 times at 50 % in decoding at batch 1 (MACKO, arXiv:2511.13061), and none of them is used here."
)
TWO_FOUR = (
    "2:4: no speed-up from dense kernels. Semi-structured kernels can help compute-bound prefill on devices that have "
    "them; decoding is bound by bandwidth. vLLM and llm-compressor dropped the format in March 2026 "
    "(github.com/vllm-project/vllm/pull/36799, llm-compressor/pull/2452)."
)


@dataclass(frozen=True)
class Counts:
    """Parameters (each tied one once), MACs of one sequence of `macs_tokens`, bytes of the weights as stored.

    `nonzero_parameters` is None on the meta device, where there are no values.
    """

    parameters: int
    decoder_parameters: int
    nonzero_parameters: int | None
    macs: int
    macs_tokens: int
    weight_bytes: int


@checks.arguments
def counts(model: PreTrainedModel, macs_tokens: Count = MACS_TOKENS) -> Counts:
    """Count what the modules really hold and do, so cut models with ragged blocks come out right."""
    check_model(model, values=False)
    return Counts(
        parameters=_numel(model),
        decoder_parameters=_numel(decoder_blocks(model)),
        nonzero_parameters=None if model.device.type == "meta" else sum(map(_nonzero, homes.each(model))),
        macs=macs(model, macs_tokens),
        macs_tokens=macs_tokens,
        weight_bytes=weight_bytes(model),
    )


@checks.arguments
def efficiency(
    model: PreTrainedModel,
    batch_sizes: checks.Counts = (1,),
    lengths: checks.Counts = (64,),
    new_tokens: Count = 16,
    repetitions: Count = 5,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Counts, and under `timing` prefill and decode for every batch size and length; plain JSON values.

    `decode_to_bound` is how many times a step takes what the weights' bytes take at the bandwidth of copies around it.

    No batch size or no length asks for the counts alone.  Raises TypeError or ValueError for invalid arguments
    and where a prompt and its new tokens are longer than the model's positions.
    """
    check_model(model, values=bool(batch_sizes and lengths))
    if batch_sizes and lengths and homes.of(model) is not None:
        raise ValueError(
            f"Timing needs all weights on the device, and these, {weight_bytes(model) / 1e9:.1f} GB, are "
            "offloaded; load the model whole on the device, or request the counts alone."
        )
    cells = [(batch, length) for batch in batch_sizes for length in lengths]
    found = {**asdict(counts(model)), "note": speed_note(model)}
    if not cells:
        return found
    for _, length in cells:
        check_fits(model, length, new_tokens)
    runs = []
    for done, (batch, length) in enumerate(cells, start=1):
        run = latency.measure(model, batch, length, new_tokens, repetitions)
        runs.append({**run, "decode_to_bound": _to_bound(run, bytes_per_step(model))})
        if progress:
            progress(done, len(cells))
    speed = max(run["reference"]["bytes"] / run["reference"]["fastest"] for run in runs)
    bound = bytes_per_step(model) / speed
    where = {**latency.where(model), "bandwidth_bytes_per_s": speed, "decode_bound_s": bound}
    return {**found, "timing": {**where, "runs": runs}}


def _to_bound(run: Mapping[str, Any], step_bytes: int) -> dict[str, float]:
    """Median and quartiles of a step's time over that of its weights' bytes at the bandwidth of the same moment."""
    factor = run["reference"]["bytes"] / step_bytes
    return {name: factor * run["decode_to_reference"][name] for name in ("median", "q1", "q3")}


@checks.arguments
def macs(model: PreTrainedModel, tokens: Count = MACS_TOKENS) -> int:
    """Multiply-accumulates of every matrix product in a forward pass over one sequence of `tokens`.

    Half the FLOPs of torch's counter; attention counts whole, without the causal half being left out, as in the
    papers.  The plain attention kernel is used, since the counter does not see into the fused one for CPUs.
    """
    check_fits(model, tokens, 0)
    ids = begun(model, torch.zeros(1, tokens, dtype=torch.long, device=model.device))
    counter = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(GROUPED, _grouped_flops))
    with evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _countable(model), as_floats(model), counter:
        model(ids, use_cache=True)  # with a cache transformers reads no values of the mask, which meta tensors lack
    return counter.get_total_flops() // 2


@contextmanager
def _countable(model: PreTrainedModel) -> Iterator[None]:
    """On the meta device no token can be looked up among the padding, and grouped kernels of experts refuse to run."""
    changes = {"pad_token_id": None, "_experts_implementation": "batched_mm"} if model.device.type == "meta" else {}
    before = {name: getattr(model.config, name) for name in changes}
    for name, value in changes.items():
        setattr(model.config, name, value if before[name] is not None else None)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(model.config, name, value)


def _grouped_flops(rows: Sequence[int], weights: Sequence[int], *_: Any, **__: Any) -> int:
    """Of rows [tokens, inp], each multiplied by the matrix of one expert; `weights` is [experts, inp, out]."""
    return 2 * rows[0] * rows[1] * weights[2]


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's largest list of modules, which is its decoder blocks in every family here."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks, so they cannot be counted.")
    return max(lists, key=_numel)


def weight_bytes(model: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def bytes_per_step(model: PreTrainedModel) -> int:
    """Weight bytes that a decoding step must read at least, whatever its tokens.

    All, but for input embeddings that are no output head, too, and for routed experts beyond those that one token
    takes: those of a batch may all take the same.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and embedding.weight is head.weight
    return weight_bytes(model) - (0 if tied else weight_bytes(embedding)) - _idle_bytes(model)


def _idle_bytes(model: PreTrainedModel) -> int:
    """Of the routed experts that no token of a step needs to take; transformers stacks a block's [experts, ...]."""
    used = getattr(model.config.get_text_config(), "num_experts_per_tok", None) or 1
    stacked = [weight for name, module in model.named_modules() if name.endswith(".experts")
               for weight in module.parameters()]  # fmt: skip
    return sum(max(len(weight) - used, 0) * weight[0].numel() * weight.element_size() for weight in stacked)


def speed_note(model: PreTrainedModel) -> str | None:
    """Why zeros in the decoder's matrices bring no speed; None without any."""
    if model.device.type == "meta":
        return None
    total, zeros, two_four = 0, 0, True
    for _, _, weight in decoder_matrices(model):
        total += weight.numel()
        zeros += weight.numel() - int(weight.count_nonzero())
        two_four = two_four and (not weight.numel() or is_two_four(weight))  # some may have nothing left
    if not zeros or zeros < ZEROS_WORTH_A_NOTE * total:
        return None
    return TWO_FOUR if two_four else NO_SPEED_UP


def is_two_four(weight: torch.Tensor) -> bool:
    """Whether at most two of every four consecutive inputs are kept in every row."""
    if weight.shape[1] % 4:
        return False
    return bool((weight.unflatten(1, (-1, 4)).count_nonzero(dim=-1) <= 2).all())


def _numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _nonzero(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(int(parameter.count_nonzero()) for parameter in parameters.values())
