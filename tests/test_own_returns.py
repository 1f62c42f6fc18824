"""What methods of one's own return or leave is looked at: one sentence where it is of no use."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

import pruners
from pruners import anatomy
from pruners.apply import KINDS, Kept
from pruners.calibrate import Hessian, InputNorm
from pruners.interface import contract
from pruners.interface.contract import tiny, windows
from pruners.structured import Structured
from pruners.unstructured import Unstructured

TEXT = windows("llama")


@dataclass(frozen=True)
class Own(Unstructured):
    def score(self, name, weight, x, dense):
        return weight.abs()


@dataclass(frozen=True)
class Units(Structured):
    """Drops the first half of each block's units; `spoil` makes what it returns."""

    def spoil(self, kept):
        return kept

    def choose(self, model, windows, dense, how=None):
        kept = [Kept.all(block) for block in anatomy.blocks(model)]
        for keep in kept:
            for mask in (keep.attention, keep.mlp):
                mask[: len(mask) // 2] = False
        return self.spoil(kept)


def as_masks(made):
    return lambda kept: [replace(keep, attention=made(keep.attention), mlp=made(keep.mlp)) for keep in kept]


def method(base, **own):
    return dataclass(frozen=True)(type("Mine", (base,), own))


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (as_masks(lambda mask: mask.long()), r"a torch\.int64 tensor \[2\] as Kept\.attention of model\.layers\.0"),
        (as_masks(lambda mask: mask.to(torch.uint8)), r"torch\.uint8"),
        (as_masks(lambda mask: mask.nonzero().squeeze(1)), r"torch\.int64"),
        (as_masks(lambda mask: mask.float()), r"torch\.float32"),
        (as_masks(lambda mask: mask[1:]), r"a torch\.bool tensor \[1\]"),
        (as_masks(lambda mask: mask.tolist()), "a list of 2 \\(bool\\)"),
        (lambda kept: None, "choose returned None; it returns a list of one pruners.apply.Kept for each of the 2"),
        (lambda kept: kept[:1], r"a list of 1 \(Kept\)"),
        (lambda kept: [*kept, kept[0]], r"a list of 3 \(Kept\)"),
        (lambda kept: [(keep.attention, keep.mlp) for keep in kept], r"a list of 2 \(tuple\)"),
        (lambda kept: [replace(keep, rounding=None) for keep in kept], r"None as Kept\.rounding"),
    ],
)
def test_masks_of_units_that_are_none_are_refused_and_nothing_is_cut(spoil, told):
    model, kind = tiny("llama"), method(Units, spoil=lambda self, kept: spoil(kept))
    with pytest.raises(ValueError, match=told):
        pruners.prune(model, kind(ratio=0.5), TEXT)
    before = tiny("llama").state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert any(finding.broken for finding in contract.check(kind, ("llama",)))


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    ("made", "told"),
    [
        (
            lambda units: torch.ones(units + 1),
            r"score of the heads of model\.layers\.0 is a torch\.float32 tensor \[3\]",
        ),
        (lambda units: torch.ones(units, 1), r"one number for each of them, \[2\]"),
        (lambda units: units, r"is 2 \(int\)"),
    ],
)
def test_scores_of_units_that_rank_none_are_refused(made, told, together):
    def choose(self, model, windows, dense, how=None):
        blocks = anatomy.blocks(model)
        scores = [{kind: made(block.units(kind)) for kind in KINDS} for block in blocks]
        if together:
            return self.ranked_together(model, scores, lambda score, costs: score < 1)
        return [self.lowest(block, score, dict.fromkeys(KINDS, 1)) for block, score in zip(blocks, scores, strict=True)]

    with pytest.raises(ValueError, match=told):
        pruners.prune(tiny("llama"), method(Structured, choose=choose)(ratio=0.5), TEXT)


