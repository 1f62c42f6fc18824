"""Which declared cell a record belongs to, whatever machine made it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments.models.catalogue import CATALOGUE, halves, is_hub_id
from experiments.spec import Run
from experiments.store.described import digest


def stable_key(spec: dict[str, Any]) -> str:
    """What a spec asks for, the model by its name alone: its exact identity only its own machine knows.

    A folder that is called like a model of the catalogue, and was not said to be it, is another model.
    """
    model = spec["model"]
    name = model["name"] if "hub" in model else Path(model["name"]).name
    namesake = name in CATALOGUE and "fingerprint" in model and "catalogue" not in model
    return digest({**spec, "model": f"folder {name}" if namesake else name})


def run_key(run: Run) -> str:
    """The `stable_key` of what a run will be recorded as."""
    both = halves(run.model)
    of_hub = is_hub_id(both[1] if both else run.model)
    known = {} if run.is_of_catalogue else {"hub": ""} if of_hub else {"fingerprint": ""}
    return stable_key(run.spec(known))
