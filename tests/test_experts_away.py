"""Routed experts away from home: parts of a checkpoint joined block by block, and the same numbers to the bit."""

from __future__ import annotations

import json
import math
import shutil
import weakref
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

import pytest
import small_table as small
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_homes import at_home, same_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

import pruners
from eval.scorer import Scorer
from experiments import cells
from experiments.batch import run_table
from experiments.models import catalogue
from experiments.settings import Settings
from experiments.spec import Efficiency, MaskPatterns
from experiments.store import blocks, records
from pruners import checkpoint
from pruners.interface import contract
from pruners.retrain import Reconstruction, Trainable
from pruners.weights import homes, joined, opening
from tests import families

METHODS = {
    **{name: pruners.METHODS[name](sparsity=0.5) for name in ("magnitude", "wanda", "sparsegpt", "gblm", "random")},
    "gradient, l1": pruners.Gradient(0.5, norm="l1"),
    "wanda 2:4": pruners.Wanda(pattern="2:4"),
}
STRUCTURED = (pruners.Flap(ratio=0.4), pruners.WandaSP(ratio=0.4), pruners.LLMPruner(ratio=0.4, granularity="layer"))
LAYOUTS = ("one by one", "stacked")  # as the Hub has them, and as transformers' modules do


@pytest.fixture(params=families.EXPERTS)
def kind(request):
    return request.param


def saved(kind, folder, layout=LAYOUTS[0], dtype=torch.float32, shard="5KB"):
    families.tiny(kind).to(dtype).save_pretrained(
        folder, max_shard_size=shard, save_original_format=layout == LAYOUTS[0]
    )
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def stored(folder):
    """The tensors of a folder by name, with the file of each."""
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path.name)
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", ["auto", torch.float16])
def test_either_layout_computes_what_it_computes_in_memory(kind, layout, dtype, tmp_path):
    saved(kind, tmp_path, layout, torch.bfloat16)
    names = stored(tmp_path)
    assert any("experts.1." in name for name in names) == (layout == LAYOUTS[0])
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    model, tokens = opening.open_folder(tmp_path, dtype=dtype), families.windows(kind)
    assert model.dtype == plain.dtype
    assert same_weights(model, plain)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)
    assert homes.of(model).source.bytes_read == 2 * sum(p.numel() for p in plain.parameters()) * 2  # in two sweeps


def test_one_experts_tensors_may_lie_in_different_files(kind, tmp_path):
    plain = saved(kind, tmp_path)
    places = defaultdict(set)
    for name, file in stored(tmp_path).items():
        if ".experts." in name:
            places[name.rsplit(".", 2)[0]].add(file)
    assert max(map(len, places.values())) > 1
    assert same_weights(opening.open_folder(tmp_path), plain)


class Counted(Mapping):
    """Tensors of which it is known how many are in use when one is asked for."""

    def __init__(self, tensors):
        self.tensors, self.given, self.most = tensors, [], 0

    def __getitem__(self, name):
        self.most = max(self.most, sum(ref() is not None for ref in self.given))
        made = self.tensors[name].clone()
        self.given.append(weakref.ref(made))
        return made

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)


def test_one_part_at_a_time_lies_beside_the_whole(kind, tmp_path):
    plain = saved(kind, tmp_path)
    source = homes.of(opening.open_folder(tmp_path)).source
    name = "model.layers.0.mlp.experts.gate_up_proj"
    parts = Counted(source.shards)
    assert torch.equal(joined.read(parts, source.names[name]), plain.get_parameter(name))
    assert len(parts.given) == 8  # gate and up of four experts
    assert parts.most == 1  # the one that was copied before, until the next is there


