"""Faults of one's own tables are told with the table and its file; names and folders as a shell gives them."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import small_table as small
from own_work import TABLE, needs_model

import pruners
from experiments import cli, provenance
from experiments.__main__ import main, parser
from experiments.own import comparison
from experiments.store import found

HEAD = """
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.spec import Perplexity, Run, Table, Windows, ZeroShot
from pruners.unstructured import Unstructured


@dataclass(frozen=True)
class Powered(Unstructured):
    power: object = 1

    def score(self, name, weight, x, dense):
        return weight.abs()


def run(method, model):
    return Run(model, method, None, (Perplexity("ptb/test", 64, 4),))


def declared(rows=(None,), columns=(("opt-125m",),), run=run, label=None):
    return Table("mine", "Mine", rows, columns, run, label=label)


def means(task):
    return ZeroShot("mine", ((task, "acc"),))


def of(power):
    return declared((Powered(sparsity=0.5, power=power),))


table = """
RUN = "declared(run=lambda method, model: {})"
FAULTS = {
    "of(Path('x'))": r"\): Powered: power is text, .* which a record can hold; got PosixPath\('x'\) \(PosixPath\)\.",
    "of({1})": r"\): a cell is found by all that it holds, and here is an unhashable type: 'set'; use tuples in",
    "of({1: 2})": r"an unhashable type: 'dict'; use tuples",
    "of(b'x')": r"power is text, .*; got b'x' \(bytes\)",
    "of(len)": r"power is text, .*; got <built-in function len>",
    "of((1, float('nan')))": r"power is text, .*; got nan\.",
    "declared(rows=None)": r"Table: rows is a tuple of rows, .*; got None\.$",
    "declared(columns=('opt-125m',))": r"Table: columns is a tuple of columns, each a tuple that begins with its model",
    "declared(columns='opt-125m')": r"Table: columns is a tuple of columns",
    "declared(columns=(('opt-125m', 1),))": r"column \('opt-125m', 1\): run does not take them: too many positional",
    "declared(label='x')": r"Table: label is None or a function to be called; got 'x'",
    RUN.format("3"): r"row None, column \('opt-125m',\): run gives a Run, or None for no cell; got 3 \(int\)",
    RUN.format("Run(model, None, None, ('ptb/test',))"): r"column .*: 'ptb/test' \(str\) is no measure",
    RUN.format("Run(model, None, None, (Perplexity,))"): r"column .*: the class Perplexity itself is no measure",
    RUN.format(
        "Run(model, None, Windows('c4/train', 0, 32), ())"
    ): r"column .*: Windows: count is a whole number.* got 0\.",
    RUN.format("Run(model, None, None, (means('rte'), means('sciq')))"): (
        r"row None, column \('opt-125m',\): Run: 2 measures have the key 'mean.mine@0shot'"
    ),
    "declared(label=lambda run: 'x')": r"label gives two texts, for the method and its setting; got 'x'",
}
RAISED = {
    "declared(label=lambda run: {}['x'])": "KeyError: x",
    RUN.format("Run(model, 'wanda', None, ())"): (
        r"TypeError: The table mine \(.*\), row None, column \('opt-125m',\): Run: method is made .*'wanda' \(str\)"
    ),
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setattr(pruners, "METHODS", dict(pruners.METHODS))

    def shown(table: str) -> int:
        (tmp_path / "mine.py").write_text(f"{HEAD}{table}\n")
        return main(["show", str(tmp_path / "mine.py"), "--results", str(tmp_path / "results")])

    return shown


@pytest.mark.parametrize("table", FAULTS)
def test_a_faulty_table_is_refused_with_its_file(own, table, tmp_path, capsys):
    assert own(table) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert re.search(FAULTS[table], said)
    assert str(tmp_path / "mine.py") in said
    assert not said.endswith("..")


@pytest.mark.parametrize("number", ["np.float32(2)", "np.int64(2)", "np.bool_(True)"])
def test_numbers_of_numpy_are_pythons_own_in_a_record(own, number):
    assert own(f"of({number})") == 0


@pytest.mark.parametrize("table", RAISED)
def test_what_a_table_s_own_code_raises_is_told_with_its_own_line(own, table, tmp_path, capsys):
    assert own(table) == 1
    place = re.escape(f"(raised by {tmp_path / 'mine.py'}, line ")
    assert re.fullmatch(rf"{RAISED[table]} {place}\d+\)\n", capsys.readouterr().err)


def test_two_tables_of_one_name_are_refused(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / f"{name}.py").write_text(TABLE.replace("{model!r}", "'opt-125m'"))
    one, other = str(tmp_path / "a.py"), str(tmp_path / "b.py")
    where = ["--results", str(tmp_path / "results")]
    assert main(["show", one, other, *where]) == 2
    assert f"{one} and {other} both declare a table called mine" in capsys.readouterr().err
    assert main(["show", one, f"{one}:mine", *where]) == 0
    (tmp_path / "c.py").write_text(
        TABLE.replace("{model!r}", "'opt-125m'") + "again = Table('mine', '', (), (), cell)\n"
    )
    assert main(["show", f"{tmp_path}/c.py", *where]) == 2
    assert "c.py declares two tables called mine" in capsys.readouterr().err


def test_tasks_that_are_asked_twice_are_listed_with_both_metrics(own, tmp_path, capsys):
    metrics = "(('piqa', 'acc_norm'),)), ZeroShot(None, (('rte', 'acc'),))"
    assert own(RUN.format(f"Run(model, None, None, (ZeroShot(None, {metrics}))")) == 0
    assert "piqa.acc_norm@0shot, rte.acc@0shot" in capsys.readouterr().out
    words = ["--tasks", "piqa", "--results", str(tmp_path / "results")]
    assert main(["show", str(tmp_path / "mine.py"), *words]) == 0
    assert "piqa.acc_norm@0shot, rte.acc@0shot, piqa.acc@0shot" in capsys.readouterr().out


def test_a_mean_of_a_command_line_that_has_the_name_of_a_table_s_own_is_refused_with_the_table(own, tmp_path, capsys):
    assert own(RUN.format("Run(model, None, None, (ZeroShot('wanda', (('rte', 'acc'),)),))")) == 0
    words = ["--tasks", "wanda", "--results", str(tmp_path / "results")]
    assert main(["show", str(tmp_path / "mine.py"), *words]) == 2
    assert re.search(r"The table mine \(.*mine.py\): Run: 2 measures have the key", capsys.readouterr().err)


@needs_model
def test_a_comparison_that_an_earlier_version_wrote_is_the_same(tmp_path, monkeypatch, capsys):
    (tmp_path / "m").symlink_to(small.MODEL)
    monkeypatch.chdir(tmp_path)
    asked = parser().parse_args(["compare", "./m", "--methods", "magnitude", "--settings", "0.5", "--results", "r"])
    path = comparison.file(asked)
    text = path.read_text()
    path.write_text(text.replace(f"('{tmp_path / 'm'}',)", "('./m',)"))
    assert path.read_text() != text
    assert comparison.file(asked).read_text() == text


@needs_model
def test_a_comparison_names_its_models_wherever_it_is_read(tmp_path, monkeypatch, capsys):
    (tmp_path / "m").symlink_to(small.MODEL)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    data = small.data(tmp_path / "data")
    words = ["--methods", "magnitude", "--settings", "0.5", "--measure", "ptb/test@64[:4]", "--data-dir", str(data)]
    assert main(["compare", "./m", *words, "--results", "r"]) == 0
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["show", "../r/compare.py", "--results", "../r", "--data-dir", str(data)]) == 0
    assert "2 of 2 cells are done" in capsys.readouterr().out


@pytest.mark.parametrize("setting", ["1", "nan", "-0.5"])
def test_a_share_that_is_none_is_asked_for_and_not_a_failure(setting, tmp_path, capsys):
    words = ["compare", "llama-7b", "--methods", "wanda", f"--settings={setting}", "--results", str(tmp_path)]
    assert main(words) == 2
    assert "share removed" in capsys.readouterr().err


def test_the_home_folder_is_meant_where_a_shell_leaves_its_sign(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.path("~/x") == tmp_path / "x"
    assert cli.path("x~") == Path("x~")
    with pytest.raises(argparse.ArgumentTypeError, match="no home folder"):
        cli.path("~nobody-of-that-name/x")


@pytest.mark.parametrize("sign", ["\u3000", "\u00a0", "\u200c", "\u00e4", "\u4e2d"])
def test_any_sign_of_a_folder_s_name_is_taken(sign):
    assert cli.path(f"a{sign}b") == Path(f"a{sign}b")


@pytest.mark.parametrize("sign", ["\n", "\x7f", "\udce4"])
def test_control_characters_and_halves_of_signs_are_not(sign):
    with pytest.raises(argparse.ArgumentTypeError, match="control character"):
        cli.path(f"a{sign}b")


def test_a_record_s_commit_is_this_code_s_also_within_a_hook_of_another_repository(monkeypatch, tmp_path):
    before = provenance._git("rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    assert provenance._git("rev-parse", "HEAD") == before


def test_a_setting_of_git_in_the_environment_is_heard(monkeypatch):
    for name, value in (("COUNT", "1"), ("KEY_0", "own.setting"), ("VALUE_0", "heard")):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    assert provenance._git("config", "own.setting") == "heard"


def test_a_reason_that_is_a_sentence_ends_with_one_full_stop(monkeypatch):
    monkeypatch.setattr(found.measures, "missing", lambda _: {"rte": "x.jsonl is a pipe, so nothing is read from it."})
    record = small.record(small.table().runs()[0])
    assert found.incomplete([("Dense", record)]) == [
        "Incomplete: Dense, without rte: x.jsonl is a pipe, so nothing is read from it."
    ]
