"""What takes memory at each stage of a cell, in bytes: the one formula of `show`, `slurm` and the choice of a home.

weights        all of them; away from home the block in hand and the next, or what lies around the blocks
activations    hidden states of the calibration windows, what a batch makes inside a block, logits
statistics     Hessians with their factorisation; gradients and their sums, of all blocks or of one; scores
training       what is trained in float32 with gradient and moments (16 bytes), masks of a bit a weight,
               activations that backward reads: each block's inputs (away from home in CPU memory) and one block's,
               on a CPU, which recomputes nothing, all blocks'; for AdamW's step three numbers of its largest tensor
gathered       where cards share what is trained, so that each has its part of these: what is whole for a while
at home        what lies in CPU memory meanwhile: of weights that are away from their device inputs of blocks that
               backward needs, statistics, what a factorisation takes that has no room beside the weights; what is
               trained as it was after the last good step, and after the best
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from experiments.placement.shapes import Shape, shape_of
from experiments.recovery import Retraining
from experiments.spec import Efficiency, Perplexity, Run, ZeroShot
from pruners.llm_pruner import tokens_at_once
from pruners.retrain import Reconstruction, Trainable
from pruners.retrain.trainable import HEAD
from pruners.retrain.units import GRANULARITIES
from pruners.run.loss import LOGITS

BYTES = {"float32": 4, "float64": 8}
HOME = "at home"
HELD_TOKENS = 2**18  # whose hidden states stay on the device where weights are away; those of more are in CPU memory
SCORED_TOKENS = 4_096  # of the longest row of answers; families that cannot share one halve what does not fit
HEAD_ROWS = 256  # whose log-probabilities are made at once where answers are scored

Items = dict[str, float]


@dataclass(frozen=True)
class Cell:
    """A run with the sizes that its memory goes by: `size` bytes a weight, `batch` windows at once.

    `home` of the weights is device, host or disk.  `on_gpu`: in training backward makes a block's activations anew, and
    inputs are looked at as they are read.
    """

    run: Run
    shape: Shape
    size: int
    home: str
    batch: int
    cards: int
    on_gpu: bool

    @property
    def away(self) -> bool:
        return self.home != "device"


def of(run: Run, home: str, batch: int, cards: int, on_gpu: bool = True) -> list[Items]:
    cell = Cell(run, shape_of(run.model), BYTES.get(run.dtype, 2), home, batch, cards, on_gpu)
    stages = [*_measured(cell), *_pruning(cell)]
    if isinstance(run.recovery, Reconstruction) and run.windows:
        stages += _rebuilding(cell, run.recovery)
    if isinstance(run.recovery, Retraining):
        stages += _retraining(cell, run.recovery)
    return stages or [{"weights": _weights(cell)}]


def _weights(cell: Cell, beside: int = 0) -> float:
    """In place; away from home what `beside` the next block is needed at once, or a block and the next."""
    shape = cell.shape
    return cell.size * (shape.block + max(shape.block, beside) if cell.away else shape.parameters)


def _arrival(cell: Cell, tokens: int, mask: float = 0) -> list[Items]:
    """Where weights are away: the first block runs to tell what it returns, while the embeddings are held for all."""
    if not cell.away:
        return []
    shape = cell.shape
    held = cell.size * (shape.embedded + 2 * shape.block)
    return [{"weights": held, "activations": _inside(cell, tokens) + mask}]


def _measured(cell: Cell) -> list[Items]:
    shape, size, stages = cell.shape, cell.size, []
    held = _weights(cell, shape.around)
    for what in cell.run.measures:
        activations = 0.0
        if isinstance(what, Perplexity):
            tokens = cell.batch * what.window
            stages += _arrival(cell, tokens)
            activations = _inside(cell, tokens) + _logits(cell, tokens)
            if cell.away:  # of one batch; a sweep takes as much text through a block as there is room for
                activations += 3 * size * shape.width * tokens
        elif isinstance(what, ZeroShot):
            row = min(SCORED_TOKENS, shape.positions)
            mask = (1 + size) * row**2  # as it is given, and as attention adds it
            stages += _arrival(cell, row, mask)
            answers = shape.vocabulary * (size * row / 2 + 8 * HEAD_ROWS)  # half of the tokens are scored
            activations = max(_inside(cell, row) + mask, answers)
        elif isinstance(what, Efficiency) and what.batch_sizes and what.lengths:
            rows = max(what.batch_sizes) * (max(what.lengths) + what.new_tokens)
            activations = _inside(cell, rows) + 4 * size * rows * shape.blocks * shape.width  # two caches
        stages.append({"weights": held, "activations": activations})
    return stages


def _pruning(cell: Cell) -> list[Items]:
    method, windows, shape, size = cell.run.method, cell.run.windows, cell.shape, cell.size
    if method is None:
        return []
    key = (method.statistics_key or {}) if windows else {}
    gradients = {"gradient_norms": _gradient_norms, "group_scores": _group_scores}.get(key.get("kind", ""))
    stages = gradients(cell) if gradients else []
    summed = 4 * shape.block * shape.blocks if key.get("kind") == "gradient_norms" else 0
    name = type(method).__name__
    scores = (16 if summed else 10) * shape.matrix * (getattr(method, "granularity", None) != "layer")
    stage = {"weights": _weights(cell), "statistics": scores + summed * (not cell.away)}
    if cell.home == "host":  # on the disk the sums are read when they are asked for
        stage[HOME] = summed
    if method.walks and windows:
        rows, tokens = min(cell.batch, windows.count) * windows.length, windows.count * windows.length
        stages += _arrival(cell, rows)
        hidden = size * shape.width * (min(tokens, HELD_TOKENS) if cell.away else tokens)
        stage["weights"] = _weights(cell, shape.embedded)
        stage["activations"] = hidden + _inside(cell, rows, seen=not cell.on_gpu)
        if name == "SparseGPT":
            stage["statistics"], stage[HOME] = _hessians(cell)
    return [*stages, stage]


def _hessians(cell: Cell) -> tuple[float, float]:
    """Of a block's four inputs in float32, each turned into its factor in float64, by which matrices are solved then.

    Beside its float32 form 16 bytes a number; away from home, where the device has no room, 12 of the 20 in CPU memory.
    """
    small, large = cell.shape.width**2, cell.shape.channels**2
    solved = (4 + cell.size) * cell.shape.matrix
    others = cell.shape.experts - 1  # whose Hessians wait meanwhile
    waiting = 4 * others * (large + small)
    stages = [
        4 * large + 8 * small + 20 * small + waiting,  # of the first
        4 * large + 4 * small + 2 * solved + waiting,  # gate and up together
        4 * large + solved + 4 * others * large,
    ]
    factor = 20 * large + 4 * others * large
    if not cell.away:
        return max(*stages, factor), 0
    beside = max(*stages, 8 * large + 4 * others * large)
    return beside, max(0, factor - beside)


def _gradient_norms(cell: Cell) -> list[Items]:
    shape, tokens = cell.shape, cell.run.windows.count * cell.run.windows.length  # type: ignore[union-attr]
    blocks = 1 if cell.away else shape.blocks
    sums, handled = 4 * shape.block * blocks, (cell.size + 8) * shape.parameter
    kept = 4 * shape.block * shape.blocks * (cell.home == "host")
    return _backward(cell, cell.run.windows.length, tokens, sums, handled, kept)  # type: ignore[union-attr]


def _group_scores(cell: Cell) -> list[Items]:
    """Gradients of as many windows at once as there is room for, added up where there are more; squares beside them."""
    method, shape, windows = cell.run.method, cell.shape, cell.run.windows
    assert windows is not None  # there is no key without
    if method.score_dtype is not None:
        cell = replace(cell, size=BYTES[method.score_dtype])
    tokens = windows.count * windows.length
    blocks = 1 if cell.away else shape.blocks
    squares = method.importance == "element_mix"
    room = tokens if windows.sampling == "dialogues" else tokens_at_once("cuda" if cell.on_gpu else "cpu")
    at_once = windows.length if method.importance == "element2" else max(windows.length, min(tokens, room))
    summed = 4 * shape.block * blocks * ((at_once < tokens and method.importance != "element2") + squares)
    matrix = max(shape.parameter, shape.embedded * (method.granularity == "channel"))
    handled = (20 if squares else 16) * matrix  # its gradient as it comes and averaged, and what it is scored by
    kept = 4 * shape.block * shape.blocks * squares * cell.away
    return _backward(cell, at_once, tokens, summed, handled, kept)


def _backward(cell: Cell, at_once: int, tokens: int, summed: float, handled: float, kept: float) -> list[Items]:
    """`handled` is what one parameter's gradient takes when it comes; the loss and its logits are over by then."""
    shape, size = cell.shape, cell.size
    graph = _graph(cell, at_once) * (1 if cell.away else shape.blocks)
    logits = 12 * _predicted(shape, at_once, cell.run.windows.length)  # type: ignore[union-attr]
    if not cell.away:
        loss = max(0, logits - handled)
        return [{"weights": _weights(cell), "activations": graph + loss, "statistics": summed + handled}]
    states = 2 * size * min(tokens, HELD_TOKENS) * shape.width  # and their gradients
    most = max(graph + summed + handled, logits)
    passes: Items = {
        "weights": _weights(cell, shape.around),
        "activations": states + most - summed - handled,
        "statistics": summed + handled,
        HOME: kept + size * tokens * shape.width * shape.blocks,
    }
    return [*_arrival(cell, at_once), passes]


