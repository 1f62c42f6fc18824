"""Where a cell's weights are moves no number, is chosen by the room there is, and is refused before any work."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import small_table as small
import torch

import pruners
from eval.scorer import Scorer
from experiments import cells, models, papers, placement
from experiments.__main__ import main
from experiments.batch import run_table
from experiments.placement import needs, shapes
from experiments.recovery import Retraining
from experiments.settings import Settings
from experiments.spec import Efficiency, Generation, MaskPatterns, Run, Windows
from experiments.store import records
from pruners import retrain
from pruners.retrain import Trainable
from pruners.run import loss
from pruners.weights import homes, memory, opening

needs_model = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")
RUN = Run("llama-7b", pruners.Wanda(0.5), small.WINDOWS, (small.PPL,), dtype="float16")
BLOCKS = {"attention_blocks": (1, 5), "mlp_blocks": (1, 5)}
METHODS = (
    None,
    pruners.Wanda(sparsity=0.5),
    pruners.GBLM(sparsity=0.5),
    pruners.Flap(ratio=0.3),
    pruners.LLMPruner(ratio=0.4, **BLOCKS),
)
MEASURES = (small.PPL, Efficiency((), ()), MaskPatterns(1), Generation(new_tokens=4))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small.data(tmp_path_factory.mktemp("data"))


def results(root: Path) -> dict[str, tuple]:
    return {id: (r.spec, r.achieved, r.measures, r.data) for id, r in records.load(root, "tiny").items()}


@needs_model
def test_records_are_the_same_wherever_the_weights_were(tmp_path, data, capsys):
    chosen = cells.cells(small.table(METHODS, measures=MEASURES).runs())
    reconstructed = replace(chosen[1].run, recovery=retrain.Reconstruction(retrain.Trainable(norms=True), steps=2))
    chosen += cells.cells([reconstructed])
    for home in ("device", "disk"):
        assert not run_table("tiny", chosen, Settings(tmp_path / home, data_dir=data, weights=home)).failed
    expected = without_seconds(results(tmp_path / "device"))
    assert without_seconds(results(tmp_path / "disk")) == expected
    told = {home: records.load(tmp_path / home, "tiny")[chosen[1].id].made_by.weights for home in ("device", "disk")}
    assert told["device"] == {"home": "device", "reason": "asked for"}
    weights = sum(path.stat().st_size for path in small.MODEL.glob("*.safetensors"))
    assert weights / 2 < told["disk"]["bytes_read"] / told["disk"]["sweeps"] < 2 * weights
    assert capsys.readouterr().err.count("Weights on the disk: asked for.") == 1
    assert not list((tmp_path / "disk" / ".cache").rglob("*/weights/*"))


def without_seconds(found):
    """Reconstruction tells its blocks' seconds, which no two runs share."""
    return json.loads(json.dumps(found), object_hook=lambda told: {k: v for k, v in told.items() if k != "seconds"})


@needs_model
def test_answers_are_the_same_and_the_weights_are_read_once(tmp_path):
    plain, tokenizer = models.load(small.MODEL)
    away, _ = models.load(small.MODEL, weights="disk")
    draw = torch.Generator().manual_seed(0)
    requests = []
    for number in range(70):
        tokens = torch.randint(5, 500, (9 + number,), generator=draw).tolist()
        requests.append((("before", str(number)), tokens[:-3], tokens[-3:]))
    expected = Scorer(plain, tokenizer)._loglikelihood_tokens(requests)
    assert Scorer(away, tokenizer)._loglikelihood_tokens(requests) == expected
    assert homes.of(away).sweeps <= 2


def killed(root: Path, data: Path) -> None:
    """Run a cell of seven blocks slowly, until the process is killed."""
    from experiments.store import blocks

    restore = blocks.WrittenBlocks.keep
    blocks.WrittenBlocks.keep = lambda self, block: (restore(self, block), time.sleep(0.2))
    run_table("tiny", cells.cells([slow_run()]), Settings(root, data_dir=data, weights="disk"))


def slow_run() -> Run:
    return Run(str(small.MODEL), pruners.SparseGPT(sparsity=0.5), small.WINDOWS, (small.PPL,))


