"""A pruning that is broken off goes on at its block, with the same bits."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import small_table as small
import torch
from conftest import needs_shared, tiny

import pruners
from experiments import cells
from experiments.batch import run_table
from experiments.recovery import Retraining
from experiments.settings import Settings
from experiments.store import blocks, cache, records
from experiments.store.blocks import PrunedBlocks
from pruners.calibrate import NOTHING, PLAIN
from pruners.retrain import MaskLoRA, Trainable
from pruners.unstructured import Unstructured

METHODS = (pruners.Wanda(sparsity=0.5), pruners.SparseGPT(sparsity=0.5), pruners.GBLM(pattern="2:4"))


class Killed(BaseException):
    pass


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(blocks, "SECONDS_BETWEEN", 0.0)


def break_off(model, method, windows, folder, monkeypatch, calls: int) -> None:
    """Prune, and be killed when `calls` groups of projections are done: a block has four."""
    remove, done = type(method).remove, []

    def counted(*arguments):
        if len(done) == calls:
            raise Killed
        done.append(remove(*arguments))

    with monkeypatch.context() as patch:
        patch.setattr(type(method), "remove", counted)
        with pytest.raises(Killed):
            pruners.prune(model, method, windows, keeper=PrunedBlocks(folder))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_a_pruning_that_was_broken_off_ends_with_the_same_bits(tmp_path, kind, method, windows, monkeypatch):
    whole, resumed = tiny(kind), tiny(kind)
    expected = pruners.prune(whole, method, windows)
    break_off(tiny(kind), method, windows, tmp_path, monkeypatch, calls=6)
    assert [path.name for path in tmp_path.iterdir()] == ["000.safetensors"]
    report = pruners.prune(resumed, method, windows, keeper=PrunedBlocks(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    assert report.projections == expected.projections


def test_a_kept_block_is_not_pruned_again(tmp_path, windows, monkeypatch):
    method, calls = METHODS[0], []
    break_off(tiny("opt"), method, windows, tmp_path, monkeypatch, calls=4)
    remove = Unstructured.remove
    monkeypatch.setattr(Unstructured, "remove", lambda *arguments: calls.append(remove(*arguments)))
    pruners.prune(tiny("opt"), method, windows, keeper=PrunedBlocks(tmp_path))
    assert len(calls) == 4


def test_a_damaged_block_is_reported_and_pruned_again(tmp_path, windows, monkeypatch, caplog):
    whole, resumed = tiny("opt"), tiny("opt")
    pruners.prune(whole, METHODS[0], windows)
    break_off(tiny("opt"), METHODS[0], windows, tmp_path, monkeypatch, calls=6)
    path = tmp_path / "000.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"oops")
    pruners.prune(resumed, METHODS[0], windows, keeper=PrunedBlocks(tmp_path))
    assert "checksum does not match" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_a_quick_pruning_writes_nothing(tmp_path, windows, monkeypatch):
    monkeypatch.setattr(blocks, "SECONDS_BETWEEN", 30.0)
    pruners.prune(tiny("opt"), METHODS[0], windows, keeper=PrunedBlocks(tmp_path / "kept"))
    assert not (tmp_path / "kept").exists()


def test_beyond_the_limit_blocks_are_not_kept(tmp_path, windows, monkeypatch, caplog):
    monkeypatch.setenv(cache.LIMIT_VARIABLE, "0.0001")  # 100 kB: one block of the two
    pruners.prune(tiny("opt"), METHODS[0], windows, keeper=PrunedBlocks(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["000.safetensors"]
    assert "beyond" in caplog.text


@dataclass(frozen=True)
class Balanced(pruners.Wanda):
    """Changes a bias with its matrix."""

    def remove(self, linears, x, dense):
        super().remove(linears, x, dense)
        for linear in linears.values():
            linear.bias.data += 1.0


def test_what_a_method_changes_beside_a_block_s_matrices_is_kept_with_them(tmp_path, windows, monkeypatch):
    method, whole, resumed = Balanced(sparsity=0.5), tiny("opt"), tiny("opt")
    pruners.prune(whole, method, windows)
    break_off(tiny("opt"), method, windows, tmp_path, monkeypatch, calls=6)
    pruners.prune(resumed, method, windows, keeper=PrunedBlocks(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@dataclass(frozen=True)
class Tweaked(pruners.Wanda):
    """Makes up for what is gone in the norms, in a loop of its own."""

    def prune(self, model, windows, dense, how=PLAIN):
        report = super().prune(model, windows, dense, how)
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.data *= 3.0
        return report


@needs_shared
def test_what_a_method_of_one_s_own_changes_is_so_in_every_cell_that_trains_the_same_pruned_model(tmp_path):
    data_dir = small.data(tmp_path / "data")
    training = Retraining(Trainable(adapters=MaskLoRA(rank=2)), small.WINDOWS, steps=2, learning_rate=1e-4)
    (run,) = small.table((Tweaked(sparsity=0.5),)).runs()
    made = cells.cells([replace(run, recovery=replace(training, steps=steps)) for steps in (2, 3)])
    for name, some in (("both", made), ("alone", made[1:])):
        assert not run_table("tiny", some, Settings(tmp_path / name, data_dir=data_dir)).failed
    both, alone = (records.find(tmp_path / name, "tiny", made[1].id) for name in ("both", "alone"))
    assert both.measures == alone.measures
    assert blocks.keeper(None, Tweaked(sparsity=0.5), tmp_path) is NOTHING
