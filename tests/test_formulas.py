"""Facts about each formula, on small tensors, with independent float64 oracles."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

import pruners
from pruners import anatomy, gblm, magnitude, select, sparsegpt, wanda
from pruners.calibrate import Hessian, InputNorm
from pruners.run.statistic import is_finite
from pruners.select import Pattern
from tests.conftest import tiny


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fed(statistic, x):
    made = statistic(x.shape[-1], torch.device("cpu"))
    made.add(x)
    return made


def hessian_of(x):
    flat = x.flatten(0, 1).double()
    return 2 / len(x) * flat.T @ flat


def test_a_factor_that_has_no_room_after_all_is_made_on_the_cpu(monkeypatch):
    hessian, places = hessian_of(randn(64, 8)[None]).float(), []
    made = sparsegpt._factored

    def short(hessian, damping, name, place):
        places.append(place.type)
        if len(places) == 1:
            raise torch.OutOfMemoryError
        return made(hessian, damping, name, place)

    monkeypatch.setattr(sparsegpt, "_factored", short)
    assert torch.equal(sparsegpt.inverse_factor(hessian, 0.01, "x"), made(hessian, 0.01, "x", torch.device("cpu")))
    assert places == ["cpu", "cpu"]


@pytest.mark.parametrize(("m", "count"), [(4, 2), (8, 4), (16, 1)])
def test_the_first_of_equal_ones_in_a_group_go(m, count):
    score = torch.randint(3, (40, 5, m), generator=torch.Generator().manual_seed(0)).float()
    order = score.sort(dim=-1, stable=True).indices[..., :count]
    expected = torch.zeros_like(score, dtype=torch.bool).scatter_(-1, order, True)
    assert torch.equal(select.first_lowest(score, count), expected)


def test_the_norm_runs_over_every_calibration_token():
    x = randn(3, 5, 4)
    assert_close(fed(InputNorm, x).norm, x.double().flatten(0, 1).norm(dim=0).float())


def test_streamed_statistics_do_not_depend_on_the_split():
    x = randn(6, 5, 7)
    for statistic, read in ((InputNorm, lambda s: s.norm), (Hessian, lambda s: s.matrix)):
        whole, split = fed(statistic, x), statistic(7, torch.device("cpu"))
        for part in x.split([1, 3, 2]):
            split.add(part)
        assert torch.equal(read(whole), read(split))


@pytest.mark.parametrize("width", [1, 3, 8, 13])
def test_the_hessian_is_the_tiles_sum(width):
    x = randn(4, 6, width)
    assert_close(fed(Hessian, x).matrix.double(), hessian_of(x), rtol=1e-5, atol=1e-5)


def test_magnitude_keeps_the_largest():
    weight = torch.tensor([[1.0, -4.0], [3.0, -2.0]])
    gone = select.per_matrix(magnitude.score(weight), 0.25)
    assert gone.tolist() == [[True, False], [False, True]]  # the threshold itself goes too, as released


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "made",
    [
        lambda x: x.abs(),
        lambda x: x,
        lambda x: (4 * x).round(),  # ties, and both zeros
        lambda x: x.abs().masked_fill(x > 1, torch.inf).masked_fill(x < -1, -torch.inf),
        lambda x: torch.zeros_like(x),
        lambda x: torch.where(x > 0, 3e38 * x.clamp(max=1), -3e38).float(),
    ],
)
def test_counting_finds_the_value_that_sorting_does(dtype, made):
    score = made(randn(7, 33)).to(dtype)
    ordered = score.sort(dim=-1).values
    for count in (1, 2, 16, 32, 33):
        assert torch.equal(select.counted(score, count), ordered[:, count - 1 : count])
        assert torch.equal(select.counted(score.T, 1 + count // 5), score.T.kthvalue(1 + count // 5, -1, True).values)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_sum_that_overflows_is_looked_into(value):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        large = torch.full((64, 64), torch.finfo(dtype).max, dtype=dtype)
        assert is_finite(large)
        assert is_finite(-large)
        large[7, 5] = value
        assert not is_finite(large)
        assert not is_finite(torch.tensor([1.0, value], dtype=dtype))


def test_wanda_is_weight_times_norm_within_rows():
    weight, x = randn(5, 8), randn(2, 9, 8, seed=1)
    score = wanda.score(weight, fed(InputNorm, x))
    oracle = weight.double().abs() * x.double().flatten(0, 1).square().sum(0).sqrt()
    assert_close(score.double(), oracle, rtol=1e-5, atol=0)
    gone = select.per_row(score, 0.5)
    for row, mask in zip(oracle, gone, strict=True):
        assert row[mask].max() < row[~mask].min()


def test_wanda_with_equal_inputs_is_magnitude_within_rows():
    weight, x = randn(5, 8), torch.ones(1, 3, 8)
    assert torch.equal(select.per_row(wanda.score(weight, fed(InputNorm, x)), 0.5), select.per_row(weight.abs(), 0.5))


def test_gradient_norms_equal_autograd_in_float64(kind, windows):
    model, reference = tiny(kind), tiny(kind).double()
    names = [f"{b.name}.{n}" for b in anatomy.blocks(model) for n in b.linears()]
    gradients = {name: [] for name in names}
    for window in windows.split(1):
        reference.zero_grad()
        logits = reference(window).logits[0, :-1]
        torch.nn.functional.cross_entropy(logits, window[0, 1:]).backward()
        for name in names:
            gradients[name].append(reference.get_parameter(f"{name}.weight").grad.clone())
    for norm, order in (("l1", 1), ("l2", 2)):
        ours = gblm.gradient_norms(model, windows, norm)
        for name in names:
            oracle = torch.stack(gradients[name]).norm(p=order, dim=0)
            assert_close(ours[name].double(), oracle, rtol=2e-3, atol=1e-7)


def test_gradient_checkpointing_changes_no_gradient(kind, windows):
    model = tiny(kind)
    plain, checkpointed = (gblm.gradient_norms(model, windows, "l2", checkpointing=c) for c in (False, True))
    assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
    assert all("forward" not in vars(block.module) for block in anatomy.blocks(model))


def test_gblm_without_gradients_is_wanda_and_alpha_weighs_them():
    weight, x, gradient = randn(4, 6), fed(InputNorm, randn(4, 5, 6, seed=1)), randn(4, 6, seed=2).abs()
    assert_close(gblm.score(weight, x, gradient, 0.0), wanda.score(weight, x) / 2)  # sqrt of 4 windows
    difference = gblm.score(weight, x, gradient, 3.0) - gblm.score(weight, x, gradient, 1.0)
    assert_close(difference, 2 * weight.abs() * gradient)


def test_random_depends_on_seed_and_name_only(kind):
    first, same, other = (tiny(kind) for _ in range(3))
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        pruners.prune(model, pruners.Random(seed=seed))
    name = f"{anatomy.blocks(first)[0].name}.self_attn.q_proj.weight"
    assert torch.equal(first.get_parameter(name), same.get_parameter(name))
    assert not torch.equal(first.get_parameter(name), other.get_parameter(name))


def surgeon(weight, hessian, sparsity, block_size, damping, pattern=None, norm=None, mask=None):
    """Optimal brain surgeon column by column in float64, inverting what is left of H at every step; with `norm` the
    cheapest are those of |W| * norm, and `mask` says what goes."""
    weight, hessian = weight.double().clone(), hessian.double().clone()
    dead = hessian.diagonal() == 0
    hessian[dead, dead], weight[:, dead] = 1, 0
    hessian += damping * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    cheapness = torch.stack([torch.linalg.inv(hessian[i:, i:])[0, 0] for i in range(len(hessian))])

    def costs(i, j):
        return weight[:, i:j] ** 2 / cheapness[i:j] if norm is None else weight[:, i:j].abs() * norm[i:j]

    gone = torch.zeros_like(weight, dtype=torch.bool) if mask is None else mask
    for i in range(weight.shape[1]):
        if mask is None and pattern and i % pattern.m == 0:
            cost = costs(i, i + pattern.m)
            order = cost.argsort(dim=1)[:, : pattern.m - pattern.n]
            gone[:, i : i + pattern.m].scatter_(1, order, True)
        elif mask is None and not pattern and i % block_size == 0:
            cost = costs(i, i + block_size)
            threshold = cost.flatten().sort().values[int(cost.numel() * sparsity)]
            gone[:, i : i + block_size] = cost <= threshold
        inverse = torch.linalg.inv(hessian[i:, i:])
        error = torch.where(gone[:, i], weight[:, i], 0) / inverse[0, 0]
        weight[:, i:] -= error[:, None] * inverse[0]
        weight[gone[:, i], i] = 0
    return weight


@pytest.mark.parametrize("pattern", [None, "2:4", "1:4"])
@pytest.mark.parametrize("dead", [False, True])
def test_sparsegpt_equals_the_surgeon(pattern, dead):
    weight, x = randn(6, 16), randn(3, 20, 16, seed=1)
    if dead:
        x[..., 5] = 0
    linear = torch.nn.Linear(16, 6, bias=False)
    linear.weight.data.copy_(weight)
    method = pruners.SparseGPT(pattern=pattern, block_size=8)
    method.remove({"matrix": linear}, fed(Hessian, x), {})
    parsed = Pattern.parse(pattern) if pattern else None
    oracle = surgeon(weight, hessian_of(x), 0.5, 8, 0.01, parsed)
    assert torch.equal(linear.weight == 0, oracle == 0)
    assert_close(linear.weight.double(), oracle, rtol=1e-3, atol=1e-4)


def solved(weight, x, **how):
    linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight.data.copy_(weight)
    pruners.SparseGPT(block_size=8, **how).remove({"matrix": linear}, fed(Hessian, x), {})
    return linear.weight.detach()


@pytest.mark.parametrize("pattern", [None, "2:4"])
@pytest.mark.parametrize("metric", ["wanda", "magnitude"])
def test_other_metrics_choose_along_the_way_what_the_update_makes_up_for(metric, pattern):
    weight, x = randn(6, 16), randn(3, 20, 16, seed=1) * torch.linspace(0.2, 3, 16)
    norm = hessian_of(x).diagonal().sqrt() if metric == "wanda" else torch.ones(16)
    oracle = surgeon(weight, hessian_of(x), 0.5, 8, 0.01, pattern and Pattern.parse(pattern), norm)
    found = solved(weight, x, metric=metric, pattern=pattern)
    assert torch.equal(found == 0, oracle == 0)
    assert_close(found.double(), oracle, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_masks_chosen_at_once_are_those_of_the_methods_and_the_update_makes_up_for_them(pattern):
    weight, x = randn(6, 16), randn(3, 20, 16, seed=1) * torch.linspace(0.2, 3, 16)
    for metric, method, group in (("wanda", pruners.Wanda, "row"), ("magnitude", pruners.Magnitude, "matrix")):
        plain = torch.nn.Linear(16, 6, bias=False)
        plain.weight.data.copy_(weight)
        method(pattern=pattern, group=group).remove({"matrix": plain}, fed(InputNorm, x), {})
        mask = plain.weight == 0
        found = solved(weight, x, metric=metric, group=group, pattern=pattern)
        assert torch.equal(found == 0, mask)
        assert_close(found.double(), surgeon(weight, hessian_of(x), 0.5, 8, 0.01, mask=mask), rtol=1e-3, atol=1e-4)
        assert torch.equal(solved(weight, x, metric=metric, group=group, pattern=pattern, update=False), plain.weight)


@pytest.mark.parametrize("method", [pruners.Wanda, pruners.Magnitude, pruners.SparseGPT])
@pytest.mark.parametrize("group", ["column", "rows:4", "columns:8"])
def test_a_group_that_means_nothing_beside_a_pattern_is_refused(method, group):
    with pytest.raises(ValueError, match=f"group '{group}' has no meaning with 4:8"):
        method(pattern="4:8", group=group)


def test_the_metric_without_an_update_is_that_of_wandas_paper():
    weight, x = randn(6, 16), randn(3, 20, 16, seed=1)
    hessian = hessian_of(x)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    score = weight.double() ** 2 / torch.linalg.inv(damped).diagonal()
    found = solved(weight, x, group="row", update=False)
    assert torch.equal(found, weight.masked_fill(select.per_row(score, 0.5), 0))


@pytest.mark.parametrize(("group", "axis", "size"), [("rows:4", 0, 4), ("columns:4", 1, 4), ("rows:128", 0, 6)])
def test_neighbouring_rows_or_columns_share_a_threshold(group, axis, size):
    score = randn(6, 16)
    expected = torch.cat(
        [part <= part.flatten().sort().values[part.numel() // 2] for part in score.split(size, axis)], axis
    )
    assert torch.equal(select.among(score, group, 0.5), expected)


def test_within_an_input_every_metric_takes_the_smallest_weights():
    """Why the three entries of Wanda's table 7 for that group are one number."""
    weight, x = randn(7, 16), randn(3, 20, 16, seed=1) * torch.linspace(0.2, 3, 16)
    masks = [solved(weight, x, metric=metric, group="column", update=False) == 0 for metric in sparsegpt.COSTS]
    assert torch.equal(masks[0], masks[1])
    assert torch.equal(masks[0], masks[2])
    assert masks[0].sum(0).tolist() == [3] * 16


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"metric": "gradient"}, "metric"),
        ({"update": False}, "within a comparison group; group is 'matrix'"),
        ({"group": "rows"}, "group is 'matrix'.*got 'rows'"),
    ],
)
def test_words_that_say_nothing_are_refused(how, said):
    with pytest.raises(ValueError, match=said):
        pruners.SparseGPT(**how)


