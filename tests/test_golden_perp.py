"""Retraining and reconstruction against PERP's released code on a small trained OPT: every number of every step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import SHARED
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import pruners
from eval.perplexity import perplexity
from pruners.retrain import LoRA, LoRAPrune, MaskLoRA, Reconstruction, ScaleLoRA, Trainable, finetune
from pruners.retrain.adapters import LowRank
from pruners.retrain.schedule import Schedule
from pruners.retrain.trainable import Attached

FOLDER, MODEL = SHARED / "golden/perp", SHARED / "data/models/opt-mini"
THERE = FOLDER.is_dir() and MODEL.is_dir()
pytestmark = pytest.mark.skipif(not THERE, reason=f"{FOLDER} or {MODEL} is absent: golden values are not beside us")
GOLDEN: dict[str, Any] = json.loads((FOLDER / "golden.json").read_text()) if THERE else {}
WITHIN = GOLDEN.get("tolerances", {})
KINDS: dict[str, type[Any]] = {"lora_prune": LoRAPrune, "mask_lora": MaskLoRA}
AB = (".A", ".B")
FROZEN = "k_proj.bias"  # shifts all scores of a query alike: its gradient is rounding, of which Adam makes whole steps


def cases(part: str) -> list[str]:
    return list(GOLDEN.get(part, {}))


@pytest.fixture(scope="module")
def stored() -> dict[str, Tensor]:
    files = ("cases", "adapters", "masks_reconstruction")
    return {key: tensor for file in files for key, tensor in load_file(FOLDER / f"{file}.safetensors").items()}


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, dropout=0.0).eval()


@pytest.fixture
def model(dense: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """The dense model, which a test may change."""
    fresh = type(dense)(dense.config)
    fresh.load_state_dict(dense.state_dict())
    fresh.tie_weights()
    return fresh.eval()


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, stored: dict[str, Tensor]) -> None:
    """Adapters start with the A of the released run; ScaleLoRA has a start of its own."""

    def start(self: LowRank, a: Tensor, b: Tensor, name: str, seed: int) -> None:
        a.copy_(stored[f"{name}.A"])
        b.zero_()

    monkeypatch.setattr(LowRank, "start", start)


class Seen:
    """What a run shows while it goes: trained tensors before their merge, perplexity then, gradient norms."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, measure: Callable[[], float] | None = None) -> None:
        self.norms: list[float] = []
        self.tensors: list[dict[str, Tensor]] = []
        self.counts: list[tuple[int, int]] = []
        self.before: list[float] = []
        merge, clip = Attached.merge, nn.utils.clip_grad_norm_

        def merged(attached: Attached) -> None:
            self.tensors.append({name: p.detach().clone() for name, p in attached.tensors.items()})
            self.counts.append((attached.trained, attached.parameters))
            if measure:
                self.before.append(measure())
            merge(attached)

        def clipped(*args: Any, **kwargs: Any) -> Tensor:
            self.norms.append(float(norm := clip(*args, **kwargs)))
            return norm

        monkeypatch.setattr(Attached, "merge", merged)
        monkeypatch.setattr(nn.utils, "clip_grad_norm_", clipped)


def measured(model: PreTrainedModel, stored: dict[str, Tensor]) -> float:
    return perplexity(model, stored["tokens|perplexity_opt_mini"].long(), 256).perplexity


def trainable(settings: dict[str, Any]) -> Trainable:
    if settings.get("peft_strategy") == "FullFT":
        return Trainable.full()
    what = {"biases": settings["peft_use_bias"], "norms": settings["peft_use_ln"]}
    what["head"] = bool(settings.get("peft_use_lm_head"))
    if not settings["peft_use_lora"]:
        return Trainable(**what)
    rank, alpha, kind = settings["lora_r"], settings["lora_alpha"], settings["lora_type"]
    if kind == "lora":
        return Trainable(**what, adapters=LoRA(rank, alpha=alpha, dropout=settings["lora_dropout"]))
    return Trainable(**what, adapters=ScaleLoRA(rank) if kind == "scale_lora" else KINDS[kind](rank, alpha=alpha))


def examples(rows: Tensor) -> Any:
    """Windows, or documents that were padded on the right with -1."""
    if (rows >= 0).all():
        return rows.long()
    return [{"input_ids": row[row >= 0].long()} for row in rows]


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    """By the dense model's names, also where a library's adapter stands around a matrix."""
    named = ((name.replace(".base_layer", ""), p.detach().clone()) for name, p in model.named_parameters())
    return {name: p for name, p in named if "lora_" not in name}


def zeros(tensors: dict[str, Tensor]) -> float:
    """Their share of the blocks' matrices."""
    matrices = [p for name, p in tensors.items() if ".layers." in name and p.ndim == 2]
    return sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)