@needs_model
def test_a_killed_cell_goes_on_from_the_blocks_on_the_disk(tmp_path, data, monkeypatch):
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=killed, args=(tmp_path / "killed", data))
    process.start()
    deadline = time.monotonic() + 120
    weights = tmp_path / "killed" / ".cache" / "unfinished" / "tiny"  # other folders come and go meanwhile
    while len(list(weights.glob("*/*/weights/*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    finished = len(list((tmp_path / "killed").rglob("*/weights/model.layers.*.safetensors")))
    pruned = []
    remove = pruners.SparseGPT.remove
    monkeypatch.setattr(
        pruners.SparseGPT, "remove", lambda self, linears, *rest: (pruned.extend(linears), remove(self, linears, *rest))
    )
    found = cells.cells([slow_run()])
    for root in ("killed", "whole"):
        before = len(pruned)
        assert not run_table("tiny", found, Settings(tmp_path / root, data_dir=data, weights="disk")).failed
        done_now = len({name.split(".")[2] for name in pruned[before:]})
        assert done_now == (5 - finished if root == "killed" else 5)
    assert 2 <= finished < 5
    assert results(tmp_path / "killed") == results(tmp_path / "whole")


def chosen(monkeypatch, run, device_gb, host_gb, device="cuda:0", weights="auto"):
    monkeypatch.setattr(memory, "free_bytes", lambda where="cpu": 1e9 * (host_gb if where == "cpu" else device_gb))
    settings = Settings(device="cpu", weights=weights)
    object.__setattr__(settings, "device", device)
    return placement.choose(run, settings)


def test_auto_takes_the_nearest_home_that_has_room(monkeypatch):
    homes_found = [chosen(monkeypatch, RUN, *room).home for room in ((80, 200), (12, 200), (12, 8))]
    assert homes_found == ["device", "host", "disk"]
    assert chosen(monkeypatch, RUN, 0, 64, "cpu").home == "device"
    assert chosen(monkeypatch, RUN, 0, 8, "cpu").home == "disk"
    placed = chosen(monkeypatch, RUN, 12, 8)
    assert str(placed).startswith("Weights on the disk: about 1")
    assert "12.0 GB free on cuda; the weights are 13.5 GB, 8.0 GB of CPU memory free." in str(placed)


def test_a_cpu_needs_room_for_the_activations_of_all_blocks(monkeypatch):
    recovery = replace(small.retrained().runs()[0].recovery, text=Windows("c4/train", 8, 2048))
    run = replace(RUN, recovery=recovery)
    card, cpu = needs.device_gb(run), needs.cpu_gb(run)
    between = (card + cpu) / 2 / placement.ROOM
    assert cpu > card + 10
    assert chosen(monkeypatch, run, between, 0).home == "device"
    assert chosen(monkeypatch, run, 0, between, "cpu").home == "disk"


WHOLE = {
    "training all weights": replace(
        RUN, recovery=replace(small.retrained().runs()[0].recovery, trainable=Trainable.full())
    ),
    "pruning channels of the residual stream": replace(RUN, method=pruners.LLMPruner(0.2, granularity="channel")),
    "the speed of a model": replace(RUN, measures=(Efficiency((1,), (64,)),)),
}


@pytest.mark.parametrize("what", WHOLE)
def test_what_needs_all_weights_is_refused_away_from_the_device(monkeypatch, what):
    size = "107.8" if what == "training all weights" else "13.5"  # 16 bytes each
    said = f"{what} needs all weights of llama-7b on the device, {size} GB"
    for home in ("host", "disk"):
        with pytest.raises(ValueError, match=f"{said}; leave out --weights {home}"):
            chosen(monkeypatch, WHOLE[what], 80, 80, weights=home)
    with pytest.raises(ValueError, match=f"{said}, and cuda:0 has 12.0 GB free; use a larger one"):
        chosen(monkeypatch, WHOLE[what], 12, 200)
    assert chosen(monkeypatch, WHOLE[what], 200, 200).home == "device"


@needs_model
def test_too_little_disk_for_the_pruned_copy_is_said_before_the_start(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(2**40, 2**40, 2**20))
    monkeypatch.setattr(models, "load", lambda *_: pytest.fail("nothing was to be loaded"))
    found = cells.cells(small.table((pruners.Wanda(sparsity=0.5),)).runs())
    assert run_table("tiny", found, Settings(tmp_path, data_dir=data, weights="disk")).failed
    assert "takes 1.1 GB and the disk of" in capsys.readouterr().err


@needs_model
def test_a_shard_that_changes_or_goes_under_way_is_named(tmp_path, windows):
    folder = tmp_path / "model"
    shutil.copytree(small.MODEL, folder)
    (file,) = folder.glob("*.safetensors")
    model = opening.open_folder(folder)
    tokens = windows.clamp(max=90)
    pruners.prune(model, pruners.Wanda(0.5), tokens)
    os.utime(file, ns=(1, 1))
    with pytest.raises(ValueError, match=rf"{file} changed while its weights were being read"):
        model(tokens)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="a weight file is missing"):
        model(tokens)
    with pytest.raises(FileNotFoundError, match=r"has no weights as model\.safetensors"):
        opening.open_folder(folder)
    file.write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=rf"The weights in {file} are damaged"):
        opening.open_folder(folder)


@needs_model
def test_an_error_leaves_a_model_on_the_disk_as_it_was(windows):
    model = opening.open_folder(small.MODEL)
    before = {name: p.clone() for part in homes.each(model) for name, p in part.items()}

    def stop(done, total):
        if done == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        pruners.prune(model, pruners.Wanda(0.5), windows, progress=stop)
    assert all(torch.equal(before[name], p) for part in homes.each(model) for name, p in part.items())


@needs_model
def test_homes_that_cannot_serve_are_refused(windows, tmp_path):
    model = opening.open_folder(small.MODEL)
    with pytest.raises(ValueError, match="needs all weights at once on cpu, and they are offloaded"):
        pruners.prune(model, pruners.LLMPruner(0.2, granularity="channel"), windows)
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(ValueError, match=r"use pruners\.checkpoint\.save"):
        model.save_pretrained(tmp_path)


@needs_model
def test_the_command_line_says_where_weights_go(tmp_path, data, monkeypatch, capsys):
    monkeypatch.setitem(papers.TABLES, "tiny", small.table((pruners.Wanda(sparsity=0.5),)))
    words = ["run", "tiny", "--results", str(tmp_path), "--data-dir", str(data)]
    assert main([*words, "--weights", "disk"]) == 0
    assert "Weights on the disk: asked for." in capsys.readouterr().err
    (record,) = records.load(tmp_path, "tiny").values()
    assert record.made_by.weights["home"] == "disk"
    with pytest.raises(SystemExit):
        main([*words, "--weights", "moon"])
    assert "moon" in capsys.readouterr().err


def test_cards_that_share_a_training_hold_their_part_each():
    recovery = Retraining(Trainable.full(), small.WINDOWS, steps=1, learning_rate=1e-3)
    run = Run("opt-6.7b", pruners.Wanda(0.5), small.WINDOWS, (small.PPL,), recovery=recovery, dtype="float16")
    shape = shapes.shape_of("opt-6.7b")
    masks = shape.blocks * shape.block / 8
    for cards in (1, 2, 4, 8):
        told = needs.device_bytes(run, cards=cards)
        assert told["training"] == pytest.approx((16 * shape.parameters + masks) / cards)
        assert ("gathered" in told) == (cards > 1)
    assert needs.home_on(run, 80.0)[0] is None
    assert needs.home_on(run, 80.0, cards=2)[0] == "device"
    pruned = replace(run, recovery=None)
    assert needs.device_bytes(pruned, cards=8) == needs.device_bytes(pruned)  # which every card does whole


def test_estimates_know_experts_and_what_a_home_keeps():
    shape = shapes.shape_of("mixtral-8x7b")
    assert (shape.width, shape.channels, shape.experts, shape.routes) == (4_096, 14_336, 8, 2)
    assert shape.parameters == pytest.approx(models.find("mixtral-8x7b").parameters, rel=1e-3)
    solved = {name: replace(RUN, model=name, method=pruners.SparseGPT(0.5)) for name in ("mixtral-8x7b", "llama-7b")}
    hessians = {name: needs.device_bytes(run, away=True)["statistics"] for name, run in solved.items()}
    assert hessians["mixtral-8x7b"] > 4 * 8 * shape.channels**2 > 4 * hessians["llama-7b"]
    gblm = replace(RUN, method=pruners.GBLM(0.5))
    there = {home: sum(needs.cpu_bytes(gblm, home).values()) for home in ("device", "host", "disk")}
    assert 4 * there["disk"] < there["host"] < there["device"] + 4 * shapes.shape_of("llama-7b").parameters
    assert "at home" not in needs.device_bytes(gblm, away=True)


@pytest.mark.parametrize("weights", ["auto", "disk"])
def test_every_cell_of_mixtral_fits_a_card_of_24_gb_block_by_block(weights):
    runs = papers.TABLES["perp.mixtral"].runs()
    found = [needs.home_on(run, 24.0, weights=weights) for run in runs]
    assert {home for home, _ in found} == {"away"}
    assert max(needs.device_gb(run, away=True, batch=1) for run in runs) < 24.0
    block = 1.45e9  # parameters, of all experts together; the next one is there as well
    assert {round(needs.device_bytes(run, away=True)["weights"] / block / 2 / 2, 1) for run in runs} == {1.0}
    assert needs.home_on(runs[0], 24.0, weights="device")[0] is None


def test_a_tokens_experts_are_counted_and_not_all():
    """As tests/bench_memory.py measures with --experts: what two experts make of a token is there at once."""
    shape = shapes.shape_of("mixtral-8x7b")
    (measured,) = (stage for stage in needs.stages.of(replace(RUN, model="mixtral-8x7b", measures=()), "disk", 8, 1)
                   if "statistics" in stage)  # fmt: skip
    tokens = small.WINDOWS.count * small.WINDOWS.length
    made = measured["activations"] / 2 / tokens
    assert 2 * 4 * shape.channels < made < 2 * 4 * shape.channels + 12 * shape.width


def test_estimates_of_training_count_the_largest_stage():
    """As it was measured by tests/bench_memory.py: what is counted together is there together."""
    shape, recovery = shapes.shape_of("llama-7b"), small.retrained().runs()[0].recovery
    run = replace(RUN, recovery=replace(recovery, batch_size=2), measures=())
    recomputed, kept = (needs.stages.of(run, "device", 8, 1, on_gpu=which)[-2] for which in (True, False))
    inputs = 2 * shape.width * 2 * small.WINDOWS.length * shape.blocks
    assert kept["activations"] > shape.blocks / 2 * (recomputed["activations"] - inputs)
    whole = replace(run, recovery=replace(recovery, trainable=Trainable.full()))
    step = needs.stages.of(whole, "device", 8, 1)[-1]
    assert step["activations"] == 12 * shape.vocabulary * shape.width  # of AdamW, for its largest tensor
    assert needs.cpu_bytes(whole)["at home"] == 4 * shape.parameters  # to go back to where the loss diverges
    rebuilt = replace(RUN, recovery=retrain.Reconstruction(Trainable(norms=True)), measures=())
    adapted = replace(rebuilt, recovery=retrain.Reconstruction(Trainable(adapters=retrain.MaskLoRA())))
    training = [needs.stages.of(which, "disk", 8, 1)[-1]["training"] for which in (rebuilt, adapted)]
    assert training[0] < 2e-2 * shape.block < 2 * shape.block < training[1]  # a copy of what training moves, no more


@needs_model
def test_gradients_of_a_model_on_the_disk_are_shared_by_cells(tmp_path, data, monkeypatch):
    asked, gather = [], pruners.gather
    monkeypatch.setattr(pruners, "gather", lambda *args, **more: (asked.append(args), gather(*args, **more))[1])
    chosen = cells.cells(small.table([pruners.GBLM(sparsity=share) for share in (0.5, 0.6)]).runs())
    for home, times in (("disk", 1), ("device", 2)):
        assert not run_table("tiny", chosen, Settings(tmp_path / home, data_dir=data, weights=home)).failed
        assert len(asked) == times
    assert results(tmp_path / "disk") == results(tmp_path / "device")


@pytest.mark.parametrize(
    ("rows", "length", "vocabulary"), [(1, 2048, 32_000), (4, 128, 96), (10, 64, 128_256), (300, 64, 262_144)]
)
def test_logits_are_estimated_as_the_loss_makes_them(rows, length, vocabulary):
    """However many rows there are, one place of each is made at once."""
    at_once = max(1, loss.LOGITS // (rows * vocabulary))
    made = rows * min(at_once, length) * vocabulary
    shape = shapes.Shape(1, 8, 8, vocabulary, 1, 1)
    told = needs.stages._predicted(shape, rows * length, length)
    assert made <= told <= made + rows * vocabulary
