"""Methods and tables of one's own, as files."""

from __future__ import annotations

import json
import pydoc
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import small_table as small
import torch
from own_work import METHOD, SHORT, TABLE, needs_model, prune

import pruners
from analysis.__main__ import main as analysis
from experiments import cells
from experiments.__main__ import main
from experiments.own import options, tables
from experiments.spec import Perplexity, Run
from experiments.store import records
from pruners.__main__ import main as pruners_main
from pruners.interface import plugin
from pruners.interface.suggest import UsageError
from pruners.retrain import Reconstruction
from slurm.__main__ import main as slurm


@needs_model
def test_a_method_of_a_file_runs_like_any_other_and_its_record_holds_the_file(ria, where, tmp_path):
    asked = f"--plugin {ria} --method ria --sparsity 0.5 --power 1.0 {SHORT}"
    assert prune(asked, where) == 0
    (record,) = [r for r in records.load(tmp_path / "results", "adhoc").values() if r.spec["method"]]
    assert record.spec["method"] == {"name": "ria", "sparsity": 0.5, "pattern": None, "power": 1.0}
    assert list(record.code["file"]) == ["ria.py"]


def test_a_method_that_is_plugged_twice_is_one_and_two_of_one_name_are_refused(ria, tmp_path):
    plugin.use([ria, ria])
    assert pruners.METHODS["ria"].__name__ == "RIA"
    (tmp_path / "other").mkdir()
    (tmp_path / "other/ria.py").write_text(METHOD)
    with pytest.raises(UsageError, match="Two methods are called ria"):
        plugin.use([tmp_path / "other/ria.py"])
    (tmp_path / "wanda.py").write_text(METHOD.replace("RIA(", "Wanda("))
    with pytest.raises(UsageError, match="Two methods are called wanda"):
        plugin.use([tmp_path / "wanda.py"])


IMPORTED = """
from dataclasses import dataclass
import pruners

@dataclass(frozen=True)
class {name}(pruners.Magnitude):
    def score(self, name, weight, x, dense):
        return {sign}weight.abs()
"""


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ("m_one_score.Score", "m_two_score.Score", "m_one_score.Score and m_two_score.Score are called alike, so that"),
        ("pruners.Wanda", "m_own_wanda.Wanda", r"Wanda of .*m_own_wanda.py is called like the method wanda of"),
        ("m_one_score.Score", "m_own_wanda.Wanda", r"Wanda of .*m_own_wanda.py is called like the method wanda of"),
        ("m_one_score.Score", "m_one_score.Score", ""),
    ],
)
def test_imported_methods_of_one_name_are_refused(one, other, said, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("m_one_score.Score", "m_two_score.Score", "m_own_wanda.Wanda"):
        module, _, kind = name.partition(".")
        (tmp_path / f"{module}.py").write_text(IMPORTED.format(name=kind, sign="-" * (module != "m_one_score")))
    made = [pydoc.locate(name)(sparsity=0.5) for name in (one, other)]
    runs = [Run("smollm2-135m", method, None, (Perplexity("ptb/test", 64),)) for method in made]
    with pytest.raises(UsageError, match=said) if said else nullcontext():
        cells.cells(runs)


@pytest.mark.parametrize("swapped", [False, True])
def test_one_method_may_have_parts_whose_classes_are_called_alike(swapped):
    class A:
        @dataclass(frozen=True)
        class Power:
            n: int = 1

    class B:
        @dataclass(frozen=True)
        class Power:
            n: int = 1

    @dataclass(frozen=True)
    class Both(pruners.Magnitude):
        one: object = None
        other: object = None

        def score(self, name, weight, x, dense):
            return weight.abs()

    parts = (A.Power(), B.Power())
    methods = [Both(sparsity=0.5, one=one, other=other) for one, other in (parts, parts[::-1])]
    runs = [Run("smollm2-135m", method, None, (Perplexity("ptb/test", 64),)) for method in methods[: 1 + swapped]]
    with pytest.raises(UsageError, match=r"A\.Power and .*B\.Power are called alike") if swapped else nullcontext():
        cells.cells(runs)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import nowhere_at_all\n", r"line 1 \(import nowhere_at_all\): ModuleNotFoundError"),
        ("x = 1\ny = x +\n", r"line 2 \(y = x \+\): invalid syntax"),
        ("x = 1\n", "declares no method"),
        (METHOD.replace("@dataclass(frozen=True)\n", ""), "not a frozen dataclass"),
        (METHOD.replace("frozen=True", "frozen=False"), "cannot inherit non-frozen"),
        ("raise SystemExit(3)\n", "SystemExit: 3"),
        (
            METHOD.replace("def score", "def scores"),
            r"RIA in .* add a method `score\(self, name, weight, x, dense\)`",
        ),
    ],
)
def test_a_file_that_holds_no_method_says_why(text, said, tmp_path):
    path = tmp_path / "bad.py"
    path.write_text(text)
    with pytest.raises(UsageError, match=said):
        plugin.use([path])


@needs_model
def test_a_table_of_a_file_is_taken_by_every_command(mine, where, tmp_path, capsys):
    words = [str(mine), *where]
    assert main(["show", *words]) == 0
    assert "Wanda 50 %" in capsys.readouterr().out
    assert main(["run", *words, "--method", "dense", "magnitude"]) == 0
    assert f"python -m analysis table {mine}" in capsys.readouterr().err
    assert slurm(["submit", f"{mine}:mine", *where, "--executor", "debug"]) == 0
    assert "cells submitted: 2" in capsys.readouterr().err
    assert slurm(["submit", *words, "--executor", "local"]) == 0
    assert len(records.load(tmp_path / "results", "mine")) == 5
    assert slurm(["status", str(mine), *where[:2]]) == 0
    assert analysis(["table", str(mine), *where[:2]]) == 0
    assert "(`mine`)" in capsys.readouterr().out


