"""Commands that load no model start without the libraries that take seconds to load."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "accelerate", "peft")
LIST = "from experiments.__main__ import main; main(['list'])"
SHOW = "from experiments.__main__ import main; main(['show', 'embedded.demo'])"
STATUS = "from slurm.__main__ import main; main(['status', 'embedded.demo'])"
OLD_PANDAS = int(version("pandas").partition(".")[0]) < 3  # which loads matplotlib to write LaTeX
OF_TABLE = ("scipy.stats",) if OLD_PANDAS else ("matplotlib", "scipy.stats")
RUN = "from experiments.__main__ import main; main(['run', 'embedded.flap', '--results', RESULTS])"  # all are finished
TABLE = "from analysis.__main__ import main; main(['table', 'embedded.flap', '--results', RESULTS])"


@pytest.mark.parametrize(
    ("code", "also"),
    [
        ("import pruners", ("pandas", "matplotlib", "scipy")),
        ("import analysis", ("pandas", "matplotlib", "scipy")),
        (LIST, ("pandas", "matplotlib", "scipy.stats")),
        (SHOW, ("pandas", "matplotlib", "scipy.stats")),
        (STATUS, ("pandas", "matplotlib", "scipy.stats")),
        (RUN, ("pandas", "matplotlib", "scipy.stats")),
        (TABLE, OF_TABLE),
    ],
    ids=["pruners", "analysis", "list", "show", "status", "run", "table"],
)
def test_nothing_heavy_is_loaded(code, also, tmp_path):
    shutil.copytree(ROOT / "results/runs/embedded.flap", tmp_path / "runs/embedded.flap")
    check = f"import sys; print([name for name in {(*HEAVY, *also)} if name in sys.modules], file=sys.stderr)"
    told = subprocess.run(
        [sys.executable, "-c", f"RESULTS = {str(tmp_path)!r}\n{code}\n{check}"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    assert told.stderr.splitlines()[-1] == "[]", told.stderr