@pytest.mark.parametrize(
    ("bias", "told"),
    [
        (lambda linear: torch.full((linear.out_features,), torch.nan), "NaN or inf as bias of model.layers.0.mlp.down"),
        (lambda linear: torch.ones(linear.out_features - 1), r"a torch\.float32 tensor \[31\] as bias"),
        (lambda linear: torch.ones(1), r"\[1\] as bias of .* one finite number for each of its 32 outputs"),
        (lambda linear: 1.0, r"1\.0 \(float\)"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without biases, and with
def test_biases_that_fit_no_projection_are_refused(family, bias, told):
    def repairs(self, block, kept, dense):
        linear = block.linear(block.family.outward)
        return [(linear, bias(linear))]

    kind = method(Units, repairs=repairs)
    told = told if family == "llama" else "as bias of transformer.h.0.mlp.c_proj"
    with pytest.raises(ValueError, match=told) as caught:
        pruners.prune(tiny(family), kind(ratio=0.5), windows(family))
    assert "load it again" not in str(caught.value)  # nothing was changed yet


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (lambda block: None, r"repairs returned None for model\.layers\.0"),
        (lambda block: [torch.ones(32)], r"a list of 1 \(Tensor\)"),
        (lambda block: [([], torch.ones(32))], r"a bias for \[\] \(list\), which is no projection of model\.layers\.0"),
        (lambda block: [(torch.nn.Linear(32, 32), torch.ones(32))], "which is no projection"),
    ],
)
def test_repairs_that_are_none_are_refused(found, told):
    kind = method(Units, repairs=lambda self, block, kept, dense: found(block))
    with pytest.raises(ValueError, match=told):
        pruners.prune(tiny("llama"), kind(ratio=0.5), TEXT)


@pytest.mark.parametrize("given", [lambda pairs: [list(one) for one in pairs], lambda pairs: dict(pairs).items(), iter])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_repairs_may_be_any_pairs(given, family):
    def pairs(self, block, kept, dense):
        linear = block.linear(block.family.outward)
        return [(linear, torch.ones(linear.out_features))]

    ours, plain = tiny(family), tiny(family)
    pruners.prune(
        ours, method(Units, repairs=lambda *asked: given(pairs(*asked)))(ratio=0.5), windows(family), cut=False
    )
    pruners.prune(plain, method(Units, repairs=pairs)(ratio=0.5), windows(family), cut=False)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    assert all(map(torch.equal, ours.parameters(), plain.parameters()))


def test_a_projection_repaired_twice_has_one_bias_more_in_the_report():
    def repairs(self, block, kept, dense):
        linear = block.linear("mlp.down_proj")
        return [(linear, torch.ones(linear.out_features))] * 2

    model = tiny("llama")
    report = pruners.prune(model, method(Units, repairs=repairs)(ratio=0.5), TEXT)
    assert report.structure.after.size.model == model.num_parameters()
    assert (model.model.layers[0].mlp.down_proj.bias == 2).all()


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        (
            lambda score: score[0, 1:] < 0.1,
            r"gone returned a torch\.bool tensor \[31\] for model\.layers\.0\.self_attn",
        ),
        (lambda score: (score < 0.1).float(), r"a torch\.float32 tensor \[32, 32\]"),
        (lambda score: (score < 0.1).long(), r"a torch\.int64 tensor"),
        (lambda score: None, "gone returned None"),
    ],
)
def test_masks_of_weights_that_are_none_are_refused(gone, told):
    model, kind = tiny("llama"), method(Own, gone=lambda self, score: gone(score))
    with pytest.raises(ValueError, match=told):
        pruners.prune(model, kind())
    before = tiny("llama").state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("short", [lambda score: score.sum(0, keepdim=True), lambda score: score.sum(1, keepdim=True)])
def test_a_mask_of_whole_rows_or_columns_is_one(short):
    def gone(self, score):
        return short(score) < short(score).median()

    def whole(self, score):
        return gone(self, score).expand_as(score).clone()

    ours, plain = tiny("llama"), tiny("llama")
    pruners.prune(ours, method(Own, gone=gone)())
    pruners.prune(plain, method(Own, gone=whole)())
    assert all(map(torch.equal, ours.parameters(), plain.parameters()))


