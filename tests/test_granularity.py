"""Reconstruction by matrix, by attention and MLP, by several blocks, on dense inputs: against plain torch and numpy."""

from __future__ import annotations

import copy
from itertools import product

import numpy as np
import pytest
import torch
from conftest import hollow, tiny
from test_homes import at_home
from torch.testing import assert_close

import pruners
from experiments.recovery import label
from experiments.store.described import describe
from pruners import anatomy
from pruners.retrain import MaskLoRA, Reconstruction, Trainable
from pruners.retrain.schedule import Schedule
from pruners.retrain.units import GRANULARITIES
from pruners.weights import homes
from tests import families

WEIGHTS = Trainable(weights=True)
LLAMA = "llama grouped-query"
STEPS, RATE, BATCH = 12, 2e-3, 2
HOW = list(product(GRANULARITIES, ("pruned", "dense")))


def test_what_was_attached_before_an_error_is_detached(monkeypatch):
    model, attach = tiny("opt"), Trainable.attach_to_block

    def failing(self, block, *more):
        if block.index:
            raise MemoryError
        return attach(self, block, *more)

    monkeypatch.setattr(Trainable, "attach_to_block", failing)
    wanted = Reconstruction(Trainable(adapters=MaskLoRA(rank=2)), steps=1, granularity="two_blocks")
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(MemoryError):
        pruners.prune(model, pruners.Magnitude(0.5), torch.zeros(2, 8, dtype=torch.long), reconstruct=wanted)
    assert [type(module) for module in model.modules()] == kinds


def rebuilt(model, windows, what, granularity, inputs="pruned", method=None, **more):
    more = {"steps": STEPS, "learning_rate": RATE, "batch_size": BATCH, **more}
    wanted = Reconstruction(what, granularity=granularity, inputs=inputs, **more)
    return pruners.prune(model, method or pruners.Magnitude(0.5), windows, reconstruct=wanted).reconstruction


def set_for(granularity, **more):
    return Trainable(biases=True, weights=True, **({} if granularity == "matrix" else {"norms": True}), **more)


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def inputs_of(model, windows, names):
    """What these modules get in a whole forward pass, as rows of numbers."""
    found, hooks = {}, []
    for name in names:
        hooks.append(
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, name=name: found.__setitem__(name, args[0].detach().flatten(0, -2))
            )
        )
    with torch.no_grad():
        model(windows)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_a_matrix_comes_to_its_least_squares_solution(inputs, windows):
    dense, model = tiny(LLAMA), tiny(LLAMA)
    names = [f"model.layers.0.{name}" for name in anatomy.blocks(model)[0].linears()]
    found = rebuilt(model, windows, WEIGHTS, "matrix", inputs, steps=800, learning_rate=2e-2, batch_size=len(windows))
    told = {one["block"]: one for one in found}
    seen = inputs_of(dense if inputs == "dense" else model, windows, names)
    for name in names:
        x, was = seen[name].double().numpy(), dense.get_submodule(name).weight.detach().double().numpy()
        weight = model.get_submodule(name).weight.detach().double().numpy()
        best = np.zeros_like(was)
        for row, kept in enumerate(weight != 0):  # survivors alone, row by row
            best[row, kept] = np.linalg.lstsq(x[:, kept], x @ was[row], rcond=None)[0]
        least = np.square(x @ (best - was).T).mean()
        assert told[name]["initial"] > 1.2 * least
        assert told[name]["final"] == pytest.approx(np.square(x @ (weight - was).T).mean(), rel=1e-3)
        assert least * (1 - 1e-4) <= told[name]["final"] <= 1.002 * least


