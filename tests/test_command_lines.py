"""Every command line that asks for nonsense: one sentence that names it, exit status 2, and nothing written."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

import analysis.__main__ as analysis
import slurm.__main__ as slurm
from experiments import __main__ as experiments

MAINS = {"experiments": experiments.main, "analysis": analysis.main, "slurm": slurm.main}
EMPTY = "empty value (an unset variable?)"
TABLE = "embedded.demo"
SELECTING = ("experiments show", "experiments run", "slurm submit", "analysis table")
HUGE = "9" * 5000

CASES = [
    *(
        (f"{command} {TABLE} {option} ''", f"argument {option}: {EMPTY}")
        for command in SELECTING
        for option in ("--model", "--tasks", "--results")
    ),
    *((f"{command} {TABLE} --dtype ''", "argument --dtype: invalid choice: ''") for command in SELECTING),
    *((f"{command} {TABLE} --limit ''", "'' is not a whole number from 1") for command in SELECTING),
    *((f"{command} ''", f"argument TABLE: {EMPTY}") for command in SELECTING),
    *(
        (f"{command} {TABLE} {option} ''", f"argument {option}: {EMPTY}")
        for command in SELECTING[:3]
        for option in ("--method", "--only", "--data-dir")
    ),
    *(
        (f"{command} {TABLE} {option}", f"argument {option.split()[0]}:")
        for command in ("experiments run", "slurm submit")
        for option in (
            "--device ''",
            "--device tpu7",
            "--device cuda:",
            "--device cuda:-1",
            "--batch-size 0",
            "--batch-size -1",
            "--batch-size 1.5",
            "--batch-size nan",
            f"--batch-size {HUGE}",
            "--wandb ''",
        )
    ),
    *(
        (f"experiments show {TABLE} --limit {limit}", "is not a whole number from 1")
        for limit in ("0", "-1", "1e3", "nan", "inf", "2.0", "9" * 30, HUGE, "²")
    ),
    *(
        (f"slurm submit {TABLE} --memory-gb={asked}", "is not a number of gigabytes above 0")
        for asked in ("0", "-1", "nan", "inf", "-inf", "1e400", "''", "many", "0.0", "-0")
    ),
    (f"slurm submit {TABLE} --profile ''", f"argument --profile: {EMPTY}"),
    (f"slurm submit {TABLE} --profile gpu_partion", "Did you mean gpu_partition"),
    (f"slurm submit {TABLE} --executor cloud", "argument --executor: invalid choice"),
    (f"slurm retry {TABLE}", "the following arguments are required: --failed"),
    ("slurm logs ''", f"argument CELL: {EMPTY}"),
    ("slurm logs nobody", "No job was ever submitted with a cell 'nobody'"),
    ("slurm status embeded.demo", "Did you mean embedded.demo"),
    ("slurm status zzz", "Unknown table 'zzz'. None of the "),
    ("slurm cancel embeded.demo", "Did you mean embedded.demo"),
    ("slurm submit embeded.demo", "Did you mean embedded.demo"),
    (f"experiments show {TABLE} --tasks wanda piqa", "wanda of wanda, piqa is a task set with"),
    (f"experiments run {TABLE} --tasks piqa flap", "flap of piqa, flap is a task set"),
    (f"slurm submit {TABLE} --tasks wanda gblm", "wanda of wanda, gblm is a task set"),
    (f"analysis table {TABLE} --tasks wanda piqa", "wanda of wanda, piqa is a task set with"),
    (f"experiments show {TABLE} --tasks piqa piqa", "piqa is named more than once"),
    (f"experiments show {TABLE} --tasks piqaa", "has no task 'piqaa'"),
    (f"analysis table {TABLE} --tasks piqaa", "has no task 'piqaa'"),
    (f"experiments show {TABLE} --method wnda", "Did you mean wanda"),
    (f"experiments show {TABLE} --method wanda --only 'Magnitude 50 %'", "No cell of wanda matches magnitude 50 %"),
    (f"experiments show {TABLE} --model nobody", "Unknown model 'nobody'"),
    (f"experiments show {TABLE} --model a\0b", "control character"),
    (f"experiments show {TABLE} --results a\0b", "control character"),
    (f"experiments show {TABLE} --dtype float9", "argument --dtype: invalid choice: 'float9'"),
    ("experiments show perp.magnitude --limit 5", "has no zero-shot tasks, to which --limit applies"),
    (f"experiments show {TABLE} --data-dir /nowhere", "--data-dir /nowhere is not a folder"),
    (f"experiments list {TABLE}", "unrecognized arguments"),
    (f"experiments run {TABLE} --colour red", "unrecognized arguments: --colour red"),
    (f"experiments show {TABLE} --device cpu", "unrecognized arguments: --device cpu"),
    ("experiments walk", "invalid choice: 'walk'"),
    ("experiments", "the following arguments are required: COMMAND"),
    (f"analysis figure {TABLE} --kind pie", "argument --kind: invalid choice: 'pie'"),
    (f"analysis figure {TABLE} --measure ''", f"argument --measure: {EMPTY}"),
    (f"analysis figure {TABLE} --kind cost --measure x", "--measure chooses among perplexity, accuracy and masks"),
    ("analysis figure embedded.flap --measure nobody", "Unknown protocol key 'nobody'"),
    (f"analysis compare {TABLE} --baseline ''", f"argument --baseline: {EMPTY}"),
    ("analysis compare embedded.flap --baseline nobody", "Unknown baseline 'nobody'"),
    (f"analysis table {TABLE} --results /nowhere", "/nowhere is not a folder"),
    ("analysis frame --out x.xls", "x.xls ends in .xls"),
    ("analysis frame --out reslts/all.csv", "reslts/all.csv would lie in reslts, which is no folder"),
    ("analysis frame --out ''", f"argument --out: {EMPTY}"),
    ("analysis claims --results ''", f"argument --results: {EMPTY}"),
]


def status(main, words: list[str]) -> int:
    try:
        return main(words)
    except SystemExit as stopped:
        return stopped.code


@pytest.mark.parametrize(("line", "said"), CASES, ids=[line[:70] for line, _ in CASES])
def test_nonsense_is_one_sentence_and_exit_status_2(line, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results").symlink_to(Path(__file__).resolve().parents[1] / "results")
    program, *words = shlex.split(line)
    assert status(MAINS[program], words) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert "Traceback" not in shown.err
    assert shown.err.count("\n") <= 2
    assert len(shown.err) < 1000
    assert shown.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["results"]


@pytest.mark.parametrize(
    ("program", "command"),
    [
        (program, command)
        for program, module in (("experiments", experiments), ("analysis", analysis), ("slurm", slurm))
        for command in next(action.choices for action in module.parser()._actions if isinstance(action.choices, dict))
    ],
)
def test_every_command_explains_itself(program, command, capsys):
    assert status(MAINS[program], [command, "--help"]) == 0
    assert "--debug" in capsys.readouterr().out
