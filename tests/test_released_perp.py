"""PERP's released arithmetic under `reference=True`, where this project's own is another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import tiny
from torch import Tensor, nn
from torch.func import functional_call
from torch.testing import assert_close
from transformers import PreTrainedModel

import pruners
from experiments.batch import refuse_unshared
from experiments.cells import Cell
from experiments.recovery import Retraining
from experiments.spec import Run, Windows
from experiments.store.described import describe
from pruners import anatomy
from pruners.retrain import LoRA, LoRAPrune, MaskLoRA, Reconstruction, ScaleLoRA, Trainable, finetune
from pruners.retrain.trainable import Attached
from pruners.run.ranks import Ranks

TRAINED = {
    "MaskLoRA, biases, norms, head": Trainable(biases=True, norms=True, head=True, adapters=MaskLoRA(rank=3, alpha=5)),
    "LoRA-Prune": Trainable(adapters=LoRAPrune(rank=2, alpha=8)),
    "ScaleLoRA of two projections, norms": Trainable(norms=True, adapters=ScaleLoRA(2, targets=("v_proj", "fc2"))),
    "head": Trainable(head=True),
    "everything": Trainable.full(),
    "biases": Trainable(biases=True),
    "norms": Trainable(norms=True),
    "weights alone": Trainable(weights=True),
    "LoRA that merges, biases": Trainable(biases=True, adapters=LoRA(rank=3, alpha=7, dropout=0.0, merge=True)),
    "LoRA that stays, head": Trainable(head=True, adapters=LoRA(rank=2, alpha=3, dropout=0.0)),
    "LoRA-Prune, biases, norms, head": Trainable(biases=True, norms=True, head=True, adapters=LoRAPrune(rank=4)),
    "ScaleLoRA, biases": Trainable(biases=True, adapters=ScaleLoRA(rank=2)),
}
STEPS_OF = {"one by one": (4, 1, 0.5), "two at once, not clipped": (4, 2, 1e3), "all at once": (3, 3, 0.5)}


def still(kind: str = "opt") -> PreTrainedModel:
    """A tiny pruned model without dropout; OPT's head is tied."""
    model = tiny(kind)
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    pruners.prune(model, pruners.Magnitude(sparsity=0.5))
    return model


def uneven(windows: Tensor) -> list[dict[str, Any]]:
    return [{"input_ids": row[:length]} for row, length in zip(windows, (16, 3, 9, 16, 5, 12), strict=True)]


@pytest.mark.parametrize("step", STEPS_OF)
@pytest.mark.parametrize("what", TRAINED)
def test_the_training_is_that_of_plain_torch(what, step, windows, monkeypatch):
    """By formulas of its own: adapters as tensors, one forward pass a micro-batch, AdamW over all of them."""
    (batch, micro, clip), model, plain, trainable, first = STEPS_OF[step], still(), still(), TRAINED[what], {}
    attach = Trainable.attach

    def attached(self: Trainable, *args: Any, **kwargs: Any) -> Attached:
        first["attached"] = made = attach(self, *args, **kwargs)
        first["tensors"] = {name: p.detach().clone() for name, p in made.tensors.items()}
        return made

    monkeypatch.setattr(Trainable, "attach", attached)
    report = finetune(
        model, trainable, uneven(windows), steps=7, learning_rate=3e-3, batch_size=batch, micro_batch_size=micro,
        clip=clip, shuffle=False, reference=True,
    )  # fmt: skip
    losses, merged = by_hand(plain, trainable, first["tensors"], uneven(windows), batch, micro, clip)
    assert report.losses == pytest.approx(losses, rel=1e-5)
    assert not report.untied
    assert model.lm_head.weight is model.model.decoder.embed_tokens.weight
    found = {name.replace(".base_layer", ""): p for name, p in model.named_parameters()}
    if isinstance(trainable.adapters, LoRA) and not trainable.adapters.merge:  # beside its matrices
        assert any("lora_A" in name for name in found)
    for name, expected in merged.items():
        if "k_proj.bias" not in name:  # its gradient is rounding
            assert_close(found[name].detach(), expected, atol=2e-5, rtol=1e-4, msg=lambda text, name=name: name + text)


