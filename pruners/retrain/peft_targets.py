"""Tells peft which projections adapters go to by default in the configurations that this project adds."""

from __future__ import annotations

from collections.abc import Mapping
from types import ModuleType

import wrapt

TABLES = "TRANSFORMERS_MODELS_TO_"  # peft's tables of model types begin with this, one a kind of adapter


def register(dense: Mapping[str, str]) -> None:
    """By pruned model type its dense one, which it follows in every table; done when peft is imported."""

    def extend(constants: ModuleType) -> None:
        for name, table in vars(constants).items():
            if name.startswith(TABLES) and isinstance(table, dict):
                table.update({pruned: table[kind] for pruned, kind in dense.items() if kind in table})

    wrapt.register_post_import_hook(extend, "peft.utils.constants")
