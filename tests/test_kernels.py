"""Kernels equal their plain forms: on a CPU in Triton's interpreter, on a GPU where there is one."""

from __future__ import annotations

import importlib
import logging

import pytest
import torch

from pruners import SparseGPT, select
from pruners.kernels import choice
from pruners.select import Pattern
from pruners.sparsegpt import COSTS

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")


@pytest.fixture
def sweep():
    """The kernel, as it runs here (tests/conftest.py)."""
    pytest.importorskip("triton", reason="Triton, which PyTorch's builds for CUDA bring, is not installed")
    return importlib.import_module("pruners.kernels.sweep").sweep


def case(columns: int, outputs: int, seed: int = 0):
    """A block, its factor U and the norms of its inputs."""
    draw = torch.Generator().manual_seed(seed)
    block = torch.randn(columns, outputs, generator=draw)
    inputs = torch.randn(4 * columns, columns, generator=draw)
    hessian = inputs.T @ inputs
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian.double()), upper=True).float()
    gone = torch.rand(columns, outputs, generator=draw) < 0.5
    return [tensor.to(DEVICE) for tensor in (block, upper, hessian.diagonal().sqrt(), gone)]


@pytest.mark.parametrize("metric", COSTS)
@pytest.mark.parametrize("pattern", [None, "2:4", "1:4", "4:8", "2:3"])
@pytest.mark.parametrize(("columns", "outputs"), [(24, 37), (48, 16)])
def test_the_sweep_in_one_launch_equals_that_by_columns(sweep, metric, pattern, columns, outputs):
    block, upper, norm, gone = case(columns, outputs)
    method, parsed = SparseGPT(pattern=pattern, metric=metric, block_size=columns), None
    known: torch.Tensor | None = gone
    if pattern:
        known, parsed = None, Pattern.parse(pattern)
    plain, fast = block.clone(), block.clone()
    expected = method._plain_sweep(plain, upper, known, norm, parsed)
    errors = sweep(fast, upper, known, norm, parsed, metric)
    assert torch.equal(fast == 0, plain == 0)
    assert torch.equal(errors == 0, expected == 0)
    torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(errors, expected, rtol=1e-5, atol=1e-4)


def test_a_column_changes_those_to_its_right_alone(sweep):
    """Worked by hand: what goes of column 0 lands in column 1, and infinity there leaves the columns before alone."""
    block = torch.tensor([[1.0, 2.0], [3.0, 4.0], [1e38, 1.0]], device=DEVICE)
    upper = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1e-5]], device=DEVICE)
    gone = torch.tensor([[True, False], [False, False], [True, True]], device=DEVICE)
    errors = sweep(block, upper, gone, torch.ones(3, device=DEVICE), None, "obs")
    assert block.tolist() == [[0.0, 2.0], [2.5, 4.0], [0.0, 0.0]]
    assert errors[:2].tolist() == [[0.5, 0.0], [0.0, 0.0]]
    assert errors[2, 0].isinf()


def test_of_equal_costs_the_lower_index_goes(sweep):
    block = torch.tensor([[1.0, 2.0], [1.0, 1.0], [1.0, 2.0], [1.0, 2.0]], device=DEVICE)
    eye, ones = torch.eye(4, device=DEVICE), torch.ones(4, device=DEVICE)
    sweep(block, eye, None, ones, Pattern(2, 4), "magnitude")
    assert block.tolist() == [[0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [1.0, 2.0]]


@pytest.mark.skipif(not GPU, reason="torch.topk's choice among equals is a GPU's; there is none here")
@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_topk_on_a_gpu_takes_the_lower_index_too(sweep, pattern):
    parsed = Pattern.parse(pattern)
    cost = torch.randint(3, (4096, 64), device=DEVICE).float()
    block, eye = cost.T.contiguous(), torch.eye(64, device=DEVICE)
    block += 1
    sweep(block, eye, None, eye[0], parsed, "magnitude")
    assert torch.equal(block.T == 0, select.n_of_m(cost, parsed))


def test_a_cpu_and_other_dtypes_have_the_plain_form(monkeypatch):
    monkeypatch.setattr(choice, "_works", lambda device: pytest.fail("nothing is compiled"))
    assert not choice.sweeps(torch.ones(8, 8))
    assert not choice.sweeps(torch.ones(8, 8, dtype=torch.float64, device="meta"))


def test_where_triton_does_not_work_a_warning_says_so_once(caplog):
    choice._works.cache_clear()
    with caplog.at_level(logging.WARNING):
        device = torch.device("meta")
        assert not choice._works(device)
        assert not choice._works(device)
    choice._works.cache_clear()
    (record,) = caplog.records
    assert "a launch for every column" in record.message