def by_hand(
    model: PreTrainedModel, trainable: Trainable, start: dict[str, Tensor], records: list[dict[str, Any]], batch: int,
    micro: int, clip: float,
) -> tuple[list[float], dict[str, Tensor]]:  # fmt: skip
    """Losses of seven steps, and every parameter after the merge."""
    whole = dict(model.named_parameters())
    matrices = {f"{b.name}.{name}.weight" for b in anatomy.blocks(model) for name in b.linears()}
    masks = {name: (whole[name] != 0).float() for name in matrices}
    leaves = {name: nn.Parameter(p.clone()) for name, p in start.items()}
    alpha = getattr(trainable.adapters, "alpha", 32)
    kind = type(trainable.adapters)

    def changed(trained: bool) -> dict[str, Tensor]:
        """The weights as they are `trained`, or as adapters merge."""
        changed = {name: p * masks.get(name, 1) for name, p in leaves.items() if name in whole}
        for name in [name[:-2] for name in leaves if name.endswith(".A")]:
            a, b = leaves[f"{name}.A"], leaves[f"{name}.B"]
            key = "lm_head.weight" if name == "head" else f"{name}.weight"
            weight = model.lm_head.weight if name == "head" else whole[key]
            if name == "head":
                changed[key] = weight + alpha / len(a) * (b @ a)
            elif kind is ScaleLoRA:
                changed[key] = weight * (b @ a)
            else:
                if kind is LoRA and not trained and not trainable.adapters.merge:
                    continue
                open_ = kind is LoRA or (kind is LoRAPrune and trained)
                changed[key] = weight + alpha / len(a) * (b @ a) * (1 if open_ else masks[key])
        return changed

    def mean(record: dict[str, Any]) -> Tensor:
        ids = record["input_ids"][None]
        over = changed(trained=True)
        if trainable.embeddings:
            over["lm_head.weight"] = over["model.decoder.embed_tokens.weight"]
        logits = functional_call(model, over, args=(ids,), tie_weights=False).logits
        return nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none")

    optimizer = torch.optim.AdamW(leaves.values(), weight_decay=0.0)
    losses = []
    for step in range(7):
        chosen = [records[(batch * step + place) % len(records)] for place in range(batch)]
        parts = [torch.cat([mean(record) for record in chosen[at : at + micro]]) for at in range(0, batch, micro)]
        loss = torch.stack([part.mean() for part in parts]).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(leaves.values(), clip)
        optimizer.param_groups[0]["lr"] = 3e-3 * (step if step < 1 else (7 - step) / 6)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    with torch.no_grad():
        merged = changed(trained=False)
    if "lm_head.weight" in merged:  # the shared matrix
        merged["model.decoder.embed_tokens.weight"] = merged.pop("lm_head.weight")
    return losses, whole | merged


def test_only_by_reference_do_micro_batches_weigh_alike(windows):
    asked = {"steps": 3, "learning_rate": 1e-3, "batch_size": 6}
    records, what = uneven(windows), Trainable(norms=True)
    own = [finetune(still(), what, records, micro_batch_size=size, **asked).losses for size in (1, 6)]
    released = [finetune(still(), what, records, micro_batch_size=size, reference=True, **asked).losses
                for size in (1, 6)]  # fmt: skip
    assert_close(own[0], own[1])
    assert_close(released[1], own[1])
    assert abs(released[0][0] - own[0][0]) > 0.01


@pytest.mark.parametrize("kind_of", [MaskLoRA, LoRAPrune])
def test_the_heads_adapter_has_the_rank_and_alpha_of_the_others(kind_of):
    attached = Trainable(head=True, adapters=kind_of(rank=5, alpha=7)).attach(tiny("opt"))
    head = attached.adapters[-1]
    assert (head.name, head.kind.rank, head.kind.alpha, head.kind.dropout) == ("head", 5, 7, 0.0)
    alone = Trainable(head=True).attach(tiny("opt")).adapters[-1]
    assert (alone.kind.rank, alone.kind.alpha) == (16, 32)


def test_a_tied_head_is_untied_but_by_reference(windows):
    asked = {"steps": 4, "learning_rate": 5e-3}
    models = {reference: still() for reference in (False, True)}
    before = models[True].model.decoder.embed_tokens.weight.detach().clone()
    for reference, model in models.items():
        report = finetune(model, Trainable(head=True), windows, reference=reference, **asked)
        embeddings, head = model.model.decoder.embed_tokens.weight, model.lm_head.weight
        assert report.untied == (head is not embeddings) == torch.equal(embeddings, before) == (not reference)
    assert_close(models[True].lm_head.weight, models[False].lm_head.weight)


@pytest.mark.parametrize("resume", [{"micro_batch_size": 2}, {"reference": False}, {"shuffle": True}])
def test_a_state_of_other_arithmetic_is_refused(windows, tmp_path, resume):
    asked = {"steps": 2, "learning_rate": 1e-3, "micro_batch_size": 1, "reference": True, "shuffle": False}
    finetune(still(), Trainable(norms=True), windows, folder=tmp_path, **asked)
    finetune(still(), Trainable(norms=True), windows, folder=tmp_path, **asked)
    with pytest.raises(ValueError, match="belongs to another run"):
        finetune(still(), Trainable(norms=True), windows, folder=tmp_path, **(asked | resume))


def test_micro_batches_that_are_no_whole_step_are_refused_before_anything_is_done(windows):
    asked = {"steps": 2, "learning_rate": 1e-3, "batch_size": 5, "micro_batch_size": 2}
    model = tiny("opt")
    with pytest.raises(ValueError, match="batch_size of 5 is not a multiple of the micro_batch_size of 2"):
        finetune(model, Trainable(norms=True), windows, reference=True, **asked)
    with pytest.raises(ValueError, match="batch_size of 5 is not a multiple"):
        Retraining(Trainable(norms=True), Windows("c4/train", 4, 8), reference=True, **asked)
    assert all(linear.weight.all() for block in anatomy.blocks(model) for linear in block.linears().values())
    finetune(model, Trainable(norms=True), windows, **asked)


