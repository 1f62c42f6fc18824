"""Digests of code: they change with what makes a number, in uncommitted and new files too, and with nothing else."""

from __future__ import annotations

import hashlib
import importlib
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import small_table as small

import pruners
from eval import perplexity as module_of_perplexity
from experiments import cells, measures, recovery
from experiments.batch import run_table
from experiments.measures.asked import MaskSample, OpenAnswers
from experiments.settings import Settings
from experiments.spec import Efficiency, Generation, MaskPatterns, Perplexity, Run, Table, ZeroShot
from experiments.store import code, modules, own_files, records
from pruners.calibrate import Moments
from pruners.retrain import Reconstruction, Trainable
from pruners.unstructured import Unstructured

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    **{name: kind() for name, kind in pruners.METHODS.items() if issubclass(kind, Unstructured)},
    **{name: kind(ratio=0.2) for name, kind in pruners.METHODS.items() if not issubclass(kind, Unstructured)},
}
MEASURES = (
    Perplexity("ptb/test", 64, 4), ZeroShot(None, (("piqa", "acc"),)), Efficiency(), Generation(), MaskPatterns(),
    OpenAnswers(), MaskSample(),
)  # fmt: skip
RECOVERIES = {"retraining": recovery.POST_TRAINING, "reconstruction": Reconstruction(Trainable(norms=True))}
needs_model = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")


@pytest.fixture
def tree(tmp_path, monkeypatch) -> Path:
    """A copy of the code that a test may edit; digests are taken of it."""
    for package in modules.PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / "tree" / package, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(modules, "folder", lambda package: tmp_path / "tree" / package)
    forget()
    yield tmp_path / "tree"
    forget()


def forget() -> None:
    """As another process, which has read nothing yet."""
    for remembered in (modules._imports, modules._path, modules._text, modules.source, own_files.bytes_of):
        remembered.cache_clear()


def digests() -> dict[str, str | None]:
    forget()
    return {
        **{name: code.method(method) for name, method in METHODS.items()},
        **{name: code.recovery(thing) for name, thing in RECOVERIES.items()},
        **{type(what).__name__: code.measure(what) for what in MEASURES},
    }


def edit(path: Path, old: str, new: str) -> set[str]:
    """What an edit moves, by name."""
    before = digests()
    small.edit(path, old, new)
    after = digests()
    return {name for name in before if before[name] != after[name]}


@pytest.mark.parametrize(
    ("file", "old", "new", "moved"),
    [
        ("pruners/flap.py", "return ", "return -1 * ", {"flap"}),
        ("pruners/wanda.py", "* x.norm", "/ x.norm", {"wanda"}),
        ("pruners/gblm.py", "gradient.abs_()", "gradient", {"gblm", "gradient"}),
        ("pruners/magnitude.py", ".abs()", "", {"magnitude", "random", "wanda"}),
        ("pruners/llm_pruner.py", "return ", "return 1 + ", {"llm_pruner"}),
        ("pruners/retrain/fused.py", "import torch\n", "import torch as t\n", {"retraining", "reconstruction"}),
        ("pruners/retrain/held_out.py", "return ", "return 1 + ", {"retraining"}),
        ("pruners/retrain/rates.py", "return ", "return 1 + ", set()),
        ("eval/perplexity.py", ".mean(1)", ".sum(1)", {"Perplexity"}),
        ("eval/latency.py", "return ", "return 1 + ", {"Efficiency"}),
        ("eval/answers.py", "return ", "return 1 + ", {"ZeroShot"}),
        ("pruners/calibrate.py", "return ", "return 1 + ", {*METHODS, *RECOVERIES}),
        ("pruners/__init__.py", "torch.no_grad():", "torch.enable_grad():", set(METHODS)),
        ("pruners/__init__.py", "METHODS: dict", "MORE = 1\nMETHODS: dict", set()),
    ],
)
def test_an_edit_moves_what_is_made_of_it_and_nothing_else(tree, file, old, new, moved):
    assert edit(tree / file, old, new) == moved


