"""Tables on the embedded SmolLM2-135M: no hub, two CPU cores.

python -m experiments run embedded.demo       about 6 min on two cores
"""

from __future__ import annotations

import pruners
from experiments.spec import Perplexity, Run, Table, Windows

MODEL = "smollm2-135m"
WINDOWS = Windows("embedded/c4", count=16, length=256, sampling="first")
PPL = Perplexity("embedded/wiki", window=512, limit=16)

demo = Table(
    name="embedded.demo",
    title="Unstructured pruning without retraining",
    rows=(
        None,
        pruners.Magnitude(sparsity=0.5),
        pruners.Wanda(sparsity=0.5),
        pruners.SparseGPT(sparsity=0.5),
        pruners.GBLM(sparsity=0.5, norm="l1"),
        pruners.GBLM(sparsity=0.5, norm="l2"),
        pruners.Magnitude(pattern="2:4"),
        pruners.Wanda(pattern="2:4"),
        pruners.SparseGPT(pattern="2:4"),
        pruners.GBLM(pattern="2:4", norm="l1"),
    ),
    columns=((MODEL,),),
    run=lambda method, model: Run(model, method, WINDOWS, (PPL,)),
)