def test_micro_batches_that_processes_cannot_share_are_refused():
    with pytest.raises(ValueError, match="A batch of 4 cannot be split evenly among 2 processes in micro-batches of 4"):
        Ranks(0, 2).share([[1, 2, 3, 4]], 4)
    recovery = Retraining(
        Trainable(norms=True), Windows("c4/train", 12, 8), 2, 1e-3, 12, micro_batch_size=4, reference=True
    )
    cell = Cell(Run("smollm2-135m", None, None, (), recovery=recovery), "0", "the row")
    with pytest.raises(ValueError, match="a batch of 12 in micro-batches of 4 evenly, which the row would"):
        refuse_unshared([cell], 2)
    halves = replace(cell, run=replace(cell.run, recovery=replace(recovery, micro_batch_size=2)))
    refuse_unshared([halves], 2)


@pytest.mark.parametrize(
    ("steps", "warmup", "own", "released"), [(5, 0.1, 1, 0), (15, 0.1, 2, 1), (30, 0.1, 3, 3), (7, 3, 3, 3)]
)
def test_reconstruction_rounds_its_warm_up_down_by_reference(steps, warmup, own, released):
    for reference, rises in ((False, own), (True, released)):
        wanted = Reconstruction(Trainable(norms=True), steps, 1.0, warmup=warmup, reference=reference)
        rates = [wanted.schedule.rate(step) for step in range(steps)]
        assert rates.index(max(rates)) == rises


def test_a_block_that_got_worse_stays_by_reference(windows):
    what = Trainable(norms=True)
    reports, models = {}, {}
    for reference in (False, True):
        models[reference] = tiny("llama multi-head")
        wanted = Reconstruction(what, steps=3, learning_rate=1.0, warmup=0, reference=reference)
        reports[reference] = pruners.prune(
            models[reference], pruners.Wanda(sparsity=0.5), windows, reconstruct=wanted
        ).reconstruction
    own, released = reports[False][0], reports[True][0]
    assert not own["lowered"]
    assert not released["lowered"]
    assert own["final"] == own["initial"] == released["initial"] < released["final"]
    norms = [model.model.layers[0].input_layernorm.weight for model in models.values()]
    assert not torch.equal(*norms)


def test_the_released_error_is_that_before_adapters_merge(windows):
    """LoRA-Prune loses a part of what it learned by merging; the released code has looked at the error by then."""
    what = Trainable(adapters=LoRAPrune(rank=8, alpha=64))
    asked = {"steps": 30, "learning_rate": 5e-3}
    own, released = (
        pruners.prune(still("llama multi-head"), pruners.Magnitude(sparsity=0.7), windows,
                      reconstruct=Reconstruction(what, reference=reference, **asked)).reconstruction[0]
        for reference in (False, True)
    )  # fmt: skip
    assert released["initial"] == own["initial"]
    assert released["final"] < 0.95 * own["final"]


def test_the_models_dropout_is_on_in_reconstruction_by_reference(windows):
    def rebuilt(drop: float, **settings: Any) -> tuple[list[Tensor], bool]:
        model = still()
        for module in model.modules():
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = drop
        wanted = Reconstruction(Trainable(norms=True), steps=4, learning_rate=1e-3, **settings)
        before = torch.get_rng_state()
        pruners.prune(model, pruners.Magnitude(sparsity=0.5), windows, reconstruct=wanted)
        left_alone = torch.equal(torch.get_rng_state(), before)
        assert left_alone
        assert not any(module.training for module in model.modules())
        return [p.detach().clone() for p in model.parameters()]

    def same(one: list[Tensor], other: list[Tensor]) -> bool:
        return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

    assert same(rebuilt(0.3), rebuilt(0.0))
    assert same(rebuilt(0.3, reference=True), rebuilt(0.3, reference=True))
    assert not same(rebuilt(0.3, reference=True), rebuilt(0.0, reference=True))
    assert not same(rebuilt(0.3, reference=True), rebuilt(0.3, reference=True, seed=1))


def test_only_what_moves_a_number_enters_an_id():
    text = Windows("c4/train", 4, 8)
    plain = Retraining(Trainable(norms=True), text, 4, 1e-3)
    assert describe(plain) == describe(Retraining(Trainable(norms=True), text, 4, 1e-3, micro_batch_size=1))
    assert not {"reference", "micro_batch_size"} & set(describe(plain))
    released = [describe(Retraining(Trainable(norms=True), text, 4, 1e-3, micro_batch_size=size, reference=True))
                for size in (1, 2)]  # fmt: skip
    assert [about["micro_batch_size"] for about in released] == [1, 2]
    assert all(about["reference"] is True for about in released)
    assert "reference" not in describe(Reconstruction(Trainable(norms=True)))
    assert describe(Reconstruction(Trainable(norms=True), reference=True))["reference"] is True