@pytest.mark.parametrize("home", ["host", "disk"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_prunes_the_same_from_every_home(kind, home, method, tmp_path):
    plain, tokens = saved(kind, tmp_path), families.windows(kind, 5)
    model = at_home(home, tmp_path)
    expected = pruners.prune(plain, METHODS[method], tokens, batch_size=2).to_dict()
    found = pruners.prune(
        model, METHODS[method], tokens, batch_size=2
    ).to_dict()  # of products of other rows other bits
    assert {**found, "seconds": 0} == {**expected, "seconds": 0}
    assert found["achieved"] == pytest.approx(0.5, abs=0.02)
    assert same_weights(model, plain)
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, plain(tokens).logits)


@pytest.mark.parametrize("home", ["device", "host", "disk"])
@pytest.mark.parametrize("method", STRUCTURED, ids=lambda method: type(method).__name__)
def test_structured_methods_are_refused_at_every_home(kind, home, method, tmp_path):
    plain = saved(kind, tmp_path)
    model = at_home(home, tmp_path)
    with pytest.raises(ValueError, match=r"has routed experts, .*; use an unstructured method"):
        pruners.prune(model, method, families.windows(kind))
    assert same_weights(model, plain)


def test_blocks_are_rebuilt_to_the_same_bits(kind, tmp_path):
    plain, tokens = saved(kind, tmp_path), families.windows(kind)
    model = opening.open_folder(tmp_path)
    steps = Reconstruction(Trainable(norms=True), steps=5, learning_rate=1e-2)
    one, other = (
        pruners.prune(subject, pruners.Wanda(0.5), tokens, reconstruct=steps).reconstruction
        for subject in (plain, model)
    )
    assert [{**block, "seconds": 0} for block in one] == [{**block, "seconds": 0} for block in other]
    assert all(block["final"] < block["initial"] for block in one)
    assert same_weights(model, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard", ["2KB", "20KB", "1GB"])
def test_what_is_saved_is_what_a_model_in_memory_saves(kind, layout, shard, tmp_path):
    plain, model = saved(kind, tmp_path / "dense", layout), opening.open_folder(tmp_path / "dense")
    for place, subject in (("plain", plain), ("disk", model)):
        pruners.prune(subject, pruners.Wanda(0.5), families.windows(kind))
        checkpoint.save(subject, None, tmp_path / place, max_shard_size=shard)
    assert stored(tmp_path / "disk").keys() == stored(tmp_path / "plain").keys() == stored(tmp_path / "dense").keys()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "disk", dtype="auto")
    assert all(torch.equal(p, dict(plain.named_parameters())[name]) for name, p in again.named_parameters())
    assert same_weights(opening.open_folder(tmp_path / "disk"), plain)


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if name not in key}


