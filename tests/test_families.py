"""What every entry of FAMILIES promises, on a tiny model of it; a new entry without one fails here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

import pruners
from experiments.store.blocks import PrunedBlocks
from pruners import anatomy, apply, checkpoint
from pruners.apply import Kept
from pruners.families import FAMILIES
from pruners.run import inputs, matrices
from pruners.run.stream import Stream
from pruners.weights import opening
from tests.families import DENSE, EVERY_BLOCK, TINY, model_type, tiny, windows

NO_STATIC_CACHE = "falcon: alibi"  # of whose dense model transformers makes an error


def test_every_family_has_a_tiny_model():
    assert {model_type(kind) for kind in TINY} == set(FAMILIES)


def drawn(block, lost):
    """About half of each kind of unit stays, another half in each block; none of the kinds in `lost`."""
    kept, draw = Kept.all(block), torch.Generator().manual_seed(block.index + 3)
    for kind in apply.KINDS:
        chosen = torch.rand(len(kept[kind]), generator=draw) > 0.5
        chosen[block.index % len(chosen)], chosen[(block.index + 1) % len(chosen)] = True, False
        kept[kind][:] = False if kind in lost else chosen
    return kept


def both_ways(kind, hollow):
    """Masked and cut; where `hollow`, the first block has no heads and the second no channels."""
    masked, cut = tiny(kind), tiny(kind)
    for block, twin in zip(anatomy.blocks(masked), anatomy.blocks(cut), strict=True):
        kept = drawn(block, [["attention"], ["mlp"], []][block.index] if hollow else [])
        before, lost = parameters(twin), sum(twin.lost(unit, kept[unit]) for unit in apply.KINDS)
        apply.zero(block, kept)
        apply.cut(twin, kept)
        assert before - parameters(twin) == lost
    apply.describe(cut)
    return masked, cut


def parameters(block):
    return sum(p.numel() for p in block.module.parameters())


def outputs(model, tokens):
    """Of every block, as the model runs them."""
    seen = []
    hooks = [
        block.module.register_forward_hook(lambda _, __, out: seen.append(out if torch.is_tensor(out) else out[0]))
        for block in anatomy.blocks(model)
    ]
    with torch.no_grad():
        model(tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("kind", TINY)
def test_replayed_blocks_give_what_the_model_does(kind):
    model, tokens = tiny(kind), windows(kind)
    stream = Stream(model, tokens, 3)  # of four windows: the last batch is shorter
    for block, expected in zip(anatomy.blocks(model), outputs(model, tokens), strict=True):
        stream.advance(block)
        assert_close(stream.hidden, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", TINY)
def test_every_matrix_of_a_block_is_a_projection_a_norm_or_a_router(kind):
    for block in anatomy.blocks(tiny(kind)):
        family = block.family
        norms = [f"{name}." for name in (family.query_norm, family.key_norm, family.router) if name]
        counted = sum(linear.weight.numel() for linear in block.linears().values())
        there = {name: p.numel() for name, p in block.module.named_parameters() if p.ndim > 1}
        assert counted == sum(size for name, size in there.items() if not name.startswith(tuple(norms)))
        block.module.register_parameter("stray", torch.nn.Parameter(torch.zeros(2, 3, 4)))
        with pytest.raises(ValueError, match=r"has matrices that .* does not list: stray"):
            anatomy._check_named(block)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize(
    "method",
    [pruners.SparseGPT(0.3), pruners.GBLM(pattern="2:4")],
    ids=lambda method: type(method).__name__,
)
def test_the_asked_share_of_all_matrices_is_zero(kind, method):
    model = tiny(kind)
    report = pruners.prune(model, method, windows(kind), batch_size=3)
    norms = {id(p) for block in anatomy.blocks(model) for p in kept_matrices(block)}
    matrices = [p for b in anatomy.blocks(model) for p in b.module.parameters() if p.ndim > 1 and id(p) not in norms]
    zeros, weights = sum(int((p == 0).sum()) for p in matrices), sum(p.numel() for p in matrices)
    assert report.achieved == pytest.approx(zeros / weights)
    assert zeros / weights == pytest.approx(method.asked, abs=0.02)
    assert sum(p.weights for p in report.projections) == weights


def kept_matrices(block):
    names = (block.family.query_norm, block.family.key_norm, block.family.router)
    modules = dict(block.module.named_modules())
    return [p for name in names if name and name in modules for p in modules[name].parameters()]


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("hollow", [False, True], ids=["uneven", "hollow"])
def test_masked_equals_cut_and_cached_equals_uncached(kind, hollow):
    masked, cut = both_ways(kind, hollow)
    tokens = windows(kind)
    with torch.no_grad():
        logits = cut(tokens).logits
        assert_close(masked(tokens).logits, logits, rtol=1e-5, atol=1e-5)
        assert (tiny(kind)(tokens).logits - logits).abs().max() > 0.02 * logits.std()
        prompt, mask = tokens[:3].clone(), torch.ones_like(tokens[:3])
        mask[0, :5] = 0
        prompt[mask == 0] = 0
        options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        options |= {"eos_token_id": None, "disable_compile": True}
        expected = cut.generate(prompt, use_cache=False, **options)
        for cache in ("dynamic", "static") if kind != NO_STATIC_CACHE else ("dynamic",):
            assert torch.equal(cut.generate(prompt, cache_implementation=cache, **options), expected)


@pytest.mark.parametrize("kind", [kind for kind in DENSE if FAMILIES[model_type(kind)].query_norm])
def test_norms_over_heads_count_what_is_there_however_often_they_are_masked(kind):
    masked, cut = both_ways(kind, hollow=False)
    again = tiny(kind)
    for block in anatomy.blocks(again):
        some = drawn(block, [])
        some["attention"][int((~some["attention"]).nonzero()[0])] = True
        apply.zero(block, some)
        apply.zero(block, drawn(block, []))
    with torch.no_grad():
        expected = cut(windows(kind)).logits
        assert_close(again(windows(kind)).logits, expected, rtol=1e-5, atol=1e-5)
        for block in anatomy.blocks(masked):
            apply.cut(block, drawn(block, []))
        assert_close(masked(windows(kind)).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in DENSE if FAMILIES[model_type(kind)].query_norm])
def test_heads_that_were_zeroed_and_stay_change_nothing(kind, cut):
    model, tokens = tiny(kind), windows(kind)
    pruners.prune(model, pruners.WandaSP(0.7), tokens, cut=False)
    with torch.no_grad():
        expected = model(tokens).logits
        for ratio in (0.0, 0.5):  # of which the lowest are zeroed already
            pruners.prune(model, pruners.WandaSP(ratio), tokens, cut=cut)
            assert_close(model(tokens).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["olmo2", "olmo3"])
def test_norms_that_no_configuration_can_say_are_not_saved_until_the_heads_are_cut_out(kind, tmp_path):
    model, method = tiny(kind), pruners.MagnitudeSP(0.5)
    pruners.prune(model, method, cut=False)
    with pytest.raises(ValueError, match=r"Heads of this model are zeroed.*layers\.0\.self_attn\.q_norm.*cut=True"):
        checkpoint.save(model, None, tmp_path / "out")
    pruners.prune(model, method)
    opened, _ = checkpoint.load(checkpoint.save(model, None, tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(opened(windows(kind)).logits, model(windows(kind)).logits)


@pytest.mark.parametrize("kind", DENSE)
def test_structured_methods_say_what_they_leave(kind):
    for method in (pruners.Flap(target_parameters=0.3), EVERY_BLOCK):
        cut = tiny(kind)
        report = pruners.prune(cut, method, windows(kind))
        after = report.structure.after
        assert after.size.model == cut.num_parameters() < report.structure.before.size.model
        widths = [(block.heads, block.kv_heads, block.channels) for block in anatomy.blocks(cut)]
        assert widths == [(told.heads, told.kv_heads, told.channels) for told in after.blocks]
    masked = tiny(kind)
    pruners.prune(masked, method, windows(kind), cut=False)
    with torch.no_grad():
        assert_close(masked(windows(kind)).logits, cut(windows(kind)).logits, rtol=1e-5, atol=1e-5)


OURS = {"chatglm"}  # no architecture of transformers'
OPEN_ALL = """
import sys
from pathlib import Path
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
{importing}
for path in sorted(Path().glob("{pattern}/*.safetensors")):
    model = AutoModelForCausalLM.from_pretrained(path.with_suffix(""), **{options})
    told = load_file(path)
    with torch.no_grad():
        assert torch.equal(model(told["windows"]).logits, told["logits"]), path
    print(path.parent, type(model).__module__, flush=True)
