"""CONTRIBUTING.md's recipes are all it takes: they are carried out in a copy, and what they make is run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_table as small

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pruners", "eval", "experiments", "analysis", "slurm")
BLOCK = re.compile(r"```python\n# (\S+), (new|at the end|(?:after|before): [^\n]*)\n(.*?)```", re.DOTALL)

COMMANDS = """
import ast, importlib, sys
for package, *words in ast.literal_eval(sys.argv[1]):
    if status := importlib.import_module(package + ".__main__").main(words):
        sys.exit(status)
"""  # of one process, which imports torch once


def carry_out(where: Path, how: str, text: str) -> None:
    """Put a block's text where its first line says; the line that it names must be there."""
    if how == "new":
        assert not where.exists()
        where.write_text(text, encoding="utf-8")
        return
    lines = where.read_text(encoding="utf-8").splitlines(keepends=True)
    if how == "at the end":
        where.write_text("".join([*lines, "\n\n", text]), encoding="utf-8")
        return
    side, _, line = how.partition(": ")
    place = lines.index(f"{line}\n") + (side == "after")
    where.write_text("".join([*lines[:place], text, *lines[place:]]), encoding="utf-8")


@pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")
def test_what_the_recipes_say_is_all_it_takes(tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    blocks = BLOCK.findall((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    assert len({file for file, *_ in blocks}) == 10
    for file, how, text in blocks:
        carry_out(tmp_path / file, how, text)
    mine = tmp_path / "experiments/papers/mine.py"
    text = mine.read_text()
    for old, new in (  # a model, windows and texts that take a second, and what the other recipes made
        ("count=128, length=2048", "count=4, length=32"),
        ('Perplexity("wikitext2/test", window=2048),', 'Perplexity("ptb/test", window=64, limit=4), Zeros()'),
        ("llama-7b", str(small.MODEL)),
        ("Table, Windows", "Table, Windows, Zeros"),
        ("import Magnitude, Wanda", "import RIA, Magnitude, Wanda"),
        ("Wanda(sparsity=0.5))", "Wanda(sparsity=0.5), RIA(sparsity=0.5))"),
    ):
        assert old in text
        text = text.replace(old, new)
    mine.write_text(text)
    results, data = tmp_path / "results", small.data(tmp_path / "data")
    commands = (
        ("experiments", "run", "mine.first", "--data-dir", str(data), "--results", str(results)),
        ("analysis", "table", "mine.first", "--results", str(results)),
        ("analysis", "figure", "mine.first", "--kind", "zeros", "--results", str(results)),
    )
    told = subprocess.run(
        [sys.executable, "-c", COMMANDS, repr(commands)],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert re.search(r"\| RIA +\| 50 % +\|.* 0\.500", told.stdout), told.stdout
    assert "share of zeros" in told.stdout
    assert (results / "mine.first.zeros.svg").is_file()