DAMAGES = {
    "one matrix of an expert": (("experts.2.w1", "experts.2.gate_proj"), "lack some of the tensors that one parameter"),
    "an expert": (("experts.2.", "experts.2."), "the configuration says other shapes for .*experts.down_proj"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_an_expert_that_is_not_whole_is_told_in_one_sentence(kind, what, tmp_path):
    (mixtral, qwen), said = DAMAGES[what]
    saved(kind, tmp_path, shard="1GB")
    file = tmp_path / "model.safetensors"
    before = load_file(file)
    tensors = without(mixtral if kind == "mixtral" else qwen)(before)
    assert len(tensors) < len(before)
    save_file(tensors, file, metadata={"format": "pt"})
    for opened in (opening.open_folder, checkpoint.load):
        with pytest.raises(ValueError, match=said) as caught:
            opened(tmp_path)
        assert str(tmp_path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_made_otherwise_than_by_joining_is_refused(kind, tmp_path, monkeypatch):
    saved(kind, tmp_path)
    monkeypatch.setattr(opening, "JOINS", {torch.ops.aten.stack.default: True})  # gate and up are put side by side
    with pytest.raises(ValueError, match=r"gate_up_proj of .* is computed .*; keep this model's weights on the device"):
        opening.open_folder(tmp_path)


def test_a_piece_of_a_joined_tensor_is_not_taken_for_the_whole():
    one, two = (torch.empty(2, 3, device="meta") for _ in range(2))
    names = {opening._storage(one): "one", opening._storage(two): "two"}
    with opening._Watch(lambda tensor: names.get(opening._storage(tensor))) as watch:
        both = torch.cat([one, torch.empty(1, 3, device="meta")])
        whole = torch.stack([one, two], dim=-3)
    assert watch.of(both) is None
    assert watch.of(whole) == joined.Join(("one", "two"), 0, None, torch.Size([2, 2, 3]), torch.float32)
    assert watch.of(whole[0]) is None
    assert watch.of(whole.transpose(0, 1)) is None


needs_model = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return small.data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(kind, tmp_path):
    """A model folder with the tokenizer of another one."""
    place = tmp_path / "model"
    sizes = {**families.SIZES, "vocab_size": 512, "max_position_embeddings": 512}
    contract.built(kind, sizes, families.TINY[kind], 0).save_pretrained(place, max_shard_size="20KB")
    for path in small.MODEL.glob("token*"):
        shutil.copy(path, place)
    return place


def results(root):
    found = {id: (r.spec, r.achieved, r.measures, r.data) for id, r in records.load(root, "tiny").items()}
    return json.loads(json.dumps(found), object_hook=without_seconds)


def without_seconds(told):
    return {k: v for k, v in told.items() if "seconds" not in k}


def runs(folder, methods, measures=(small.PPL,)):
    return replace(small.table(methods, measures=measures), columns=((str(folder),),), run=lambda method, model: (
        replace(small.table().run(method, model), measures=measures)
    )).runs()  # fmt: skip


@needs_model
def test_records_are_the_same_wherever_the_weights_were(folder, data, tmp_path):
    measures = (small.PPL, Efficiency((), ()), MaskPatterns(1))
    chosen = runs(folder, (None, METHODS["wanda"], METHODS["gblm"], pruners.GBLM(pattern="2:4")), measures)
    recovery = small.retrained().runs()[0].recovery
    chosen += [replace(chosen[1], recovery=how) for how in (recovery, Reconstruction(Trainable(norms=True), steps=2))]
    for home in ("device", "disk"):
        done = run_table("tiny", cells.cells(chosen), Settings(tmp_path / home, data_dir=data, weights=home))
        assert not done.failed
    assert len(results(tmp_path / "disk")) == len(chosen)
    assert results(tmp_path / "disk") == results(tmp_path / "device")
    homes_told = {r.made_by.weights["home"] for r in records.load(tmp_path / "disk", "tiny").values()}
    assert homes_told == {"disk"}


@needs_model
def test_a_cell_that_dies_goes_on_from_the_blocks_on_the_disk(folder, data, tmp_path, monkeypatch):
    chosen = cells.cells(runs(folder, (METHODS["sparsegpt"],)))
    pruned, keep, remove = [], blocks.WrittenBlocks.keep, pruners.SparseGPT.remove

    def dying(self, block):
        keep(self, block)
        if block.index == 1:
            raise SystemExit

    def noted(self, linears, *rest):
        pruned.extend(linears)
        return remove(self, linears, *rest)

    monkeypatch.setattr(blocks.WrittenBlocks, "keep", dying)
    settings = {root: Settings(tmp_path / root, data_dir=data, weights="disk") for root in ("killed", "whole")}
    with pytest.raises(SystemExit):
        run_table("tiny", chosen, settings["killed"])
    monkeypatch.setattr(blocks.WrittenBlocks, "keep", keep)
    monkeypatch.setattr(pruners.SparseGPT, "remove", noted)
    assert not run_table("tiny", chosen, settings["killed"]).failed
    assert {name.split(".")[2] for name in pruned} == {"1", "2"}  # of three blocks, the second of which was in hand
    assert not run_table("tiny", chosen, settings["whole"]).failed
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


@needs_model
def test_the_dense_gate_reads_from_the_disk(folder, data, tmp_path, monkeypatch):
    (dense,) = cells.cells(runs(folder, (None,)))
    run_table("tiny", [dense], Settings(tmp_path / "dense", data_dir=data))
    (record,) = records.load(tmp_path / "dense", "tiny").values()
    found = record.measures[small.PPL.key]["perplexity"]
    for factor, held in ((1, False), (2, True)):
        known = {small.PPL.key: round(found * factor, 2)}
        monkeypatch.setitem(catalogue.CATALOGUE, "routed", catalogue.Model("routed", folder=folder, dense=known))
        chosen = cells.cells([replace(dense.run, model="routed", method=METHODS["magnitude"])])
        done = run_table("tiny", chosen, Settings(tmp_path / str(factor), data_dir=data, weights="disk"))
        assert bool(done.failed) == held
    assert math.isfinite(found)


@needs_model
def test_answers_are_the_same_and_the_weights_are_read_once(folder):
    plain, tokenizer = checkpoint.load(folder)[0], AutoTokenizer.from_pretrained(small.MODEL)
    away, draw = opening.open_folder(folder), torch.Generator().manual_seed(0)
    requests = []
    for number in range(20):
        tokens = torch.randint(5, 500, (9 + number,), generator=draw).tolist()
        requests.append((("before", str(number)), tokens[:-3], tokens[-3:]))
    expected = Scorer(plain, tokenizer)._loglikelihood_tokens(requests)
    assert Scorer(away, tokenizer)._loglikelihood_tokens(requests) == expected
    assert (
        homes.of(away).sweeps <= 3
    )  # of the answers, of a few tokens to see what follows the head, of the first block
