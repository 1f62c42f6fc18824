"""The two command lines: what is unknown is one sentence with the nearest names, and the README's commands parse."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small_table as small
from conftest import needs_shared

import analysis.__main__ as analysis
import pruners
from experiments import papers
from experiments.__main__ import main, parser
from experiments.data import eval_tasks
from experiments.own import options
from experiments.spec import Run
from experiments.store import records

ROOT = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"(?:python3?|\$\(RUN\)) -m (experiments|analysis) (.+)")
DENSE = Run("smollm2-135m", None, small.WINDOWS, (small.PPL,))


@pytest.fixture
def tiny(monkeypatch):
    table = small.table((None, pruners.Magnitude(sparsity=0.5)))
    monkeypatch.setitem(papers.TABLES, "tiny", table)
    return table


@pytest.mark.parametrize(
    ("arguments", "nearest"),
    [
        (["run", "embeded.demo"], "Did you mean embedded.demo or"),
        (["show", "embedded.demo", "--model", "smollm2-135"], "Did you mean smollm2-135m"),
        (["run", "embedded.demo", "--method", "wnda"], "Did you mean wanda"),
        (["run", "embedded.demo", "--only", "Wanda 2:5"], "Did you mean wanda 2:4"),
    ],
)
def test_an_unknown_name_exits_2_with_the_nearest_ones(arguments, nearest, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert nearest in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["run", "embedded.demo", "--batch-size", "0"], ["walk"], []])
def test_bad_arguments_exit_2(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


def test_list_names_everything(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("embedded.demo", "llama-7b", "sparsegpt", "wikitext2/test"))


def test_show_tells_done_failed_and_missing_apart(tiny, tmp_path, capsys, monkeypatch):
    if not small.MODEL.is_dir():
        pytest.skip(f"{small.MODEL} is absent")
    data = small.data(tmp_path / "data")
    arguments = ["tiny", "--results", str(tmp_path)]
    main(["run", *arguments, "--only", "dense", "--data-dir", str(data)])
    main(["show", *arguments])
    dense, magnitude, summary, *_ = capsys.readouterr().out.splitlines()[2:]
    assert (dense.split()[2], magnitude.split()[3]) == ("done", "missing") or "done" in dense
    assert "missing" in magnitude
    assert "ptb/test@64[:4]" in dense
    assert "1 of 2 cells are done" in summary


def test_several_tables_end_with_what_they_count_together(capsys, tmp_path):
    words = ["flap.bias_compensation", "flap.calibration_size", "--results", str(tmp_path), "--data-dir", str(tmp_path)]
    assert main(["show", *words]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "2 tables, 18 cells (15 distinct): 18 missing."
    assert main(["show", *words[1:]]) == 0
    assert "distinct" not in capsys.readouterr().out


def test_show_tells_what_a_paper_table_costs_and_lacks(capsys, tmp_path):
    assert main(["show", "gblm.alpha", "--results", str(tmp_path), "--data-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "0 of 10 cells are done; the others take about 0.24 hours on one A100." in shown
    assert "llama-2-7b (meta-llama/Llama-2-7b-hf, 13 GB)" in shown
    assert f"c4/train (not in {tmp_path})" in shown


def test_show_says_where_weights_are_on_a_card_and_which_cells_do_not_fit_on_it(capsys, tmp_path):
    words = ["show", "flap.perplexity", "--results", str(tmp_path), "--data-dir", str(tmp_path)]
    assert main(words) == 0
    shown = capsys.readouterr().out
    away = "of them with weights in CPU memory or on disk."
    assert f"0 of 60 cells are done; the others take about 15.0 hours on one A100, 13 {away}" in shown
    assert [line.count("host or disk") for line in shown.splitlines()[2:62]] == [
        int("llama-65b" in line) for line in shown.splitlines()[2:62]
    ]
    assert main([*words, "--card", "24"]) == 0
    shown = capsys.readouterr().out
    assert f"the others take about 53.6 hours on one A100, 43 {away}" in shown
    assert "too large" not in shown
    words = ["show", "perp.magnitude", "--only", "Magnitude + all weights 50 %", *words[2:], "--card", "24"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert (
        "4 cells need more than one 24 GB card, as training all weights needs all weights on the device: "
        "opt-2.7b" in shown
    )
    assert sum("too large" in line for line in shown.splitlines()) == 4


def test_show_tells_which_tasks_it_has_no_documents_of(capsys, tmp_path, monkeypatch):
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "rte_validation.jsonl").write_text('{"sentence1": "", "sentence2": "", "label": 0}\n')
    words = ["show", "embedded.demo", "--results", str(tmp_path), "--tasks", "rte", "boolq"]
    assert main([*words, "--data-dir", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert f"documents of boolq (not in {tmp_path})" in shown
    assert "rte.acc@0shot, boolq.acc@0shot" in shown
    monkeypatch.delenv("PRUNING_DATA_DIR", raising=False)
    monkeypatch.setattr(eval_tasks, "hub_reachable", lambda: False)
    main(words)
    assert "documents of rte, boolq (the Hub cannot be reached)" in capsys.readouterr().out


def test_an_hour_estimate_is_never_nought(tiny, tmp_path, capsys):
    if not small.MODEL.is_dir():
        pytest.skip(f"{small.MODEL} is absent")
    main(["show", "tiny", "--results", str(tmp_path)])
    assert "0 of 2 cells are done; the others take < 0.01 hours on one A100." in capsys.readouterr().out


@pytest.mark.parametrize("command", ["show", "run"])
def test_a_data_folder_that_is_not_there_is_refused_once(command, tmp_path, capsys, monkeypatch):
    words, absent = [command, "embedded.demo", "--results", str(tmp_path)], str(tmp_path / "absent")
    assert main([*words, "--data-dir", absent]) == 2
    assert capsys.readouterr().err.startswith(f"--data-dir {absent} is not a folder;")
    monkeypatch.setenv("PRUNING_DATA_DIR", absent)
    assert main(words) == 2
    assert capsys.readouterr().err.startswith(f"PRUNING_DATA_DIR {absent} is not a folder;")
    assert not list(tmp_path.iterdir())


def test_the_hint_after_a_run_finds_its_cells(tiny, tmp_path, capsys):
    if not small.MODEL.is_dir():
        pytest.skip(f"{small.MODEL} is absent")
    data, results = small.data(tmp_path / "data"), tmp_path / "my results"
    words = ["tiny", "--model", str(small.MODEL), "--dtype", "bfloat16", "--data-dir", str(data)]
    words += ["--results", str(results)]
    assert main(["run", *words, "--only", "dense"]) == 0
    hint = capsys.readouterr().err.strip().rsplit("python -m analysis ", 1)[1]
    assert shlex.split(hint) == ["table", *words]
    analysis.main(shlex.split(hint))
    assert "Dense" in capsys.readouterr().out


def test_the_hint_below_a_table_repeats_the_selection(tiny, tmp_path, capsys):
    if not small.MODEL.is_dir():
        pytest.skip(f"{small.MODEL} is absent")
    data, results = small.data(tmp_path / "data"), tmp_path / "my results"
    words = ["tiny", "--model", str(small.MODEL), "--dtype", "float32", "--results", str(results)]
    main(["run", *words, "--only", "dense", "--data-dir", str(data)])
    analysis.main(["table", *words])
    hint = re.search(r"1 of 2 cells are missing: python -m experiments run (.*)", capsys.readouterr().out)
    assert shlex.split(hint[1]) == words
    assert analysis.main(["table", *words[:3], "--dtype", "float16", *words[5:]]) == 2
    hint = re.search(r"Run `python -m experiments run (.*)`, or", capsys.readouterr().err)
    assert shlex.split(hint[1]) == [*words[:3], "--dtype", "float16", *words[5:]]


@needs_shared
def test_a_fault_of_a_table_is_no_complaint_about_what_was_asked(tiny, tmp_path, capsys, monkeypatch):
    def faulty(run):
        return {"wanda": ("Wanda", "")}[run.model]

    monkeypatch.setitem(papers.TABLES, "tiny", replace(tiny, label=faulty))
    assert main(["show", "tiny", "--results", str(tmp_path)]) == 1
    assert re.search(r"^KeyError: .*\(this is a bug in tests/test_cli\.py, line \d+\)\n$", capsys.readouterr().err)


def test_the_report_does_not_leave_a_faulty_table_out(tiny, tmp_path, capsys, monkeypatch):
    if not small.MODEL.is_dir():
        pytest.skip(f"{small.MODEL} is absent")
    main(["run", "tiny", "--results", str(tmp_path), "--only", "dense", "--data-dir", str(small.data(tmp_path / "d"))])
    monkeypatch.setattr("analysis.compare.cells", lambda *_: {}["a method that its words do not know"])
    assert analysis.main(["report", "--results", str(tmp_path)]) == 1
    assert "KeyError: a method that its words do not know (this is a bug in " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "command"),
    [({"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}, "from experiments import cli as a")],
)
def test_an_ascii_locale_can_be_printed_to(environment, command):
    told = subprocess.run(
        [sys.executable, "-c", f"{command}; import argparse; "
         "a.carry_out(argparse.Namespace(command=lambda _: print('25.0 \\xb1 1.5'), debug=False), '')"],
        cwd=ROOT, capture_output=True, env={**os.environ, **environment, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (told.returncode, told.stderr, told.stdout.decode()) == (0, b"", "25.0 \xb1 1.5\n")


def test_a_reader_that_leaves_early_is_no_error():
    shell = f"{sys.executable} -m experiments list | head -n 1; echo ${{PIPESTATUS[0]}}"
    told = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert told.stderr == ""
    assert told.stdout.splitlines()[-1] in ("0", "141")


def test_a_failing_cell_exits_1(tiny, tmp_path, capsys):
    if not small.MODEL.is_dir():
        pytest.skip(f"{small.MODEL} is absent")
    assert main(["run", "tiny", "--results", str(tmp_path), "--data-dir", str(tmp_path)]) == 1
    assert "0 done now, 0 before, 2 failed" in capsys.readouterr().err
    assert len(records.load_failures(tmp_path, "tiny")) == 2


def test_a_results_folder_that_cannot_be_written_exits_1_before_any_work(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["run", "embedded.demo", "--results", str(tmp_path / "file")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"Cannot write {tmp_path / 'file' / 'runs' / 'embedded.demo'}:")
    assert error.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    main(["run", "embedded.demo", "--results", str(tmp_path / "file"), "--debug"])
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_says_that_the_same_command_continues(tiny, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("experiments.batch.run_table", interrupt)
    assert main(["run", "embedded.demo", "--results", str(tmp_path)]) == 130
    assert "the same command runs the rest" in capsys.readouterr().err


def test_sigterm_says_so_too_and_is_left_alone_afterwards(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("experiments.batch.run_table", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    assert main(["run", "embedded.demo", "--results", str(tmp_path)]) == 143
    assert "the same command runs the rest" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("command", ["table", "figure"])
@pytest.mark.parametrize(("name", "reason"), [("embeded.demo", "Did you mean"), ("embedded.demo", "No record of")])
def test_analysis_exits_2_without_a_table_or_records(command, name, reason, tmp_path, capsys):
    assert analysis.main([command, name, "--results", str(tmp_path)]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("words", [["table", "embedded.demo"], ["claims"], ["report"], ["readme"]])
def test_analysis_makes_no_results_folder_for_a_misspelt_one(words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        analysis.main([*words, "--results", str(tmp_path / "typo")])
    assert stopped.value.code == 2
    assert f"{tmp_path / 'typo'} is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


@pytest.mark.parametrize("limit", ["0", "-3", "many"])
@pytest.mark.parametrize(("main", "command"), [(main, "show"), (analysis.main, "table")])
def test_a_limit_is_a_whole_number_from_1_on(main, command, limit, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "embedded.demo", "--limit", limit])
    assert stopped.value.code == 2
    assert f"argument --limit: '{limit}' is not a whole number from 1" in capsys.readouterr().err


def documented() -> list[tuple[str, str]]:
    """(program, arguments) of every command in the README's sh blocks and in the Makefile."""
    readme = ROOT / "README.md"
    blocks = re.findall(r"```sh\n(.*?)```", readme.read_text(), re.DOTALL) if readme.exists() else []
    lines = "\n".join([*blocks, (ROOT / "Makefile").read_text()]).replace("\\\n", " ")
    return [(program, line.split("#")[0].strip()) for program, line in COMMAND.findall(lines)]


@pytest.mark.parametrize(("program", "line"), documented())
def test_documented_commands_are_real_ones(program, line):
    asked, rest = {"experiments": parser, "analysis": analysis.parser}[program]().parse_known_args(shlex.split(line))
    if hasattr(asked, "table") and not asked.table.endswith(".py"):
        papers.find(asked.table)
    if hasattr(asked, "method") and isinstance(asked.method, str):
        rest = options.parse(pruners.METHODS[asked.method], rest, asked.method)[1]
    assert rest == []


def test_help_is_quick_to_ask_for():
    told = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "experiments", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert "run the cells that have no record yet" in told.stdout
    assert not re.search(r"\| +torch$", told.stderr, re.MULTILINE)