def test_sparsegpt_solves_stacked_matrices_as_if_alone():
    x = randn(3, 20, 16, seed=1)
    stacked = {name: torch.nn.Linear(16, rows, bias=False) for name, rows in (("q", 6), ("k", 2), ("v", 3))}
    for seed, linear in enumerate(stacked.values()):
        linear.weight.data.copy_(randn(*linear.weight.shape, seed=seed))
    before = {name: linear.weight.clone() for name, linear in stacked.items()}
    pruners.SparseGPT().remove(stacked, fed(Hessian, x), {})
    for name, weight in before.items():
        alone = torch.nn.Linear(*weight.shape[::-1], bias=False)
        alone.weight.data.copy_(weight)
        pruners.SparseGPT().remove({name: alone}, fed(Hessian, x), {})
        assert torch.equal(alone.weight == 0, stacked[name].weight == 0)
        assert_close(alone.weight, stacked[name].weight)


def test_sparsegpt_loses_less_than_zeroing_the_same_weights():
    weight, x = randn(8, 32), randn(4, 30, 8, seed=1) @ randn(8, 32, seed=2)  # inputs that can stand in for each other
    linear = torch.nn.Linear(32, 8, bias=False)
    linear.weight.data.copy_(weight)
    pruners.SparseGPT().remove({"matrix": linear}, fed(Hessian, x), {})
    zeroed = weight.masked_fill(linear.weight == 0, 0)
    loss = lambda w: (x @ (w - weight).T).square().sum()  # noqa: E731
    assert loss(linear.weight) < 0.2 * loss(zeroed)