def _rebuilding(cell: Cell, recovery: Reconstruction) -> list[Items]:
    """One block, or what is trained in its place, trains at a time, on the hidden states before and behind it.

    Batches of the walk have made those.  Parts of a block are compared with what the dense block was, kept beside it;
    attention's aims are one more state.
    """
    windows, shape, size = cell.run.windows, cell.shape, cell.size
    assert windows is not None  # the caller has looked
    count, dense = min(GRANULARITIES[recovery.granularity], shape.blocks), recovery.inputs == "dense"
    matrix, apart = (recovery.granularity == one for one in ("matrix", "attention_mlp"))
    share = {"matrix": 1, "attention_mlp": 3}.get(recovery.granularity, 0) * shape.matrix / shape.block or count
    trained = share * _trained(recovery.trainable, shape) / shape.blocks
    tokens = recovery.batch_size * windows.length
    states = (3 + dense + (count > 1) + apart * (2 - dense)) * size * shape.width * windows.count * windows.length
    matrices = recovery.trainable.weights or recovery.trainable.adapters is not None
    changing = share * shape.block if matrices else trained
    graph = _inside(cell, tokens) + 12 * tokens * shape.channels if matrix else _graph(cell, tokens, recovery.trainable)
    training: Items = {
        "weights": _weights(cell, shape.embedded) + cell.away * (count - 1) * size * shape.block,
        "training": 16 * trained + _block_masks(recovery, shape, share) + size * changing,  # as pruning has left that
        "activations": states + count * graph,
    }
    if matrix or apart:
        training["statistics"] = size * (shape.block + matrix * shape.matrix)
    rows = min(cell.batch, windows.count) * windows.length
    walk: Items = {"weights": _weights(cell, shape.embedded), "activations": states + _inside(cell, rows)}
    return [*_arrival(cell, rows), walk, training]


