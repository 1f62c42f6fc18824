"""Tables on the embedded SmolLM2-135M: no hub, two CPU cores.

python -m experiments run embedded.demo       about 6 min on two cores
"""

from __future__ import annotations

from typing import Any

import pruners
from experiments.spec import Perplexity, Run, Table, Windows

MODEL = "smollm2-135m"
WINDOWS = Windows("embedded/c4", count=16, length=256, sampling="first")
PPL = Perplexity("embedded/wiki", window=512, limit=16)
SETTINGS: tuple[dict[str, Any], ...] = ({"sparsity": 0.5}, {"pattern": "2:4"})

demo = Table(
    name="embedded.demo",
    title="SmolLM2-135M-Instruct pruned without retraining",
    rows=(
        None,
        *(
            method(**setting)
            for setting in SETTINGS
            for method in (pruners.Magnitude, pruners.Wanda, pruners.SparseGPT, pruners.GBLM)
        ),
        pruners.GBLM(sparsity=0.5, norm="l2"),
    ),
    columns=((MODEL,),),
    run=lambda method, model: Run(model, method, WINDOWS, (PPL,)),
)
