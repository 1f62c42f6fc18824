"""How much device memory a cell takes, by what takes it: the one formula of `show`, `slurm` and the choice of a home.

    weights        all of them; away from home the block in hand and the next, or what lies around the blocks
    activations    hidden states of the calibration windows, what a batch makes inside a block, logits
    statistics     Hessians with their factorisation; gradients and their sums, of all blocks or of one
    training       what is trained in float32 with gradient and moments (16 bytes), masks of a bit a weight,
                   activations that backward reads: each block's inputs (away from home in CPU memory) and one block's
    gathered       where cards share what is trained, so that each has its part of these: what is whole for a while

Shapes come from a folder's configuration, or from the catalogue's parameters and blocks, as usual decoders have them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from experiments import models
from experiments.recovery import Retraining
from experiments.spec import Efficiency, Perplexity, Run, ZeroShot
from pruners.retrain.trainable import HEAD

BYTES = {"float32": 4, "float64": 8}
BATCH = 8  # windows at once, by default
HELD_TOKENS = 2**18  # whose hidden states stay on the device where weights are away; those of more are in CPU memory
SCORED_TOKENS = 4_096  # of the longest row of answers; families that cannot share one halve what does not fit
LOGITS_BYTES = 2 * 4 * 2**25  # logits in float32 and what the loss makes of them
CONTEXT_BYTES = 0.8e9  # of the accelerator's own libraries
LLAMA = (32_000, 2, 8 / 3)  # tokens, matrices of them around the blocks, channels of the MLP for each of the width's
LAYOUTS = {"facebook/opt": (50_272, 1, 4), "bigscience/bloom": (250_880, 1, 4), "EleutherAI/": (50_432, 2, 4)}
SLACK = 1.05  # of an allocator


@dataclass(frozen=True)
class Shape:
    """Of a decoder: `width` of the residual stream, `channels` of the MLP; `block` and `around` count parameters."""

    blocks: int
    width: int
    channels: int
    vocabulary: int
    block: int
    around: int

    @property
    def parameters(self) -> int:
        return self.blocks * self.block + self.around


def shape_of(model: str) -> Shape:
    found = models.find(model)
    if found.folder is not None:
        return _configured(found.folder, found.parameters or 0)
    layout = next((told for start, told in LAYOUTS.items() if (found.hub or "").startswith(start)), LLAMA)
    return _usual(found.parameters or 0, found.blocks or 1, *layout)


@lru_cache
def _configured(folder: Path, parameters: int) -> Shape:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False).get_text_config()
    width = config.hidden_size
    named = (getattr(config, name, None) for name in ("intermediate_size", "ffn_dim", "n_inner"))
    channels = next(filter(None, named), 4 * width)
    around = (1 if config.tie_word_embeddings else 2) * config.vocab_size * width
    blocks = config.num_hidden_layers
    return Shape(blocks, width, channels, config.vocab_size, max(0, parameters - around) // blocks, around)


@lru_cache
def _usual(parameters: int, blocks: int, vocabulary: int, matrices: int, channels: float) -> Shape:
    """12 width^2 parameters a block, so many times the width as channels, and embeddings and head around them."""
    a, b = 12 * blocks, matrices * vocabulary
    width = round((math.sqrt(b * b + 4 * a * parameters) - b) / (2 * a))
    around = min(parameters, b * width)
    return Shape(blocks, width, round(channels * width), vocabulary, (parameters - around) // blocks, around)


def device_bytes(run: Run, away: bool = False, batch: int = BATCH, cards: int = 1) -> dict[str, float]:
    """By item, at the stage where they take most together, on each of so many `cards` that share the cell.

    `away`: weights in CPU memory or on the disk.
    """
    return max(_stages(run, away, batch, cards), key=lambda items: sum(items.values()))


def device_gb(run: Run, away: bool = False, batch: int = BATCH, cards: int = 1) -> float:
    """What they are together, with an allocator's slack and the accelerator's libraries."""
    return 1e-9 * (SLACK * sum(device_bytes(run, away, batch, cards).values()) + CONTEXT_BYTES)


def home_on(run: Run, card_gb: float, cards: int = 1, weights: str = "auto") -> tuple[str | None, float]:
    """Where weights are on so many cards of that size, and the memory of a card that the cell takes then in GB.

    `device`, or `away`, as far as `weights` leaves the choice; None, with what the nearest of the two takes, where
    neither fits.
    """
    whole = device_gb(run, cards=cards)
    if whole <= card_gb and weights in ("auto", "device"):
        return "device", whole
    if weights == "device" or needs_all_weights(run):
        return None, whole
    part = device_gb(run, away=True, cards=cards)
    if part > card_gb:  # then fewer windows go through a block at once
        part = max(card_gb, device_gb(run, away=True, batch=1, cards=cards))
    return ("away" if part <= card_gb else None), part


def too_large(run: Run, card_gb: float, cards: int = 1) -> str | None:
    """Why no home of the weights lets the cell run on a card of that size; None where one does."""
    home, needed = home_on(run, card_gb, cards)
    if home is not None:
        return None
    whole = needs_all_weights(run)
    why = f", as {whole} needs all weights in place" if whole else ""
    where = "one accelerator and this one holds" if cards == 1 else f"each of {cards} accelerators, which hold"
    return f"{run.model_name} needs about {needed:.0f} GB on {where} {card_gb:g} GB{why}."


def weights_gb(run: Run) -> float:
    return 1e-9 * BYTES.get(run.dtype, 2) * (models.find(run.model).parameters or 0)


def trains_all_weights(run: Run) -> bool:
    return isinstance(run.recovery, Retraining) and run.recovery.trainable.weights


def all_weights_gb(run: Run) -> float:
    """What all weights take at the least where they must be in place; trained ones in float32, with gradient and
    moments."""
    return 16e-9 * (models.find(run.model).parameters or 0) if trains_all_weights(run) else weights_gb(run)


def needs_all_weights(run: Run) -> str | None:
    """What of a cell cannot be done with weights away from the device."""
    if trains_all_weights(run):
        return "training all weights"
    if run.method is not None and run.method.needs_all_weights:
        return "pruning channels of the residual stream"
    return "the speed of a model" if times_the_model(run) else None


def times_the_model(run: Run) -> bool:
    return any(isinstance(what, Efficiency) and what.batch_sizes and what.lengths for what in run.measures)


def _stages(run: Run, away: bool, batch: int, cards: int) -> list[dict[str, float]]:
    shape, size = shape_of(run.model), BYTES.get(run.dtype, 2)
    weights = size * (max(2 * shape.block, shape.block + shape.around) if away else shape.parameters)
    stages = [{"weights": weights, "activations": _measured(run, shape, size, batch)}]
    if run.calibrates and run.windows:
        stages += _pruning(run, shape, size, weights, away, batch)
    if isinstance(run.recovery, Retraining):
        stages.append({"weights": weights, "training": _masks(run.recovery, shape)})  # as the model arrives
        training = _training(run.recovery, shape, size, away, cards)
        kept = 0 if run.recovery.trainable.weights else weights  # else in float32, and among what is trained
        stages.append({"weights": kept if away else kept / cards, **training})
    return stages


def _pruning(run: Run, shape: Shape, size: int, weights: float, away: bool, batch: int) -> list[dict[str, float]]:
    assert run.windows is not None
    assert run.method is not None
    length, tokens = run.windows.length, run.windows.count * run.windows.length
    key = run.method.statistics_key or {}
    stages = []
    if key.get("kind") in ("gradient_norms", "group_scores"):
        at_once = length if key["kind"] == "gradient_norms" else max(length, min(tokens, 2048))
        blocks = 1 if away else shape.blocks
        sums = 4 * shape.block * blocks if key["kind"] == "gradient_norms" else 0
        logits = min(LOGITS_BYTES, 12 * at_once * shape.vocabulary) if away else 12 * at_once * shape.vocabulary
        kept = 2 * size * min(tokens, HELD_TOKENS) * shape.width if away else 0
        graph = at_once * blocks * (14 * shape.width + 5 * shape.channels) * size
        stages.append(
            {"weights": weights, "activations": graph + logits + kept, "statistics": sums + size * shape.block}
        )
    if run.method.walks:
        rows = min(batch, run.windows.count) * length
        hidden = size * shape.width * (min(tokens, HELD_TOKENS) if away else tokens)
        name = type(run.method).__name__
        scores = 8 * shape.width * shape.channels  # of one matrix
        gathered = _hessians(shape, size, away) if name == "SparseGPT" else scores
        sums = 0 if away or key.get("kind") != "gradient_norms" else 4 * shape.block * shape.blocks
        stages.append(
            {
                "weights": weights,
                "activations": hidden + _inside(shape, size, rows),
                "statistics": gathered + sums,
            }
        )
    return stages


def _hessians(shape: Shape, size: int, away: bool) -> float:
    """Of a block's four inputs in float32; the largest is turned into its factor in float64, in CPU memory if need be,
    by which a matrix is solved then."""
    largest, solved = shape.channels**2, (4 + size) * shape.width * shape.channels
    return 12 * shape.width**2 + max((8 if away else 24) * largest, 4 * largest + solved)


def _measured(run: Run, shape: Shape, size: int, batch: int) -> float:
    most = 0.0
    for what in run.measures:
        if isinstance(what, Perplexity):
            most = max(most, _inside(shape, size, batch * what.window) + LOGITS_BYTES)
        elif isinstance(what, ZeroShot):
            mask = (1 + size) * SCORED_TOKENS**2  # as it is given, and as attention adds it
            most = max(most, _inside(shape, size, SCORED_TOKENS) + mask + LOGITS_BYTES)
        elif isinstance(what, Efficiency) and what.batch_sizes and what.lengths:
            rows = max(what.batch_sizes) * (max(what.lengths) + what.new_tokens)
            most = max(most, _inside(shape, size, rows) + 2 * size * rows * shape.blocks * shape.width)
    return most


def _inside(shape: Shape, size: int, tokens: int) -> float:
    """What so many tokens take within a block: hidden states and the MLP's channels, or the heads' queries and keys."""
    return size * tokens * (4 * shape.width + 3 * shape.channels)


def _training(recovery: Retraining, shape: Shape, size: int, away: bool, cards: int) -> dict[str, float]:
    """Blocks recompute their activations, so each keeps its inputs alone."""
    each = max(1, recovery.batch_size // cards)
    tokens = min(recovery.micro_batch_size or each, each) * recovery.text.length
    trained, masks = _trained(recovery, shape), _masks(recovery, shape)
    kept = size * shape.width * (3 * each * recovery.text.length if away else tokens * shape.blocks)
    graph = size * tokens * (14 * shape.width + 5 * shape.channels)
    activations = kept + graph + 12 * tokens * shape.vocabulary
    if away or cards == 1:
        return {"training": 16 * trained + masks, "activations": activations}
    own = masks / cards if recovery.trainable.weights else masks
    return {
        "training": 16 * trained / cards + own,
        "gathered": _gathered(recovery, shape, size),
        "activations": activations,
    }


def _masks(recovery: Retraining, shape: Shape) -> float:
    """One bit a weight that training changes, and those of one matrix unpacked."""
    changes = recovery.trainable.weights or recovery.trainable.adapters is not None
    return shape.blocks * shape.block / 8 + 12 * shape.width * shape.channels if changes else 0


def _gathered(recovery: Retraining, shape: Shape, size: int) -> float:
    """What is whole for a while where cards share a model: what is around the blocks, and a block and the next.

    Where they are trained so are their gradients, some on their way to the other cards, and the block in hand as matrix
    products take it.
    """
    blocks, around = (8 if recovery.trainable.weights else size), (8 if recovery.trainable.embeddings else size)
    return 2 * blocks * shape.block + around * shape.around + 2 * shape.block * recovery.trainable.weights


def _trained(recovery: Retraining, shape: Shape) -> int:
    """Numbers that are trained; of a block the norms and biases are those of OPT, which has most."""
    trainable = recovery.trainable
    if trainable.weights:
        return shape.parameters
    rank = getattr(trainable.adapters, "rank", 0)
    small = 9 * shape.width + shape.channels if trainable.norms or trainable.biases else 0
    trained = shape.blocks * (small + rank * (9 * shape.width + 3 * (shape.width + shape.channels)))
    trained += (rank or HEAD.rank) * (shape.vocabulary + shape.width) * trainable.head
    return trained + shape.vocabulary * shape.width * trainable.embeddings