def check_moved(final: dict[str, Tensor], start: dict[str, Tensor], case: dict[str, Any]) -> None:
    moved = {name: (final[name].double() - start[name].double()).flatten() for name in start}
    assert {name for name, d in moved.items() if d.any()} == set(case["moved"])
    for name, (size, weighted) in case["moved"].items():
        if FROZEN not in name:
            d, within = moved[name], WITHIN["moved_norm"] * size
            assert float(d.norm()) == pytest.approx(size, abs=within), name
            assert float(d @ torch.arange(len(d)).double().cos()) == pytest.approx(weighted, abs=within), name


def check_tensors(name: str, final: dict[str, Tensor], start: dict[str, Tensor], stored: dict[str, Tensor],
                  within: float) -> None:  # fmt: skip
    """||mine - golden|| against ||golden - start||, for whole tensors and slices such as `weight[:64,:64]`."""
    keys = [key for key in stored if key.startswith(f"{name}|") and FROZEN not in key]
    assert keys
    for key in keys:
        whole, _, rows = key.removeprefix(f"{name}|").partition("[:")
        here = tuple(slice(int(part.strip(":]"))) for part in rows.split(",")) if rows else ...
        mine, golden, first = final[whole][here], stored[key].float(), start[whole][here]
        assert float((mine - golden).norm() / (golden - first).norm()) <= within, key


@pytest.mark.parametrize("name", cases("cases"))
def test_every_step_of_retraining_is_the_released_one(name, model, stored, started, monkeypatch):
    case = GOLDEN["cases"][name]
    asked, micro = case["settings"], case["settings"]["batch_size"]
    what, steps = trainable(asked), asked["n_iterations"]
    pruners.prune(model, pruners.Magnitude(sparsity=0.5))
    start = state(model)
    before, after = case["ppl_before_merge"], case["ppl_after_merge"]
    lossy = before != pytest.approx(after, rel=WITHIN["perplexity"])
    seen = Seen(monkeypatch, (lambda: measured(model, stored)) if lossy else None)
    report = finetune(
        model, what, examples(stored[f"tokens|{case['data']}"]), steps=steps, learning_rate=asked["initial_lr"],
        batch_size=micro * asked["gradient_accumulation_steps"], micro_batch_size=micro, clip=case["clip"],
        shuffle=False, reference=True,
    )  # fmt: skip
    assert report.losses == pytest.approx(case["losses"], rel=WITHIN["losses"])
    assert seen.norms == pytest.approx(case["gradient_norms"], rel=WITHIN["gradient_norms"])
    (trained,), rates = seen.tensors, [Schedule(steps, asked["initial_lr"]).rate(step) for step in range(steps)]
    assert rates == pytest.approx(case["learning_rates"], rel=WITHIN["learning_rates"])
    assert set(trained) == set(case["trainable_names"])
    assert seen.counts == [(case["trainable_parameters"], case["all_parameters"])]
    assert not lossy or seen.before == pytest.approx([before], rel=WITHIN["perplexity"])
    assert measured(model, stored) == pytest.approx(after, rel=WITHIN["perplexity"])
    final = state(model)
    if isinstance(what.adapters, LoRA):  # which stays beside its matrix
        scale = what.adapters.alpha / what.adapters.rank
        for matrix in {key[:-2] for key in trained}:
            final[f"{matrix}.weight"] += scale * trained[f"{matrix}.B"] @ trained[f"{matrix}.A"]
    assert (zeros(start), zeros(final)) == (case["sparsity_before"], case["sparsity_after"])
    check_moved(final, start, case)
    check_tensors(name, final | trained, start | beginnings(what, trained, stored), stored, WITHIN["tensor"])