assert ("pruners" in sys.modules) == {imported}
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For every family a folder of a model cut unevenly, with hollow blocks, and of one with single weights zeroed."""
    root = tmp_path_factory.mktemp("families")
    for number, kind in enumerate(TINY):
        models = {"plain": tiny(kind)}
        pruners.prune(models["plain"], pruners.Magnitude(sparsity=0.5))
        if kind in DENSE:
            models["cut"] = both_ways(kind, hollow=True)[1]
        for how, model in models.items():
            folder = root / ("ours" if model_type(kind) in OURS else "any") / how / f"{number:02}"
            checkpoint.save(model, None, folder)
            tokens = windows(kind)
            with torch.no_grad():
                save_file({"windows": tokens, "logits": model(tokens).logits}, folder.with_suffix(".safetensors"))
    return root


def opened(root, pattern, importing, options):
    """By a process that opens all folders of a pattern: how each was made and where its class is from."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HOME": str(root / "hub")}
    code = OPEN_ALL.format(pattern=pattern, importing=importing, options=options, imported=bool(importing))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.split() for line in done.stdout.splitlines() if line.startswith(("any/", "ours/"))]
    assert len(found) == len(list(root.glob(f"{pattern}/*.safetensors"))) > 0
    return [(Path(where).name, module) for where, module in found]


def test_every_cut_model_opens_in_a_fresh_process_that_knows_this_project(saved):
    assert {module for _, module in opened(saved, "*/cut", "import pruners", {})} == {"pruners.modeling_pruned"}