def test_a_package_that_forgets_a_module_would_be_noticed(tree):
    reached = {name for what in MEASURES for name in modules.reached(measures.code_of(what))}
    assert {name for name in reached if name.startswith("eval.")} == {
        ".".join(path.relative_to(tree).with_suffix("").parts)
        for path in (tree / "eval").rglob("*.py")
        if path.stem != "__init__"
    }
    of_methods = {name for method in METHODS.values() for name in code._classes(type(method))}
    rooms = ("", "interface", "kernels", "run", "weights")
    expected = {
        ".".join(filter(None, ("pruners", room, path.stem)))
        for room in rooms
        for path in (tree / "pruners" / room).glob("*.py")
    }
    around = (
        "__init__",
        "__main__",
        "checkpoint",
        "interface.__init__",
        "interface.contract",
        "interface.described",
        "interface.plugin",
        "kernels.__init__",
        "run.__init__",
        "weights.__init__",
        "weights.deltas",
        "weights.opening",
        "weights.sweep",
    )
    assert expected - of_methods == {f"pruners.{name}" for name in around}


def test_comments_docstrings_and_blank_lines_do_not_count(tree):
    assert edit(tree / "pruners/wanda.py", "return weight", "# why\n\n    return weight") == set()
    assert edit(tree / "pruners/wanda.py", '"""Wanda: ', '"""Wanda was ') == set()
    assert edit(tree / "pruners/wanda.py", "x.norm", '(x.norm + len("#"))') == {"wanda"}
    assert edit(tree / "pruners/wanda.py", '"#"', '"##"') == {"wanda"}


def test_a_new_file_counts_from_its_first_line(tree):
    (tree / "pruners/helper.py").write_text("FACTOR = 2\n")
    small.edit(tree / "pruners/wanda.py", "from pruners.lazy", "from pruners import helper\nfrom pruners.lazy")
    assert edit(tree / "pruners/helper.py", "2", "3") == {"wanda"}


