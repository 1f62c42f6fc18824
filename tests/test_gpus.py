"""What a CPU can tell of GPUs: how often their queue would run empty, and what is free on them."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import pruners
from pruners.calibrate import InputNorm, Moments
from pruners.run.inputs import whole_products
from pruners.run.stream import _fitting, filled, span
from pruners.weights import memory

KIND = "llama grouped-query"
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")


class Reads(TorchDispatchMode):
    """Counts values that Python asks for, for which a GPU's queue would have to run empty; indices are on the CPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        asks = func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        self.count += asks and args[0].dtype != torch.int64
        return func(*args, **kwargs or {})


def reads(work) -> int:
    with Reads() as told:
        work()
    return told.count


def windows(count: int) -> torch.Tensor:
    return torch.randint(3, 90, (count, 16), generator=torch.Generator().manual_seed(count))


def test_gradients_are_not_read_one_by_one():
    def gather(count):
        return lambda: pruners.gather(tiny(KIND), pruners.GBLM(0.5), windows(count))

    assert reads(gather(12)) - reads(gather(4)) <= 2 * 8  # of a window the loss, and what transformers looks at


@pytest.mark.parametrize("method", [pruners.Wanda(0.5), pruners.SparseGPT(0.5), pruners.SparseGPT(pattern="2:4")])
def test_of_a_window_only_what_blocks_are_called_with_is_read(method):
    def prune(count):
        return lambda: pruners.prune(tiny(KIND), method, windows(count), batch_size=2)

    assert reads(prune(12)) - reads(prune(4)) <= 5 * 8  # positions, rotary tables; what transformers looks at


@pytest.mark.parametrize("before", ["high", "medium"])
def test_float32_is_not_shortened_whatever_was_set(before):
    told = []

    class Asks(pruners.Wanda):
        def score(self, *args):
            told.append(torch.get_float32_matmul_precision())
            return super().score(*args)

    torch.set_float32_matmul_precision(before)
    try:
        pruners.prune(tiny(KIND), Asks(0.5), windows(2))
        assert torch.get_float32_matmul_precision() == before
        with pytest.raises(ZeroDivisionError), whole_products():
            raise ZeroDivisionError
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(told) == {"highest"}


@pytest.mark.parametrize("asked", ["tf32", "ieee"])
def test_what_was_set_of_one_backend_alone_stays(asked):
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [backend.fp32_precision for backend in backends]
    try:
        backends[0].fp32_precision = asked
        told = [backend.fp32_precision for backend in backends]
        with whole_products():
            assert backends[0].fp32_precision == "ieee"
        assert [backend.fp32_precision for backend in backends] == told
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def test_short_windows_go_by_as_many_tokens_as_long_ones():
    assert [filled(8, length) for length in (2048, 4096, 1024, 128, 3000)] == [8, 8, 16, 128, 8]


@pytest.mark.parametrize(("states", "fit"), [(1, 6), (3, 4)])
def test_windows_fit_beside_the_hidden_states_of_all(states, fit, monkeypatch):
    model = tiny(KIND).to("meta")
    window = 4 * 16 * 4 * 64  # bytes that 16 tokens take within a block, whose widest matrix has 64 columns
    whole = 2 * 6 * window + 8 * 4 * 16 * 48 + 4 * model.num_parameters()
    monkeypatch.setattr(memory, "total_bytes", lambda device: whole)
    assert _fitting(model, windows(8), states) == fit


def test_rows_one_after_the_other_are_a_slice():
    numbers = torch.arange(10)
    assert span(numbers[3:7]) == slice(3, 7)
    assert span(numbers[9:]) == slice(9, 10)
    round_the_end = torch.tensor([8, 9, 0, 1])
    assert torch.equal(numbers[span(round_the_end)], round_the_end)


def test_what_the_allocator_keeps_of_freed_tensors_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 80))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 70)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 40)
    assert memory.free_bytes("cuda:0") == 35


@gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", [InputNorm, Moments])
def test_statistics_are_those_of_a_cpu(kind, dtype):
    x = torch.randn(4, 32, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    here, there = kind(48, torch.device("cpu")), kind(48, torch.device("cuda"))
    for batch in x.split(2):
        here.add(batch)
        there.add(batch.cuda())
    for name in ("norm",) if kind is InputNorm else ("mean", "variance", "mean_square", "released_fluctuation"):
        torch.testing.assert_close(getattr(there, name).cpu(), getattr(here, name), rtol=1e-5, atol=1e-6)