def test_every_saved_folder_opens_without_this_project(saved):
    told = opened(saved, "any/*", "", {"trust_remote_code": True})
    assert all(module.startswith("transformers_modules." if how == "cut" else "transformers.") for how, module in told)


def test_unstructured_results_are_plain_in_every_family(saved):
    for folder in saved.glob("*/plain/*/"):
        said = json.loads((folder / "config.json").read_text())
        assert not said["model_type"].startswith("pruned_")
        assert "blocks" not in said


@pytest.mark.parametrize("method", [pruners.Flap(ratio=0.3), pruners.MagnitudeSP(ratio=0.5)], ids=["flap", "evenly"])
@pytest.mark.parametrize("kind", DENSE)
def test_models_from_a_folder_are_cut_saved_and_opened(kind, method, tmp_path):
    """Whose class may have names of its own for the files that it reads and writes."""
    checkpoint.save(tiny(kind), None, tmp_path / "dense")
    model, _ = checkpoint.load(tmp_path / "dense")
    tokens = windows(kind)
    pruners.prune(model, method, tokens if method.needs_windows else None)
    checkpoint.save(model, None, tmp_path / "out")
    for again in (checkpoint.load(tmp_path / "out")[0], opening.open_folder(tmp_path / "out")):
        with torch.no_grad():
            assert_close(again(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-6)


NARROWED = ("llama", "mistral", "opt", "qwen2", "smollm3")


@pytest.mark.parametrize("kind", DENSE)
def test_the_residual_stream_is_cut_where_the_entry_allows_it(kind, tmp_path):
    model, method = tiny(kind), pruners.LLMPruner(ratio=0.2, granularity="channel", importance="l2")
    if model_type(kind) not in NARROWED:
        with pytest.raises(ValueError, match=r"^Channels of the residual stream cannot be removed from \w+: .*\.$"):
            pruners.prune(model, method)
        return
    pruners.prune(model, method)
    assert model.config.hidden_size == 25  # of 32
    checkpoint.save(model, None, tmp_path / "out")
    again, _ = checkpoint.load(tmp_path / "out")
    with torch.no_grad():
        assert_close(again(windows(kind)).logits, model(windows(kind)).logits, rtol=0, atol=0)


@pytest.mark.parametrize("kind", DENSE)
def test_a_block_of_zeros_passes_its_input_on_or_is_refused(kind):
    silent, dropped = tiny(kind), tiny(kind)
    apply.keep_first(dropped, 2)
    if anatomy.family(silent).passes_on is None:
        with pytest.raises(ValueError, match="zeroing cannot make it the identity; use cut=True"):
            apply.silence(anatomy.blocks(silent)[2])
        return
    apply.silence(anatomy.blocks(silent)[2])
    with torch.no_grad():
        assert_close(silent(windows(kind)).logits, dropped(windows(kind)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("kind", TINY)
def test_gradients_over_windows_are_those_of_a_plain_loop(kind, norm):
    """Of every matrix, whether it has a parameter of its own or shares one with others."""
    model, tokens = tiny(kind), windows(kind)
    found = pruners.gather(model, pruners.Gradient(0.5, norm=norm), tokens)
    sums = dict.fromkeys(model.parameters(), 0.0)
    for window in tokens.split(1):
        labels = inputs.labels(model.config, window)
        model(input_ids=window, labels=labels, use_cache=False).loss.backward()
        for parameter in sums:
            if parameter.grad is not None:
                sums[parameter] += parameter.grad.abs() if norm == "l1" else parameter.grad**2
                parameter.grad = None
    for block in anatomy.blocks(model):
        for name, linear in block.linears().items():
            whole = torch.as_tensor(sums[block.parameter(name)[1]])
            expected = matrices.view(linear, whole.sqrt() if norm == "l2" else whole)
            assert_close(found[f"{block.name}.{name}"], expected, rtol=1e-4, atol=1e-7)
            assert found[f"{block.name}.{name}"].any()


@pytest.mark.parametrize(("kind", "longest"), [("bloom", None), ("mpt", 64), ("gpt2", 64)])
def test_windows_may_be_as_long_as_the_family_has_positions(kind, longest):
    tokens = windows(kind, count=1, length=65)
    if longest is None:
        pruners.prune(tiny(kind), pruners.Wanda(sparsity=0.5), tokens)
        return
    with pytest.raises(ValueError, match=f"Windows of 65 tokens are longer than the model's context length, {longest}"):
        pruners.prune(tiny(kind), pruners.Wanda(sparsity=0.5), tokens)


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_finished_blocks_are_kept_and_put_back(kind, tmp_path):
    model, other = tiny(kind), tiny(kind)
    pruners.prune(model, pruners.Magnitude(sparsity=0.5))
    keeper = PrunedBlocks(tmp_path)
    for block, twin in zip(anatomy.blocks(model), anatomy.blocks(other), strict=True):
        keeper._write(block)
        assert keeper.restore(twin)
    assert all(map(torch.equal, model.state_dict().values(), other.state_dict().values()))
