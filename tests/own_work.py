"""What tests of one's own models, methods and tables share: a method and a table as files, and one short command."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import small_table as small

from experiments.__main__ import main

needs_model = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")
METHOD = '''"""RIA."""
from dataclasses import dataclass

from pruners.calibrate import InputNorm
from pruners.unstructured import Unstructured


@dataclass(frozen=True)
class RIA(Unstructured):
    """A weight's share of its row and column, times the root of its input's norm."""

    power: float = 0.5

    NEEDS = InputNorm

    def score(self, name, weight, x, dense):
        size = weight.float().abs()
        return (size / size.sum(1, keepdim=True) + size / size.sum(0)) * x.norm**self.power
'''
TABLE = """
from experiments.spec import Perplexity, Run, Table, Windows
from pruners import Magnitude, Wanda


def cell(method, model, sparsity):
    windows = Windows("c4/train", 2, 32)
    return Run(model, method and method(sparsity=sparsity), windows, (Perplexity("ptb/test", 64, 4),))


mine = Table("mine", "Mine", (None, Magnitude, Wanda), tuple(({model!r}, share) for share in (0.3, 0.5)), cell)
"""
SHORT = "--calibration c4/train --nsamples 2 --seqlen 32 --measure ptb/test@64[:4]"


@pytest.fixture
def ria(tmp_path) -> Path:
    path = tmp_path / "ria.py"
    path.write_text(METHOD)
    return path


@pytest.fixture
def mine(tmp_path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(TABLE.replace("{model!r}", repr(str(small.MODEL))))
    return path


@pytest.fixture
def where(tmp_path) -> list[str]:
    return ["--results", str(tmp_path / "results"), "--data-dir", str(small.data(tmp_path / "data"))]


def prune(words: str, where: list[str]) -> int:
    return main(["prune", str(small.MODEL), *shlex.split(words), *where])
