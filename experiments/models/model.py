"""One model of the catalogue: what is known of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Model:
    """One model: where it comes from and what is known of it.

    With a `base`, the name of another model, the weights are a difference that is added to that one's.
    `revision` is the Hub commit; None stands for `main`, whose commit `models.commit` tells.
    `parameters` is counted on the meta device from the public
    configuration, tied weights once; `blocks` are its decoder blocks, `heads` the query heads of each, `positions` the
    tokens it takes.  `marks`: whether sequences need marks between prompt and answer, as
    ChatGLM's.  `dense` maps a protocol key to the published perplexity of the unpruned model; a careful run lands
    within the relative `tolerance` of it.  The first key is the one to check where a cell measures none of them.
    """

    name: str
    hub: str | None = None
    revision: str | None = None
    parameters: int | None = None
    positions: int | None = None
    licence: str = ""
    dtype: str = "float16"
    dense: dict[str, float] = field(default_factory=dict, hash=False)
    tolerance: float = 0.01
    note: str = ""
    package: str | None = None
    folder: Path | None = None
    blocks: int | None = None
    heads: int | None = None
    marks: bool = False
    base: str | None = None