@pytest.mark.parametrize("family", families.TINY)
def test_every_family_comes_nearer_to_what_it_aims_at(family):
    plain = families.tiny(family)
    pruners.prune(plain, pruners.Magnitude(0.5))
    for number, (granularity, inputs) in enumerate(HOW):
        if granularity == "block" and inputs == "pruned":
            continue
        model = families.tiny(family)
        method = (pruners.Magnitude(0.5), pruners.Wanda(0.5), pruners.SparseGPT(0.5))[number % 3]
        if granularity == "matrix" and family in families.EXPERTS:
            before = copy.deepcopy(model)
            with pytest.raises(ValueError, match=r"experts of .* lie in stacked parameters"):
                rebuilt(model, families.windows(family), WEIGHTS, granularity, inputs, method)
            assert same(model, before)
            continue
        what = set_for(granularity)
        found = rebuilt(model, families.windows(family), what, granularity, inputs, method, steps=4, learning_rate=1e-3,
                        warmup=0)  # fmt: skip
        assert found
        assert all(one["final"] < one["initial"] and one["lowered"] for one in found)
        if isinstance(method, pruners.Magnitude):  # whose mask no inputs move
            pairs = zip(anatomy.blocks(model), anatomy.blocks(plain), strict=True)
            assert all(
                torch.equal(one.linear(name).weight == 0, other.linear(name).weight == 0)
                for one, other in pairs
                for name in one.linears()
            )


def names_of(granularity):
    model = tiny(LLAMA)
    windows = torch.randint(3, 96, (2, 8))
    return [one["block"] for one in rebuilt(model, windows, set_for(granularity), granularity, steps=1)]


def test_what_is_rebuilt_at_once_is_told():
    matrices = [f"self_attn.{one}_proj" for one in "qkvo"] + [f"mlp.{one}_proj" for one in ("gate", "up", "down")]
    assert names_of("matrix") == [f"model.layers.{block}.{name}" for block in (0, 1) for name in matrices]
    assert names_of("attention_mlp") == [f"model.layers.{b}: {part}" for b in (0, 1) for part in ("attention", "MLP")]
    assert names_of("block") == ["model.layers.0", "model.layers.1"]
    assert names_of("two_blocks") == names_of("four_blocks") == ["model.layers.0 to 1"]


def test_blocks_that_fill_no_window_are_the_last_one():
    found = rebuilt(families.tiny("llama"), families.windows("llama"), set_for("block"), "two_blocks", steps=1)
    assert [one["block"] for one in found] == ["model.layers.0 to 1", "model.layers.2"]


class Plain:
    """A reconstruction in plain torch: modules of a pruned LLaMA trained towards those of a dense one."""

    def __init__(self, windows):
        self.windows = windows
        self.dense, self.model = tiny(LLAMA), tiny(LLAMA)
        pruners.prune(self.model, pruners.Magnitude(0.5))
        self.layers, self.was = self.model.model.layers, self.dense.model.layers
        places = torch.arange(windows.shape[1])[None]
        hidden = self.model.model.embed_tokens(windows).detach()
        mask = torch.full((windows.shape[1],) * 2, float("-inf")).triu(1)[None, None]
        self.how = {"position_embeddings": self.model.model.rotary_emb(hidden, places), "attention_mask": mask}
        self.hidden = hidden

    def block(self, layer, x):
        return layer(x, **self.how)

    def attention(self, layer, x):
        return layer.self_attn(layer.input_layernorm(x), **self.how)[0]

    def train(self, modules, made, x, aims):
        """AdamW on the norms and on the weights that are left."""
        schedule = Schedule(STEPS, RATE, BATCH, 0.1)
        params = [p for module in modules for p in module.parameters()]
        masks = {p: p != 0 for p in params}
        optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=0)
        for step in range(STEPS):
            rows = torch.arange(step * BATCH, (step + 1) * BATCH) % len(x)
            for group in optimizer.param_groups:
                group["lr"] = schedule.rate(step)
            optimizer.zero_grad()
            (made(x[rows]) - aims[rows]).square().mean().backward()
            for p in params:
                p.grad *= masks[p]
            optimizer.step()
        return float((made(x) - aims).square().mean().detach())