def test_a_hessian_that_is_not_positive_definite_gets_more_damping_with_a_warning(caplog):
    hessian = -0.05 * torch.eye(4) + torch.diag(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    factor = sparsegpt.inverse_factor(hessian, 0.01, "block 0")
    damped = hessian + 1.0 * hessian.diagonal().mean() * torch.eye(4)
    assert_close(factor.T @ factor, torch.linalg.inv(damped), rtol=1e-4, atol=1e-4)
    assert "damping 0.01" in caplog.text
    assert "block 0" in caplog.text


@pytest.mark.parametrize("size", [5, 128, 300])
def test_the_factor_is_the_upper_cholesky_factor_of_the_inverse(size):
    hessian = hessian_of(randn(3, size, size))
    factor = sparsegpt.inverse_factor(hessian.float(), 0.01, "H")
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(size)
    assert_close(factor.double(), torch.linalg.cholesky(torch.linalg.inv(damped), upper=True), rtol=1e-3, atol=1e-4)


def test_a_hopeless_hessian_is_refused_by_name():
    with pytest.raises(ValueError, match=r"layers\.3.*cannot be factorised"):
        sparsegpt.inverse_factor(-torch.eye(4), 0.01, "layers.3")


def test_lowest_takes_exactly_as_many_and_the_first_among_equals():
    assert select.lowest(torch.ones(2, 5), 2).tolist() == [[True, True, False, False, False]] * 2
    score = torch.tensor([[1.0, 0.0, 1.0, 1.0, 2.0]])
    assert select.lowest(score, 3).tolist() == [[True, True, True, False, False]]


@pytest.mark.parametrize("pattern", ["2:4", "3:4", "1:2", "4:8", "3:8"])
def test_the_lowest_of_every_group_go_and_ties_as_in_the_released_loop(pattern):
    parsed = Pattern.parse(pattern)
    score = randn(50, 48).mul(3).round().abs()  # many ties
    oracle = torch.zeros_like(score, dtype=torch.bool)
    for start in range(0, 48, parsed.m):
        lowest = score[:, start : start + parsed.m].topk(parsed.m - parsed.n, dim=1, largest=False).indices
        oracle.scatter_(1, start + lowest, True)
    found = select.n_of_m(score, parsed)
    assert torch.equal(found, oracle)
    grouped, gone = score.unflatten(-1, (-1, parsed.m)), found.unflatten(-1, (-1, parsed.m))
    assert (grouped.masked_fill(~gone, -1).amax(-1) <= grouped.masked_fill(gone, torch.inf).amin(-1)).all()


def test_alpha_note_holds_l2_grows_with_the_root_of_the_window_count(windows):
    model = tiny("opt")
    once = gblm.gradient_norms(model, windows[:1], "l2")
    four = gblm.gradient_norms(model, windows[:1].repeat(4, 1), "l2")
    name = next(iter(once))
    assert_close(four[name], once[name] * math.sqrt(4))


def test_the_hessian_is_the_same_in_the_memory_of_its_sum(monkeypatch):
    x = torch.randn(3, 50, 37, generator=torch.Generator().manual_seed(0))
    one, other = fed(Hessian, x), fed(Hessian, x)
    expected = one.matrix
    assert torch.equal(expected, expected.T)
    assert torch.equal(other.taken(), expected)
    factor = sparsegpt.inverse_factor(expected, 0.01, "H")
    assert torch.equal(expected, one.matrix)  # which is left as it was
    monkeypatch.setattr(sparsegpt.memory, "free_bytes", lambda device: 0)
    assert torch.equal(sparsegpt.inverse_factor(expected, 0.01, "H"), factor)
