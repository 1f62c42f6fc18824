"""Tables on the embedded SmolLM2-135M: no hub, two CPU cores.

python -m experiments run embedded.demo       about 6 min on two cores
"""

from __future__ import annotations

import pruners
from experiments.spec import Efficiency, Generation, Perplexity, Run, Table, Windows, ZeroShot

MODEL = "smollm2-135m"
WINDOWS = Windows("embedded/c4", count=16, length=256, sampling="first")
PPL = Perplexity("embedded/wiki", window=512, limit=16)
COST = Efficiency(new_tokens=4, repetitions=3)
# A few documents of the tasks with short ones: enough to see a model break, not to rank two that work.
TASKS = ZeroShot(
    "short", (("piqa", "acc"), ("winogrande", "acc"), ("arc_easy", "acc"), ("openbookqa", "acc_norm")),
    limit=16, detail=False,
)  # fmt: skip

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
    run=lambda method, model: Run(model, method, WINDOWS, (PPL, COST, TASKS)),
)

generation = Table(
    name="embedded.generation",
    title="What pruned models write",
    rows=(None, pruners.Magnitude(sparsity=0.5), pruners.Wanda(sparsity=0.5), pruners.SparseGPT(sparsity=0.5)),
    columns=((MODEL,),),
    run=lambda method, model: Run(model, method, WINDOWS, (Generation(),)),
)