def beginnings(what: Trainable, trained: dict[str, Tensor], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """A and B before the first step."""
    adapters = {name: p for name, p in trained.items() if name.endswith(AB)}
    if isinstance(what.adapters, ScaleLoRA):
        return {name: torch.full_like(p, what.adapters.rank**-0.5) for name, p in adapters.items()}
    return {name: stored[name].float() if name.endswith(".A") else torch.zeros_like(p) for name, p in adapters.items()}


@pytest.mark.parametrize("name", cases("reconstruction"))
def test_every_block_of_reconstruction_is_the_released_one(name, model, stored, started, monkeypatch):
    case = GOLDEN["reconstruction"][name]
    asked, within = case["settings"], WITHIN["reconstruction"]
    wanted = Reconstruction(
        trainable(asked), asked["n_iterations"], asked["initial_lr"], asked["batch_size"], reference=True
    )
    assert wanted.schedule.warmup == case["warmup_steps"]
    plain, start = method(asked), state(model)
    windows = stored["calibration"][: asked["reconstruct_n_samples"]].long()
    seen = Seen(monkeypatch)
    losses = watched(monkeypatch)
    report = pruners.prune(model, plain, windows, reconstruct=wanted)
    steps = wanted.steps
    for index, (block, golden) in enumerate(zip(report.reconstruction, case["blocks"], strict=True)):
        assert losses[index * steps : (index + 1) * steps] == pytest.approx(golden["losses"], rel=within["losses"])
        assert block["initial"] == pytest.approx(golden["initial"], rel=within["initial_final"])
        assert block["final"] == pytest.approx(golden["final"], rel=within["initial_final"])
        assert {key.removeprefix(f"{block['block']}.") for key in seen.tensors[index]} == set(golden["trainable"])
        assert seen.counts[index][0] == golden["trainable_parameters"]
    assert measured(model, stored) == pytest.approx(case["ppl"], rel=within["perplexity"])
    final, trained = state(model), {key: p for block in seen.tensors for key, p in block.items() if key[-2:] in AB}
    assert zeros(final) == case["sparsity"]
    first = {key: p * (final[key] != 0) for key, p in start.items()} | beginnings(wanted.trainable, trained, stored)
    for key, size in case["change_norm"].items():
        if FROZEN not in key:
            kept = (final[key] != 0) if final[key].ndim == 2 else ...
            change = float((final[key].double() - start[key].double())[kept].norm())
            assert change == pytest.approx(size, rel=within["tensor"]), key
    check_tensors(name, final | trained, first, stored, within["tensor"])


def watched(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The losses of every step of every block."""
    from pruners.retrain import reconstruct

    losses, plain = [], reconstruct.F.mse_loss

    class Watching:
        @staticmethod
        def mse_loss(*tensors: Tensor) -> Tensor:
            losses.append((loss := plain(*tensors)).item())
            return loss

    monkeypatch.setattr(reconstruct, "F", Watching)
    return losses


def method(asked: dict[str, Any]) -> Any:
    """As PERP prunes: one threshold a matrix, SparseGPT in blocks of as many columns as there are windows."""
    pattern = asked["sparsity_type"]
    how = {"sparsity": asked["goal_sparsity"]} if pattern == "unstructured" else {"pattern": pattern}
    if asked["prune_method"] == "sparsegpt":
        return pruners.SparseGPT(**how, block_size=asked["reconstruct_n_samples"])
    kinds = {"magnitude": pruners.Magnitude, "wanda": pruners.Wanda}
    return kinds[asked["prune_method"]](**how, group="matrix")


@pytest.mark.parametrize("name", cases("masks"))
def test_masks_are_the_released_ones(name, model, dense, stored):
    case, within = GOLDEN["masks"][name], WITHIN["masks"]
    asked = case["settings"]
    windows = stored["calibration"][: asked["reconstruct_n_samples"]].long()
    pruners.prune(model, method(asked), windows)
    weights = {key: p for key, p in state(model).items() if key in case["zeros"]}
    assert len(weights) == len(case["zeros"])
    masks = {key: p == 0 for key, p in weights.items()}
    if asked["prune_method"] == "sparsegpt":
        for key in [key.removeprefix(f"{name}|") for key in stored if key.startswith(f"{name}|") and "[" not in key]:
            least = within["sparsegpt"]["block_0_equal" if ".layers.0." in key else "block_3_equal"]
            assert float((masks[key] == unpacked(stored[f"{name}|{key}"], masks[key])).float().mean()) >= least, key
        slice_0 = stored[f"{name}|model.decoder.layers.0.fc1.weight[:32,:64]"]
        mine = weights["model.decoder.layers.0.fc1.weight"][:32, :64]
        assert float((mine - slice_0).norm() / slice_0.norm()) <= within["sparsegpt"]["fc1_slice_block_0"]
        assert measured(model, stored) == pytest.approx(case["ppl"], rel=within["sparsegpt"]["perplexity"])
        return
    assert {key: int(mask.sum()) for key, mask in masks.items()} == case["zeros"]
    assert {key: digest(mask) for key, mask in masks.items()} == case["sha256"]
    assert all(torch.equal(p, dense.get_parameter(key) * ~masks[key]) for key, p in weights.items())


def unpacked(packed: Tensor, like: Tensor) -> Tensor:
    bits = (packed[:, None] >> torch.arange(7, -1, -1)) & 1
    return bits.flatten()[: like.numel()].view_as(like).bool()


def digest(mask: Tensor) -> str:
    """Of the entries packed in rows, the first in the highest bit."""
    bits = mask.flatten().view(-1, 8).int() << torch.arange(7, -1, -1)
    return hashlib.sha256(bits.sum(1).byte().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("name", cases("schedules_peak_1"))
def test_rates_are_the_released_ones(name):
    kind, steps = name.split("_")[0], int(name.split("_")[1])
    rebuilding = Reconstruction(Trainable(norms=True), steps, 1.0, reference=True).schedule
    schedule = rebuilding if kind == "reconstruction" else Schedule(steps, 1.0)
    rates = [schedule.rate(step) for step in range(steps)]
    assert rates == pytest.approx(GOLDEN["schedules_peak_1"][name], rel=WITHIN["learning_rates"])