def _predicted(shape: Shape, tokens: int, length: int) -> int:
    """Logits that a loss makes at once of so many tokens in rows of `length`: one place of each row at least."""
    return min(tokens, max(LOGITS // shape.vocabulary, tokens // length)) * shape.vocabulary


def _logits(cell: Cell, tokens: int) -> float:
    """As the head gives them, in float32, and what the loss makes of them."""
    return (8 + cell.size * (cell.size < 4)) * min(LOGITS, tokens * cell.shape.vocabulary)


def _inside(cell: Cell, tokens: int, seen: bool = False) -> float:
    """What so many tokens take within a block: hidden states and the MLP's channels, or the heads' queries and keys.

    `seen`: the channels are looked at, in float32, as they reach the last matrix; a GPU does so as it reads them.
    """
    shape, size = cell.shape, cell.size
    if shape.routes:  # gate and up of all experts, and what becomes of them, as one matrix each
        return tokens * size * (4 * shape.width + shape.routes * (4 * shape.channels + 2 * shape.width))
    channels = max(3 * size, size + (4 if size == 4 else 8) * seen)
    return tokens * (4 * size * shape.width + channels * shape.channels)


def _graph(cell: Cell, tokens: int, trainable: Trainable | None = None) -> float:
    """What backward through one block reads of so many tokens; norms work in float32.

    `trainable`, if there is one, also reads what it multiplies: norms their inputs, adapters that drop out their own.
    """
    shape, upcast = cell.shape, 4 * (cell.size < 4)
    drops = getattr(trainable and trainable.adapters, "dropout", 0) > 0
    width = 9 + upcast + 2 * (trainable is not None) + 7 * drops
    if shape.routes:
        changes = trainable is None or trainable.weights
        routed = shape.routes * ((3 + changes) * shape.channels + (1 + changes) * shape.width)
        return cell.size * tokens * (width * shape.width + routed)
    return cell.size * tokens * (width * shape.width + (4 + drops) * shape.channels)


def _retraining(cell: Cell, recovery: Retraining) -> list[Items]:
    """The model as it arrives, then a batch's forward and backward passes, and the end: a last block, and the step.

    Gradients come as activations go, unless those of an earlier micro-batch are there.
    """
    shape, cards = cell.shape, 1 if cell.away else cell.cards
    trainable, held, masks = recovery.trainable, _weights(cell, shape.around), _masks(recovery, shape)
    anew = held if trainable.weights else cell.size * shape.embedded * trainable.embeddings  # among what is trained
    count, bits = _trained(trainable, shape) / cards, masks / (cards if trainable.weights else 1)
    state: Items = {"weights": (held - anew) / cards, "training": 16 * count + bits}
    if cards > 1:
        state["gathered"] = _gathered(recovery, shape, cell.size)
    end: Items = {"weights": cell.size * shape.block} if cell.away else {}  # one may have been fetched ahead
    each, tokens = _tokens(cell, recovery)
    block = _graph(cell, tokens, trainable) + 12 * shape.matrix * (masks > 0)  # with a matrix's mask
    block += 2 * cell.size * tokens * shape.routes * shape.channels  # gradients of what experts make, whole
    largest = max(shape.matrix * trainable.weights, shape.embedded * trainable.embeddings) / cards
    activations, inputs = _passes(cell, recovery, block)
    kept = 4 * count * (1 + recovery.checks)
    return [
        *_arrival(cell, tokens),
        {"weights": held, "training": masks + 3 * shape.matrix * (masks > 0)},
        {
            **state,
            "training": (12 + 4 * (tokens < each)) * count + bits,
            "activations": activations,
            HOME: kept + inputs,
        },
        {**state, **end, "activations": max(12 * largest, 0 if cell.away else block), HOME: kept},
    ]


def _tokens(cell: Cell, recovery: Retraining) -> tuple[int, int]:
    """Of a step on one card, and of these at once."""
    each = max(1, recovery.batch_size // cell.cards)
    return each * recovery.text.length, min(recovery.micro_batch_size or each, each) * recovery.text.length


def _passes(cell: Cell, recovery: Retraining, block: float) -> tuple[float, float]:
    """What they take on the device and at home; `block` while backward is in one, when the logits are gone."""
    shape, size = cell.shape, cell.size
    each, tokens = _tokens(cell, recovery)
    sharded = cell.cards > 1 and not cell.away  # whose logits are made whole
    logits = 12 * (tokens * shape.vocabulary if sharded else _predicted(shape, tokens, recovery.text.length))
    if cell.away:
        whole = size * shape.width * each
        return 3 * whole + max(block, logits), float(whole * shape.blocks)
    if not cell.on_gpu:
        graph = _graph(cell, tokens, recovery.trainable)
        return (shape.blocks - 1) * graph + max(block, graph + logits), 0.0
    return size * shape.width * tokens * shape.blocks + max(block, logits), 0.0


def _masks(recovery: Retraining, shape: Shape) -> float:
    """One bit a weight that training changes."""
    changes = recovery.trainable.weights or recovery.trainable.adapters is not None
    return shape.blocks * shape.block / 8 if changes else 0


def _block_masks(recovery: Reconstruction, shape: Shape, share: float) -> float:
    return share * shape.block / 8 + 12 * shape.matrix if recovery.trainable.adapters is not None else 0


def _gathered(recovery: Retraining, shape: Shape, size: int) -> float:
    """What is whole for a while where cards share a model: what is around the blocks, and a block and the next.

    Where they are trained so are their gradients, some on their way to the other cards, and the block in hand as matrix
    products take it.
    """
    blocks, around = (8 if recovery.trainable.weights else size), (8 if recovery.trainable.embeddings else size)
    return 2 * blocks * shape.block + around * shape.around + 2 * shape.block * recovery.trainable.weights


def _trained(trainable: Trainable, shape: Shape) -> int:
    """Numbers that are trained; of a block the norms and biases are those of OPT, which has most."""
    if trainable.weights:
        return shape.parameters
    rank = getattr(trainable.adapters, "rank", 0)
    small = 9 * shape.width + shape.channels if trainable.norms or trainable.biases else 0
    trained = shape.blocks * (small + rank * (9 * shape.width + 3 * (shape.width + shape.channels)))
    trained += (rank or HEAD.rank) * (shape.vocabulary + shape.width) * trainable.head
    return trained + shape.vocabulary * shape.width * trainable.embeddings