WHOLE = Trainable(norms=True, weights=True)


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
@pytest.mark.parametrize("granularity", ["two_blocks", "four_blocks"])
def test_several_blocks_are_optimised_together(granularity, inputs, windows):
    plain, model = Plain(windows), tiny(LLAMA)
    with torch.no_grad():
        aims = plain.block(plain.was[1], plain.block(plain.was[0], plain.hidden))
    error = plain.train(
        plain.layers, lambda x: plain.block(plain.layers[1], plain.block(plain.layers[0], x)), plain.hidden, aims
    )
    (found,) = rebuilt(model, windows, WHOLE, granularity, inputs)
    assert found["final"] == pytest.approx(error, rel=1e-3)
    assert_close(list(model.parameters()), list(plain.model.parameters()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_a_block_gets_the_inputs_that_are_asked_for(inputs, windows):
    plain, model = Plain(windows), tiny(LLAMA)
    x, errors = plain.hidden, []
    for layer, was in zip(plain.layers, plain.was, strict=True):
        with torch.no_grad():
            aims = plain.block(was, x)
        errors.append(plain.train([layer], lambda x, layer=layer: plain.block(layer, x), x, aims))
        with torch.no_grad():
            x = plain.block(was if inputs == "dense" else layer, x)
    found = rebuilt(model, windows, WHOLE, "block", inputs)
    assert [one["final"] for one in found] == pytest.approx(errors, rel=1e-3)
    assert_close(list(model.parameters()), list(plain.model.parameters()), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("inputs", ["pruned", "dense"])
def test_attention_and_the_mlp_are_trained_apart(inputs, windows):
    plain, model = Plain(windows), tiny(LLAMA)
    x, errors = plain.hidden, []
    for layer, was in zip(plain.layers, plain.was, strict=True):
        with torch.no_grad():
            aims = plain.attention(was, x)
        inside = [layer.input_layernorm, layer.self_attn]
        errors.append(plain.train(inside, lambda x, layer=layer: plain.attention(layer, x), x, aims))
        with torch.no_grad():
            middle = x + plain.attention(was if inputs == "dense" else layer, x)
            aims = was.mlp(was.post_attention_layernorm(middle))

        def mlp(x, layer=layer):
            return layer.mlp(layer.post_attention_layernorm(x))

        errors.append(plain.train([layer.post_attention_layernorm, layer.mlp], mlp, middle, aims))
        with torch.no_grad():
            x = plain.block(was if inputs == "dense" else layer, x)
    found = rebuilt(model, windows, WHOLE, "attention_mlp", inputs)
    assert [one["final"] for one in found] == pytest.approx(errors, rel=1e-3)
    assert_close(list(model.parameters()), list(plain.model.parameters()), atol=1e-5, rtol=1e-4)


def test_the_mask_goes_by_the_pruned_models_inputs_whatever_rebuilding_gets(windows):
    """Nothing is rebuilt by so small a rate, so that Wanda's mask is that of pruning alone."""
    plain = tiny(LLAMA)
    pruners.prune(plain, pruners.Wanda(0.5), windows)
    for granularity, inputs in HOW:
        model = tiny(LLAMA)
        what = WEIGHTS if granularity == "matrix" else WHOLE
        rebuilt(model, windows, what, granularity, inputs, pruners.Wanda(0.5), learning_rate=1e-12)
        for one, other in zip(anatomy.blocks(model), anatomy.blocks(plain), strict=True):
            for name, linear in one.linears().items():
                assert torch.equal(linear.weight == 0, other.linear(name).weight == 0)


@pytest.mark.parametrize(("granularity", "inputs"), HOW)
def test_weights_away_from_home_give_the_same_bits_and_a_killed_run_goes_on(granularity, inputs, tmp_path):
    adapters = MaskLoRA(rank=2)
    what = Trainable(adapters=adapters) if granularity == "matrix" else Trainable(norms=True, adapters=adapters)
    place, windows = tmp_path / "model", families.windows("opt")
    families.tiny("opt").save_pretrained(place)
    wanted = Reconstruction(what, 3, 1e-3, granularity=granularity, inputs=inputs)
    told = []
    for home in ("device", "host", "disk", "killed"):
        model = at_home(home, place)
        folder = tmp_path / "kept"
        if home == "killed":

            def kill(done, total):
                if done == 3:  # what came before the last block is kept, but for four blocks at once
                    raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                pruners.prune(at_home(home, place), pruners.Wanda(0.5), windows, reconstruct=wanted, folder=folder,
                              progress=kill)  # fmt: skip
            kept = {"two_blocks": 1, "four_blocks": 0}.get(granularity, 2)
            assert len(list(folder.glob("*.safetensors"))) == kept
        report = pruners.prune(model, pruners.Wanda(0.5), windows, reconstruct=wanted,
                               folder=folder if home == "killed" else None)  # fmt: skip
        weights = {name: p.detach().clone() for part in homes.each(model) for name, p in part.items()}
        told.append((report.projections, [{**one, "seconds": 0} for one in report.reconstruction], weights))
    for projections, errors, weights in told[1:]:
        assert (projections, errors) == told[0][:2]
        assert all(torch.equal(weights[name], p) for name, p in told[0][2].items())


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("units", ["no head, no channel", "nothing"])
def test_blocks_without_heads_or_channels_are_rebuilt(units, granularity, windows):
    model = hollow(LLAMA, units)
    found = rebuilt(model, windows, set_for(granularity), granularity, method=pruners.Wanda(0.5))
    assert all(one["final"] <= one["initial"] for one in found)


def test_an_error_leaves_no_adapter_and_no_dense_value_behind(windows, monkeypatch):
    def failing(*_):
        raise ConnectionError

    monkeypatch.setattr(Schedule, "step", failing)
    for granularity, inputs in HOW:
        model = tiny(LLAMA)
        shapes = {name: type(module) for name, module in model.named_modules()}
        with pytest.raises(ConnectionError):
            rebuilt(model, windows, Trainable(adapters=MaskLoRA(rank=2)), granularity, inputs)
        assert {name: type(module) for name, module in model.named_modules()} == shapes
        sparse = [float((p == 0).float().mean()) for p in anatomy.blocks(model)[0].module.parameters() if p.ndim > 1]
        assert sparse == pytest.approx([0.5] * len(sparse), abs=0.01)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"granularity": "blocks"}, r"Unknown granularity 'blocks'\. Did you mean .*block"),
        ({"inputs": "sparse"}, r"Unknown inputs 'sparse'\. .*Known: dense, pruned"),
        ({"granularity": "matrix"}, "Norms belong to no matrix; drop norms= here, or use granularity='attention_mlp'"),
        ({"granularity": "attention_mlp", "reference": True}, "The released code rebuilds blocks on pruned inputs"),
        ({"inputs": "dense", "reference": True}, "The released code rebuilds blocks on pruned inputs"),
    ],
)
def test_what_does_not_go_together_is_refused(given, said):
    with pytest.raises(ValueError, match=said):
        Reconstruction(Trainable(norms=True), **given)


def test_fields_at_their_defaults_are_no_part_of_an_id():
    plain = describe(Reconstruction(Trainable(norms=True)))
    assert not {"granularity", "inputs"} & plain.keys()
    told = describe(Reconstruction(Trainable(norms=True), granularity="two_blocks", inputs="dense"))
    assert (told["granularity"], told["inputs"]) == ("two_blocks", "dense")


def test_a_label_says_what_is_rebuilt_at_once_and_on_which_inputs():
    def of(**how):
        return label(Reconstruction(Trainable(weights=True), **how))

    assert of() == " + reconstruction (weights)"
    assert of(granularity="two_blocks") == " + reconstruction (weights) by two blocks"
    assert (
        of(granularity="attention_mlp", inputs="dense") == " + reconstruction (weights) by attention, MLP, dense inputs"
    )