def test_a_score_that_takes_a_hessian_twice_hears_what_to_use():
    def score(self, name, weight, x, dense):
        return weight.abs() * x.taken().diagonal()

    kind = method(Own, NEEDS=Hessian, score=score)
    with pytest.raises(ValueError, match="already consumed; gather it again, or use its `matrix` instead"):
        pruners.prune(tiny("llama"), kind(), TEXT)


def in_weight(self, name, weight, x, dense):
    return weight.float().abs_()


def in_view(self, name, weight, x, dense):
    weight[0].mul_(2)
    return weight.abs()


def in_statistic(self, name, weight, x, dense):
    return weight.abs() * x.sum_of_squares.sqrt_()


def in_dense(self, name, weight, x, dense):
    return weight.abs() * dense[name].mul_(2)


@pytest.mark.parametrize(
    ("base", "score", "told"),
    [
        (Own, in_weight, "wrote over model.layers.0.self_attn.q_proj; it computes"),
        (Own, in_view, "weight.abs.. in place of weight.abs_"),
        (pruners.Wanda, in_statistic, "q_proj's statistic sum_of_squares;"),
        (pruners.Gradient, in_dense, "the dense statistic model.layers.0.self_attn.q_proj;"),
    ],
)
def test_scores_computed_in_place_are_refused(base, score, told):
    kind = method(base, score=score)
    with pytest.raises(ValueError, match=told):
        pruners.prune(tiny("llama"), kind(), TEXT)


def test_a_gone_that_writes_over_scores_which_are_the_weights_is_refused():
    def gone(self, score):
        return score.abs_() < 0.05

    kind = method(Own, score=lambda self, name, weight, x, dense: weight, gone=gone)
    with pytest.raises(ValueError, match="wrote over"):
        pruners.prune(tiny("llama"), kind())


def test_what_a_statistic_of_one_s_own_computes_in_place_is_its_own_affair():
    class Once(InputNorm):
        done = False

        @property
        def norm(self):
            if not self.done:
                self.sum_of_squares.sqrt_()
                self.done = True
            return self.sum_of_squares.float()

    ours, plain = tiny("llama"), tiny("llama")
    pruners.prune(ours, method(pruners.Wanda, NEEDS=Once)(), TEXT)
    pruners.prune(plain, pruners.Wanda(), TEXT)
    assert all(map(torch.equal, ours.parameters(), plain.parameters()))


def test_the_contract_finds_kept_weights_that_moved():
    def hidden(self, name, weight, x, dense):
        weight.data.abs_()  # which torch does not count as a change of `weight`
        return weight.abs()

    found = {f.promise: f.broken for f in contract.check(method(Own, score=hidden), ("llama", "mixtral"))}
    assert "of the weights that were kept were changed" in found["nothing else moves"]
    assert not any(finding.broken for finding in contract.check(pruners.SparseGPT, ("llama",)))


def narrower(linear):
    linear.weight = torch.nn.Parameter(linear.weight[:, 1:])


def infinite(linear):
    linear.weight.data[0, 0] = torch.inf


def half(linear):
    linear.weight.data = linear.weight.data.half()


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (narrower, r"remove left a torch\.float32 tensor \[32, 31\] of model.layers.0.self_attn.q_proj"),
        (infinite, "remove left NaN or inf in model.layers.0.self_attn.q_proj"),
        (half, r"a torch\.float16 tensor"),
    ],
)
def test_what_a_remove_of_one_s_own_leaves_is_looked_at(spoil, told):
    def remove(self, linears, x, dense):
        for linear in linears.values():
            spoil(linear)

    kind = method(Own, remove=remove)
    with pytest.raises(ValueError, match=told):
        pruners.prune(tiny("llama"), kind())
    assert any(finding.broken for finding in contract.check(kind, ("llama",)))


@pytest.mark.parametrize("own", [{"prune": lambda *_: None}, {"gather": lambda *_: [1], "statistics_key": "mine"}])
def test_a_method_s_report_and_statistics_are_looked_at(own):
    with pytest.raises(TypeError, match=r"Mine.* got "):
        pruners.prune(tiny("llama"), method(Own, **own)(), TEXT)