@needs_model
def test_a_job_of_a_table_and_method_of_one_s_own_finds_both_in_its_own_process(ria, tmp_path, where, capsys):
    text = TABLE.replace("{model!r}", repr(str(small.MODEL))).replace("Wanda)", "METHODS['ria'])")
    path = tmp_path / "with_ria.py"
    path.write_text(text.replace("import Magnitude, Wanda", "import METHODS, Magnitude"))
    words = [str(path), "--plugin", str(ria), *where, "--method", "ria"]
    assert slurm(["submit", *words, "--executor", "local"]) == 0
    assert len(records.load(tmp_path / "results", "mine")) == 2


@pytest.mark.parametrize(
    ("text", "name", "said"),
    [
        ("x = 1\n", "", "declares no table"),
        (TABLE, ":nobody", "Unknown table in"),
        (TABLE + "other = Table('other', '', (), (), cell)\n", "", "declares 2 tables; choose one"),
        (TABLE.replace('"mine"', '"../up"'), "", "needs a name that can be a folder"),
        (TABLE.replace('"mine"', '"flap.perplexity"'), "", "like one of the papers' tables"),
    ],
)
def test_a_file_that_leaves_the_table_open_says_so(text, name, said, tmp_path):
    path = tmp_path / "tables.py"
    path.write_text(text.replace("{model!r}", "'llama-7b'"))
    with pytest.raises(UsageError, match=said):
        tables.find(f"{path}{name}")


def test_the_table_of_an_entry_point_has_a_name_that_can_be_a_folder(monkeypatch):
    table = replace(small.table(), name="../up")
    monkeypatch.setattr(tables.plugin, "loaded", lambda _: table)
    monkeypatch.setattr(tables.metadata, "entry_points", lambda group: [Namespace(name="theirs")])
    with pytest.raises(UsageError, match=r"'\.\./up' of the entry point theirs needs a name that can be a folder"):
        tables.find("theirs")


def test_a_file_that_is_not_there_is_said_to_be_absent(capsys):
    assert main(["show", "nowhere.py"]) == 2
    assert "nowhere.py is not a file" in capsys.readouterr().err


@needs_model
def test_models_of_a_table_s_cells_are_kept(mine, where, tmp_path):
    assert main(["run", str(mine), *where, "--method", "dense", "wanda", "--save-models", str(tmp_path / "kept")]) == 0
    folders = sorted(path.name for path in (tmp_path / "kept/mine").iterdir())
    assert [name.rpartition("-")[0] for name in folders] == ["hf-wanda-30", "hf-wanda-50"]
    model, _ = pruners.checkpoint.load(tmp_path / "kept/mine" / folders[1])
    assert torch.isfinite(model(torch.tensor([[1, 2, 3]])).logits).all()


def test_what_a_class_says_of_its_fields_is_said_of_options():
    told = options.in_options(
        "learning_rate=0.1 with steps=3, granularity='block' and target_parameters=0.5; lr_x=True, x='a'",
        Reconstruction,
        {"steps": "n-steps"},
    )
    assert told == (
        "--learning-rate 0.1 with --n-steps 3, --granularity block and target_parameters=0.5; lr_x=True, x='a'"
    )


def test_the_promises_of_a_method_are_checked(ria, tmp_path, capsys):
    assert pruners_main(["check", str(ria), "--family", "llama", "opt"]) == 0
    assert "RIA: 12 of 12 promises kept." in capsys.readouterr().out
    broken = tmp_path / "broken.py"
    broken.write_text(
        METHOD.replace("RIA", "Drawn").replace(
            "        size = weight", "        import torch\n        size = torch.rand_like(weight) * weight"
        )
    )
    assert pruners_main(["check", str(broken), "--family", "llama"]) == 1
    assert "llama, deterministic: " in capsys.readouterr().out
    broken.write_text(METHOD.replace("x.norm**self.power", "x.nothing"))
    assert pruners_main(["check", str(ria.with_name("ria2.py")), "--family", "llama"]) == 2
    assert pruners_main(["check", str(ria), "--family", "lama"]) == 2


def test_structured_methods_keep_their_promises(tmp_path, capsys):
    path = tmp_path / "narrow.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom pruners.structured_baselines import WandaSP\n\n\n"
        "@dataclass(frozen=True)\nclass Narrow(WandaSP):\n    pass\n"
    )
    assert pruners_main(["check", str(path), "--family", "llama", "mixtral", "gpt2"]) == 0
    assert "Narrow: 8 of 8 promises kept." in capsys.readouterr().out


def test_the_digest_of_a_file_of_one_s_own_changes_with_it(ria, tmp_path):
    from experiments.store import code

    one = plugin.methods(plugin.module(ria))[0](sparsity=0.5)
    changed = tmp_path / "changed.py"
    changed.write_text(METHOD.replace("0.5\n", "0.7\n"))
    other = plugin.methods(plugin.module(changed))[0](sparsity=0.5)
    assert code.method(one) != code.method(other)
    assert json.dumps(code._file(one)) != json.dumps(code._file(other))