@pytest.mark.parametrize(
    "line",
    ["import pruners.wanda", "import pruners\nX = pruners.Wanda", "from pruners import Wanda as W",
     "from pruners import *", "import pruners as p\nX = p.wanda.score"],
)  # fmt: skip
def test_a_method_elsewhere_is_followed_into_our_code(tree, tmp_path, line, monkeypatch):
    path = tmp_path / f"{tmp_path.name}.py"  # a name that no other test has imported
    path.write_text(f"{line}\nfrom dataclasses import dataclass\n@dataclass\nclass Mine: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module(path.stem).Mine()
    before = code.method(mine)
    assert code.method(mine) == before
    small.edit(tree / "pruners/wanda.py", "* x.norm", "/ x.norm")
    forget()
    moved = code.method(mine)
    small.edit(path, "...", "pass")
    assert code.method(mine) == moved  # of what this process has imported
    forget()
    assert len({before, moved, code.method(mine)}) == 3


OWN = "from dataclasses import dataclass\nfrom pruners.retrain import MaskLoRA\n{line}\n" + "\n".join(
    [
        "@dataclass(frozen=True)\nclass Mine(MaskLoRA):",
        "    part: object = None",
        "    def start(self, a, b, name, seed):",
        "        from {name}_inside import SIGN",
    ]
)


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Files of one's own, and the class that the first of them declares; a call makes them."""

    def made(line: str = "") -> tuple[type, str]:
        name = f"of_{tmp_path.name}"  # that no other test has imported
        for part in ("inside", "helper", "behind", "unused"):
            (tmp_path / f"{name}_{part}.py").write_text("SIGN = 1\n")
        (tmp_path / f"{name}_between.py").write_text(f"import sys\nimport numpy\nimport {name}_behind\n")
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("from .core import SIGN\n")
        (tmp_path / name / "core.py").write_text("from . import part\nSIGN = 1\n")
        (tmp_path / name / "part.py").write_text("SIGN = 1\n")
        (tmp_path / f"{name}_class.py").write_text(OWN.format(line=line.format(name=name), name=name))
        monkeypatch.syspath_prepend(tmp_path)
        return importlib.import_module(f"{name}_class").Mine, name

    yield made
    forget()


@pytest.mark.parametrize(
    ("line", "file"),
    [
        ("", "{name}_inside.py"),
        ("import {name}_helper", "{name}_helper.py"),
        ("from {name}_helper import SIGN", "{name}_helper.py"),
        ("import {name}_between as b", "{name}_behind.py"),
        ("import {name}.part", "{name}/__init__.py"),
        ("from {name} import SIGN", "{name}/part.py"),
        ("from {name}.core import *", "{name}/part.py"),
    ],
)
def test_what_a_class_of_one_s_own_imports_is_its_code(own, tmp_path, line, file):
    kind, name = own(line)
    path = tmp_path / file.format(name=name)
    adapted = Trainable(adapters=kind())
    run = Run("m", kind(), None, ())
    things = (
        lambda: code.method(kind()),
        lambda: code.method(MoreOf(part=kind())),
        lambda: code.recovery(Reconstruction(adapted)),
        lambda: code.recovery(replace(recovery.POST_TRAINING, trainable=adapted)),
        lambda: code._file(run.method),
        lambda: code._file(None, replace(recovery.POST_TRAINING, trainable=adapted)),
    )
    before = [thing() for thing in things]
    small.edit(path, path.read_text(), path.read_text() + "SIGN = -1\n")
    assert [thing() for thing in things] == before  # of what this process has imported
    forget()
    assert all(thing() != old for thing, old in zip(things, before, strict=True))
    files = code.of(run)["file"]
    assert files[file.format(name=name)] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"{name}_class.py" in files
    assert f"{name}_unused.py" not in files


def test_a_helper_that_is_no_python_counts_by_its_bytes(own, tmp_path):
    kind, name = own("try:\n    import {name}_old\nexcept (ImportError, SyntaxError):\n    pass")
    (tmp_path / f"{name}_old.py").write_text('print "1"\n')
    forget()
    importlib.invalidate_caches()
    before = code.method(kind())
    (tmp_path / f"{name}_old.py").write_text('print "2"\n')
    forget()
    assert code.method(kind()) != before


@dataclass(frozen=True)
class MoreOf(Unstructured):
    part: object = None


def test_what_python_and_installed_packages_hold_is_no_code_of_one_s_own(own):
    lines = (
        "import json, torch.nn, pruners.wanda, experiments.spec",
        "import {name}_between",
        "if 0: import {name}_no",
    )
    kind, name = own("\n".join(lines))
    assert set(own_files.imported_by(kind)) == {f"{name}_{part}" for part in ("between", "behind", "inside")}


def test_a_package_that_is_installed_is_followed_for_its_own_classes_alone(own, tmp_path, monkeypatch):
    kind, name = own("import {name}_helper")
    monkeypatch.setattr(own_files, "INSTALLED", {tmp_path.name})
    assert not own_files.imported_by(kind)
    module = importlib.import_module(f"{name}.core")
    module.Mine = type("Mine", (kind,), {"__module__": module.__name__})
    assert set(own_files.imported_by(module.Mine)) == {name, f"{name}.part"}


def test_recoveries_of_our_classes_alone_have_the_digests_of_our_modules():
    assert code.recovery(recovery.POST_TRAINING) == code._modules(code.RETRAINING)
    assert code.recovery(RECOVERIES["reconstruction"]) == code._digest(code._classes(Reconstruction))
    assert code._file(METHODS["wanda"], recovery.POST_TRAINING) == {}


def test_a_class_without_source_shares_nothing():
    made = type("Made", (), {"__module__": "nowhere"})
    assert code.method(made()) != code.method(made())


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return small.data(tmp_path_factory.mktemp("data"))


def value(root: Path, data: Path, table: Table) -> float:
    """The perplexity of its only cell, made now."""
    shutil.rmtree(root / "runs", ignore_errors=True)
    outcome = run_table(table.name, cells.cells(table.runs()), Settings(root, data_dir=data))
    assert len(outcome.done) == 1
    (record,) = records.load(root, table.name).values()
    return record.measures[small.PPL.key]["perplexity"]


@needs_model
def test_statistics_do_not_outlive_the_formula_that_made_them(tree, tmp_path, data, monkeypatch):
    table = small.table((pruners.Flap(ratio=0.3),))
    before = value(tmp_path / "r", data, table)
    variance = Moments.variance.fget
    monkeypatch.setattr(Moments, "variance", property(lambda self: -variance(self)))
    assert value(tmp_path / "r", data, table) == before  # the file says nothing of it: the cache is believed
    small.edit(tree / "pruners/calibrate.py", "return ", "return - ")
    forget()
    after = value(tmp_path / "r", data, table)
    assert after != before
    assert after == value(tmp_path / "fresh", data, table)


@needs_model
def test_pruned_weights_do_not_outlive_the_formula_that_made_them(tree, tmp_path, data, monkeypatch):
    before = value(tmp_path / "r", data, small.retrained())
    monkeypatch.setattr(pruners.Wanda, "score", lambda self, name, weight, x, dense: -weight.abs() * x.norm)
    assert value(tmp_path / "r", data, small.retrained()) == before
    small.edit(tree / "pruners/wanda.py", "* x.norm", "* -x.norm")
    forget()
    after = value(tmp_path / "r", data, small.retrained())
    assert after != before
    assert after == value(tmp_path / "fresh", data, small.retrained())


@needs_model
def test_dense_values_do_not_outlive_the_measure_that_made_them(tree, tmp_path, data, monkeypatch):
    before = value(tmp_path, data, small.table((None,)))
    nll = module_of_perplexity._nll
    monkeypatch.setattr(module_of_perplexity, "_nll", lambda *arguments: 2 * nll(*arguments))
    assert value(tmp_path, data, small.table((None,))) == before
    small.edit(tree / "eval/perplexity.py", ".mean(1)", ".mean(1) * 2")
    forget()
    assert value(tmp_path, data, small.table((None,))) == pytest.approx(before**2)


@needs_model
def test_a_record_says_of_which_code_it_is(tmp_path, data):
    table = small.table((pruners.Wanda(sparsity=0.5),))
    value(tmp_path, data, table)
    (record,) = records.load(tmp_path, table.name).values()
    (run,) = table.runs()
    assert record.code == {"method": code.method(run.method), "recovery": None, "measures": {
        small.PPL.key: code.measure(small.PPL)}}  # fmt: skip
    assert code.made_by(record.code, run) == "same"
    assert code.made_by({**record.code, "method": "0" * 16}, run) == "other"
    assert code.made_by({}, run) == "unknown"


def test_unfinished_work_of_other_code_is_left_alone(tree, tmp_path):
    from experiments import resume

    run, settings = Run(str(small.MODEL), pruners.Magnitude(sparsity=0.5), None, (small.PPL,)), Settings(tmp_path)
    places = []
    for file, old, new in (
        ("pruners/flap.py", "return ", "return -1 * "),
        ("pruners/magnitude.py", ".abs()", ""),
        ("eval/perplexity.py", ".mean(1)", ".sum(1)"),
    ):
        places.append((resume.begun(run, "id", "tiny", settings), resume.answers(run, "id", "tiny", settings)))
        small.edit(tree / file, old, new)
        forget()
    places.append((resume.begun(run, "id", "tiny", settings), resume.answers(run, "id", "tiny", settings)))
    pruned, answers = zip(*places, strict=True)
    assert [pruned[0] == place for place in pruned] == [True, True, False, False]
    assert [answers[0] == place for place in answers] == [True, True, True, False]
