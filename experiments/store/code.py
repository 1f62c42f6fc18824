"""Which code makes a number: digests of the source that a method, a recovery and a measure are made of.

A digest covers the module of a class and of its bases, `pruners.prune`, and every module of `pruners` and `eval` that
these import, directly or through others (`modules`), committed, changed or new: as the files stand on disk when they
are first asked for, of cells that are to run when the first of them begins (`load`).  A method's digest says nothing of
other methods.  Of a class that is none of ours, a method's or one that stands in a field of a method or of a recovery,
it covers every file that its own imports, too (`own_files`).  Not covered: what `experiments` does around them (texts
and windows stand in a key by their tokens) and installed packages, whose versions a record keeps.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from experiments import measures, provenance, rates
from experiments.recovery import Retraining
from experiments.spec import Run
from experiments.store import modules, own_files

DRIVER = "pruners"  # its `prune` and `gather` call every method
RETRAINING = ("pruners.retrain.finetune", "pruners.retrain.held_out")
DIGITS = 16
LIBRARIES = ("torch", "transformers")  # what our code runs on


def of(run: Run) -> dict[str, Any]:
    """Of everything that makes the numbers of this run, for its record."""
    return {
        "method": method(run.method),
        "recovery": recovery(run.recovery),
        "measures": {what.key: measure(what) for what in run.measures},
        **_file(run.method, run.recovery),
        **({"quantised": _modules(["eval.int8"])} if run.quantised else {}),
    }


def _file(*things: Any) -> dict[str, Any]:
    """Name and SHA-256 of every file of one's own that a method or a recovery is made of."""
    found: dict[str, Path] = {}
    for kind in (kind for thing in things for kind in _own_kinds(thing)):
        for name, path in own_files.imported_by(kind).items():
            folders = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
            found["/".join([*folders, path.name])] = path
        if (declaring := own_files.declaring(kind)) is not None:
            found[declaring.name] = declaring
    digests = {name: hashlib.sha256(own_files.bytes_of(path)).hexdigest() for name, path in found.items()}
    return {"file": digests} if digests else {}


def made_by(recorded: dict[str, Any], run: Run) -> str:
    """By which code a record was made: `same`, `other`, or `unknown` where it does not say."""
    return "unknown" if not recorded else "same" if recorded == of(run) else "other"


def load(runs: Iterable[Run]) -> None:
    """Import and read now what these runs and the choices of their learning rates are made of, and which commit this
    is, so that what is edited while they run is neither run nor recorded as what ran."""
    names: set[str] = set()
    every = (one for run in runs for one in ((run, rates.choice(run)) if run.tuning else (run,)))
    for run in {(*kinds(run), run.quantised): run for run in every}.values():
        of(run)
        parts = (_of_method(run.method), _of_recovery(run.recovery), *map(_of_measure, run.measures))
        names |= {name for part in parts for name in part if modules.package(name) in modules.PACKAGES}
    for name in sorted(names):
        with suppress(ImportError):  # of what a device or a package that is not here would need
            import_module(name)
    provenance.commit()


def method(thing: Any) -> str | None:
    """Of a pruning method with the statistics that it gathers; None of none."""
    return None if thing is None else _digest(_of_method(thing))


def _of_method(thing: Any) -> dict[str, str]:
    return {} if thing is None else {**_classes(type(thing)), **_own(thing), DRIVER: modules.source(DRIVER)}


def recovery(thing: Any) -> str | None:
    return None if thing is None else _digest(_of_recovery(thing))


def _of_recovery(thing: Any) -> dict[str, str]:
    if thing is None:
        return {}
    ours = _sources(RETRAINING) if isinstance(thing, Retraining) else _classes(type(thing))
    return {**ours, **_own(thing)}


def measure(what: Any) -> str:
    return _digest(_of_measure(what))


def _of_measure(what: Any) -> dict[str, str]:
    return _sources(measures.code_of(what))


def packages() -> dict[str, str]:
    """Versions of the libraries that our code runs on: a cache of another version is not believed."""
    return {name: provenance.version(name) for name in LIBRARIES}


def _modules(names: Iterable[str]) -> str:
    return _digest(_sources(names))


def _sources(names: Iterable[str]) -> dict[str, str]:
    """By name the sources of modules of ours and of all that they import."""
    return {name: modules.source(name) for name in modules.reached(names)}


def _own(thing: Any) -> dict[str, str]:
    return {name: text for kind in _own_kinds(thing) for name, text in _classes(kind).items()}


def _own_kinds(thing: Any) -> Iterator[type[Any]]:
    """The classes that are none of ours, of a thing and of the dataclasses in its fields."""
    return (kind for kind in kinds(thing) if modules.package(kind.__module__) not in modules.PACKAGES + modules.AROUND)


def kinds(thing: Any) -> Iterator[type[Any]]:
    """The classes of a dataclass and of those in its fields."""
    if is_dataclass(thing) and not isinstance(thing, type):
        yield type(thing)
        parts: Iterable[Any] = [getattr(thing, field.name) for field in fields(thing)]
    else:
        parts = thing.values() if isinstance(thing, Mapping) else thing if isinstance(thing, list | tuple) else ()
    for part in parts:
        yield from kinds(part)


def _classes(kind: type[Any]) -> dict[str, str]:
    """By module the source of a class, its bases and what they import."""
    found: dict[str, str] = {}
    for part in kind.__mro__:
        name = part.__module__
        if modules.package(name) in modules.PACKAGES:
            found |= _sources([name])
        elif modules.package(name) not in sys.stdlib_module_names or name == "__main__":
            files = {name: own_files.read(path) for name, path in own_files.imported_by(part, kind).items()}
            texts = {name: own_files.text_of(part), **files}
            for module, text in texts.items():
                found |= {module: modules.plain(text), **_sources(modules.imported(text, module))}
    return found


def _digest(sources: dict[str, str]) -> str:
    text = "\0".join(f"{name}\0{source}" for name, source in sorted(sources.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]
