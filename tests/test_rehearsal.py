"""Every table rehearses, at toy scale and under marks that keep it apart from real numbers."""

from __future__ import annotations

import pytest
import small_table as small
from transformers import LlamaConfig, LlamaForCausalLM

from analysis import tidy
from analysis.__main__ import main as analysis
from experiments import cells, papers
from experiments.__main__ import main
from experiments.recovery import Retraining
from experiments.selection import rehearsal
from experiments.store import records
from slurm.__main__ import main as slurm
from tests.conftest import needs_shared

TABLE = "gblm.perplexity"


@pytest.mark.parametrize("name", sorted(papers.PAPERS))
def test_every_table_rehearses_each_of_its_kinds_at_toy_scale(name):
    real, toy = papers.find(name), rehearsal.rehearsed(papers.find(name))
    made = cells.cells(toy.runs(), toy)
    assert 0 < len(made) <= len(real.runs())
    assert all(cell.run.spec()["rehearsal"] for cell in made)  # so that no id is that of a real cell
    assert {type(cell.run.method) for cell in made} == {type(run.method) for run in real.runs()}
    assert {cell.run.model for cell in made} == {run.model for run in real.runs()}
    for cell in made:
        assert cell.run.windows is None or cell.run.windows.count * cell.run.windows.length <= 128
        if isinstance(cell.run.recovery, Retraining):
            assert cell.run.recovery.taken <= 4
        assert all(getattr(what, "limit", 1) <= 2 for what in cell.run.measures)


def test_a_rehearsal_is_of_the_model_that_is_asked_for(tmp_path):
    """Which blocks LLM-Pruner takes hangs on their number; an answer stands behind a prompt of more than 64 tokens."""
    model = str(tmp_path / "model")
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=12, **sizes)).save_pretrained(model)
    for name, blocks in {"llm_pruner.chatglm_6b": (0, 12), "llm_pruner.aggregation": (4, 10)}.items():
        made = rehearsal.rehearsed(papers.find(name), model).runs(model)
        assert {run.model for run in made} == {model}
        assert {run.method.mlp_blocks for run in made if run.method and run.method.granularity == "block"} == {blocks}
        assert {run.recovery.text.length for run in made if run.recovery} <= {256}


@needs_shared
def test_a_rehearsal_runs_to_its_table_and_no_number_of_it_is_taken_for_one(tmp_path, capsys):
    data = ["--data-dir", str(small.data(tmp_path / "data"))]
    results = ["--results", str(tmp_path / "r")]
    words = ["--model", str(small.MODEL), *results]
    (tmp_path / "mine.py").write_text(
        "import pruners\n"
        "from experiments.spec import Perplexity, Run, Table, Windows\n"
        "WINDOWS, LONG = Windows('c4/train', 128, 2048), (Perplexity('ptb/test', 2048),)\n"
        "MINE = Table('mine', 'My table', (None, pruners.Wanda(0.5), pruners.Wanda(0.6)), (('smollm2-135m',),),\n"
        "    lambda method, model: Run(model, method, WINDOWS, LONG))\n"
    )
    mine = str(tmp_path / "mine.py")
    assert main(["run", mine, "--rehearse", *words, *data]) == 0
    assert "2 done now" in capsys.readouterr().err
    assert all(record.spec["rehearsal"] for record in records.load(tmp_path / "r", "mine").values())
    assert main(["show", mine, "--rehearse", *words, *data]) == 0
    assert slurm(["submit", mine, "--rehearse", "--executor", "debug", *words, *data]) == 0
    assert analysis(["table", mine, "--rehearse", *words]) == 0
    assert "Rehearsal of: My table" in capsys.readouterr().out
    assert analysis(["table", mine, *words]) == 2
    assert "No record of mine" in capsys.readouterr().err
    assert papers.find("mine").title == "My table"
    assert tidy.frame(tmp_path / "r").empty


def test_results_go_to_a_folder_of_their_own(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert analysis(["table", TABLE, "--rehearse"]) == 2
    assert "results/rehearsal" in capsys.readouterr().err
    assert slurm(["submit", TABLE, "--rehearse", "--dry-run"]) == 0
    assert f"--error={tmp_path}/results/rehearsal/" in capsys.readouterr().out
    assert papers.find(TABLE).published
