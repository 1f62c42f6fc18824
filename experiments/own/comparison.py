"""Compares methods on your own models, at several settings and seeds: a table without a file.

python -m experiments compare MODEL... --methods wanda sparsegpt gblm --settings 0.5 2:4 --seeds 3
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pruners
from experiments.models import canonical, catalogue, lengths, own_dtype
from experiments.own import defaults, tables
from experiments.spec import Run, Table
from experiments.store import atomic
from pruners.interface.suggest import UsageError, unknown
from pruners.select import Pattern
from pruners.structured import Structured

FILE = '''"""Declared by `python -m experiments compare`; a table like any other."""

from experiments.own.comparison import comparison
{plugins}
table = comparison({arguments})
'''


def comparison(
    models: Sequence[str],
    methods: Sequence[str],
    settings: Sequence[str],
    seeds: int = 1,
    *,
    name: str = "compare",
    measures: Sequence[str] = (),
    tasks: Sequence[str] = (),
    limit: int | None = None,
    calibration: str | None = None,
    nsamples: int | None = None,
    seqlen: int | None = None,
    dtype: str | None = None,
) -> Table:
    """The dense model and every method by name, with its own hyperparameters, at every setting.

    A setting is the share removed, such as `0.5`, or a pattern, such as `2:4`, which structured methods do not have.
    `seeds` draws of the calibration text, from seed 0 on, are averaged.  `measures` are protocol keys of perplexities,
    `tasks` what `protocols.named` takes; what is left out is the default of `experiments prune`.
    """
    for method in methods:
        if method not in pruners.METHODS:
            raise UsageError(unknown("method", method, pruners.METHODS))
    for setting in settings:
        _setting(setting)
    how: dict[str, Any] = {"corpus": calibration, "count": nsamples, "length": seqlen}

    def cell(method: str | None, model: str, setting: str, seed: int) -> Run | None:
        made, windows = None, None
        if method is not None:
            if (made := _made(method, model, setting, seed)) is None:
                return None
            given = {part: value for part, value in how.items() if value}
            windows = replace(defaults.windows(method, model), **{**given, "seed": seed})
        return Run(model, made, windows, defaults.measures(model, measures, tasks, limit), dtype or own_dtype(model))

    return Table(
        name=name,
        title=f"{', '.join(methods)} at {', '.join(settings)}",
        rows=(None, *methods),
        columns=tuple(product(models, settings, range(seeds))),
        run=cell,
    )


def _setting(text: str) -> dict[str, Any]:
    """As the field of an unstructured method; UsageError for what is neither a share nor a pattern."""
    try:
        if ":" in text:
            Pattern.parse(text)
            return {"pattern": text}
        return {"sparsity": float(text)}
    except ValueError as error:
        raise UsageError(
            f"{text!r} is not a setting: a share removed such as 0.5, or a pattern such as 2:4."
        ) from error


def _made(method: str, model: str, setting: str, seed: int) -> Any:
    kind, how = pruners.METHODS[method], _setting(setting)
    own = {**defaults.hyperparameters(method, model), **defaults.seed(kind, seed)}
    if issubclass(kind, Structured):
        return kind(ratio=how["sparsity"], **own) if "sparsity" in how else None
    return kind(**how, **own)


def file(asked: argparse.Namespace) -> Path:
    """A file under the results folder that declares the comparison, for every other command to take.

    UsageError for a name that is no table's, for options that no method reads, and where something else has the file's
    name.
    """
    tables.check_name(asked.name, "of --name")
    names = ("methods", "settings", "seeds", "measures", "tasks", "limit", "calibration", "nsamples", "seqlen", "dtype")
    typed = tuple(map(canonical, asked.models))
    told: dict[str, Any] = {"models": tuple(map(catalogue.absolute, typed)), "name": asked.name}
    told |= {name: getattr(asked, name) for name in names if getattr(asked, name)}
    try:
        runs = comparison(**told).runs()  # before anything is written, whatever is wrong with it
    except ValueError as error:
        raise error if isinstance(error, UsageError) else UsageError(str(error)) from error
    unread = [f"--{name}" for name in ("calibration", "nsamples", "seqlen") if name in told]
    if unread and not any(run.calibrates for run in runs):
        raise UsageError(f"None of {', '.join(asked.methods)} uses calibration text; leave out {', '.join(unread)}.")
    lengths.check(*runs)
    files = [str(file.expanduser().resolve()) for file in asked.plugin]
    plugins = f"from pruners.interface.plugin import use\n\nuse({files!r})\n" if files else ""
    text, before = (_text(told | {"models": models}, plugins) for models in (told["models"], typed))
    path: Path = asked.results / f"{asked.name}.py"
    try:
        different = path.exists() and atomic.read(path) not in (text, before)  # of a version that took paths as typed
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} is no file that compare wrote or can read; choose another --name, or move it away."
        ) from error
    if different:
        raise UsageError(f"{path} declares a different comparison; choose another --name for this one.")
    atomic.write(path, text)
    return path


def _text(arguments: dict[str, Any], plugins: str) -> str:
    given = "".join(f"\n    {name}={value!r}," for name, value in arguments.items())
    return FILE.format(plugins=plugins, arguments=f"{given}\n")


def show(path: Path, asked: argparse.Namespace) -> int:
    """The table as Markdown, CSV and LaTeX, and its figure, by the analysis' own commands; the exit status."""
    where = [str(path), "--results", str(asked.results)]
    where += ["--data-dir", str(asked.data_dir)] if asked.data_dir else []
    for command in ("table", "figure"):
        if status := subprocess.run([sys.executable, "-m", "analysis", command, *where], check=False).returncode:
            return status
    return 0
