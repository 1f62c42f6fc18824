"""Accuracy, cost and text as measures of a table's cells; the dense gate; comparisons on the same documents."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import small_table as small
import torch
from scipy import stats

import pruners
from analysis import rows
from analysis.pages import comparisons, generation, speed
from analysis.tables import frames, markdown
from eval import perplexity as evaluation
from eval.answers import read_samples
from experiments import cells, measures, models, papers, protocols
from experiments.__main__ import main
from experiments.batch import run_table
from experiments.data import eval_tasks
from experiments.measures import dense_gate, zero_shot
from experiments.models import catalogue
from experiments.recovery import Retraining
from experiments.selection import rehearsal
from experiments.settings import Settings
from experiments.spec import Efficiency, Generation, Perplexity, Run, Table, ZeroShot
from experiments.store import records
from pruners.retrain import Trainable

pytestmark = pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")
METHODS = (None, pruners.Magnitude(sparsity=0.5))
SHORT = ZeroShot("short", (("piqa", "acc"), ("rte", "acc"), ("winogrande", "acc")), limit=12)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two corpora and two tasks; RTE is not there."""
    folder = small.data(tmp_path_factory.mktemp("data"))
    (folder / "tasks").mkdir()
    for name in ("piqa_validation.jsonl", "winogrande_xl_validation.jsonl"):
        lines = (small.SHARED / "data/tasks" / name).read_text().splitlines(keepends=True)
        (folder / "tasks" / name).write_text("".join(lines[:40]))
    return folder


def run(table: Table, root: Path, data: Path, **settings):
    return run_table(table.name, cells.cells(table.runs()), Settings(root, "cpu", data_dir=data, **settings))


def cell(table: Table, root: Path, index: int = 0) -> records.Record:
    found = records.load(root, table.name)
    return found[cells.cells(table.runs())[index].id]


@pytest.fixture(scope="module")
def scored(tmp_path_factory, data) -> tuple[Table, Path]:
    table, root = small.table(METHODS, measures=(small.PPL, SHORT)), tmp_path_factory.mktemp("scored")
    assert run(table, root, data).failed == []
    return table, root


def test_a_record_holds_both_accuracies_and_every_document(scored):
    table, root = scored
    record = cell(table, root)
    assert {"piqa.acc@0shot[:12]", "piqa.acc_norm@0shot[:12]", "winogrande.acc@0shot[:12]"} < set(record.measures)
    shared = record.measures["mean.short@0shot[:12]"]
    samples = read_samples(records.folder(root, table.name) / shared["samples"]["file"])
    assert [s["task"] for s in samples] == ["piqa"] * 12 + ["winogrande"] * 12
    piqa = record.measures["piqa.acc@0shot[:12]"]
    assert piqa["score"] == sum(s["acc"] for s in samples[:12]) / 12
    assert piqa["standard_error"] == pytest.approx(stats.sem([s["acc"] for s in samples[:12]]))
    assert list(shared["data"]["piqa"]["sha256"]) == ["piqa_validation.jsonl"]
    assert not (root / ".cache/unfinished").exists() or not list((root / ".cache/unfinished").rglob("*.answers"))


def test_a_mean_lacking_a_task_is_missing_and_says_why(scored):
    table, root = scored
    made = rows.rows(table, root)
    text = markdown.markdown(table, made)
    assert "score" not in cell(table, root).measures["mean.short@0shot[:12]"]
    assert "mean.short@0shot[:12], %" not in text
    assert "lacks rte: there is no tasks/rte_validation.jsonl" in text
    assert [c.title for c in frames.shown(made)][1:] == ["piqa.acc@0shot[:12], %", "winogrande.acc@0shot[:12], %"]


def test_a_task_whose_documents_turn_up_is_run_then(scored, data, tmp_path):
    table, root = scored
    shutil.copytree(root, tmp_path / "root")
    shutil.copytree(data, tmp_path / "data")
    assert run(table, tmp_path / "root", data).done == []
    row = {"sentence1": "It rains.", "sentence2": "The sun shines.", "label": 1}
    (tmp_path / "data/tasks/rte_validation.jsonl").write_text("".join(f"{json.dumps(row)}\n" for _ in range(3)))
    assert run(table, tmp_path / "root", tmp_path / "data").done == ["Dense", "Magnitude 50 %"]
    assert run(table, tmp_path / "root", tmp_path / "data").done == []
    mean = cell(table, tmp_path / "root").measures["mean.short@0shot[:12]"]
    assert mean["low"] <= mean["score"] <= mean["high"]
    assert mean["missing"] == {}


def test_a_task_that_could_not_be_read_is_tried_again_once_its_file_is_another(tmp_path):
    documents = tmp_path / "tasks/piqa_validation.jsonl"
    documents.parent.mkdir()
    documents.write_text('{"goal": "Go.", "sol1": "a"}\n')
    what = ZeroShot(None, (("piqa", "acc"),))
    model, tokenizer = models.load(str(small.MODEL), "float32", "cpu")
    values = zero_shot.measure(what, model, tokenizer, tmp_path, zero_shot.Place(tmp_path / "id", tmp_path))
    assert list(measures.missing(values)) == ["piqa"]
    assert not measures.lacking(values, tmp_path)
    documents.write_text('{"goal": "Go.", "sol1": "a", "sol2": "b", "label": 0}\n')
    assert measures.lacking(values, tmp_path)


def test_a_cell_without_a_task_is_incomplete_and_says_so(scored, data, capsys, monkeypatch):
    table, root = scored
    monkeypatch.setitem(papers.TABLES, table.name, table)
    words = [table.name, "--results", str(root), "--data-dir", str(data)]
    assert main(["run", *words]) == 1
    said = [line for line in capsys.readouterr().err.splitlines() if line]  # older rich ends its empty table by one
    assert said[-2].startswith("Incomplete: Dense and 1 more, without rte: there is no tasks/rte_validation.jsonl")
    assert ", 2 incomplete;" in said[-1]
    assert main(["run", *words, "--allow-missing-tasks"]) == 0
    assert main(["show", *words]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" incomplete ") == 2
    assert "Incomplete: 2 cells have a record that lacks tasks" in shown


def test_without_the_hub_and_a_folder_the_table_says_how_to_get_accuracy(tmp_path, data, monkeypatch):
    monkeypatch.setattr(eval_tasks, "hub_reachable", lambda: False)
    values = zero_shot.measure(SHORT, None, None, None, zero_shot.Place(tmp_path / "id", tmp_path))
    assert all(
        "with their documents in a --data-dir" in task["reason"] for task in values[SHORT.key]["missing"].values()
    )
    assert measures.lacking(values, data)
    assert not measures.lacking(values, None)


def test_limits_have_their_own_keys_and_records():
    table = small.table(METHODS, measures=(protocols.zero_shot("wanda"),))
    full, limited = papers.runs(table), papers.runs(table, limit=7)
    assert limited[0].measures[0].keys[0] == "boolq.acc@0shot[:7]"
    assert {run.id() for run in full}.isdisjoint(run.id() for run in limited)


def test_tasks_and_conventions_can_be_asked_for_by_name(capsys):
    table = small.table(METHODS)
    assert papers.runs(table, tasks=["gblm"])[0].measures[1] == protocols.zero_shot("gblm")
    assert papers.runs(table, tasks=["piqa"], limit=3)[0].measures[1].keys == ("piqa.acc@0shot[:3]",)
    assert main(["run", "embedded.demo", "--tasks", "hela_swag"]) == 2
    assert "nearest: hellaswag" in capsys.readouterr().err


def test_tasks_that_a_limit_or_a_name_makes_alike_are_one_measure():
    mmlu, rte = protocols.tasks("mmlu", limit=10), protocols.tasks("rte")
    table = small.table(METHODS, measures=(small.PPL, mmlu, rte))
    assert papers.runs(table)[0].measures == (small.PPL, mmlu, rte)
    limited = papers.runs(table, limit=2)[0].measures
    assert limited == (small.PPL, protocols.tasks("mmlu", "rte", limit=2))
    named = papers.runs(table, tasks=["sciq", "rte"])[0].measures
    assert named == (small.PPL, mmlu, protocols.tasks("rte", "sciq"))
    assert papers.runs(table, tasks=["sciq"], limit=2)[0].measures[1] == protocols.tasks("mmlu", "rte", "sciq", limit=2)
    mean = protocols.zero_shot("wanda")
    short = small.table(METHODS, measures=(replace(mean, detail=False),))
    assert papers.runs(short, tasks=["wanda"])[0].measures == (mean,)
    toy = rehearsal.rehearsed(papers.find("embedded.tasks")).runs()[0].measures
    assert toy == (protocols.tasks("mmlu", "rte", limit=2),)


def test_tasks_of_one_key_are_one_measure_of_a_run():
    one = Run(str(small.MODEL), None, None, (protocols.tasks("rte"), protocols.tasks("sciq")))
    assert one == replace(one, measures=(protocols.tasks("rte", "sciq"),))
    both = (ZeroShot(None, (("rte", "acc"),)), small.PPL, ZeroShot(None, (("rte", "acc_norm"),)))
    merged_once = (ZeroShot(None, (("rte", "acc"), ("rte", "acc_norm"))), small.PPL)
    assert replace(one, measures=both).measures == merged_once


@pytest.mark.parametrize(
    "measures",
    [
        (Efficiency(repetitions=3), Efficiency(repetitions=5)),
        (ZeroShot("mine", (("rte", "acc"),)), ZeroShot("mine", (("sciq", "acc"),))),
    ],
)
def test_two_measures_of_one_key_are_refused(measures):
    with pytest.raises(ValueError, match=re.escape(f"2 measures have the key '{measures[0].key}', under")):
        Run(str(small.MODEL), None, None, measures)


def test_a_task_without_documents_is_incomplete_beside_another_until_it_has_some(tmp_path):
    (tmp_path / "tasks").mkdir()
    piqa = (small.SHARED / "data/tasks/piqa_validation.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "tasks/piqa_validation.jsonl").write_text("".join(piqa[:2]))
    table = small.table((None,), measures=(protocols.tasks("rte", limit=9), protocols.tasks("piqa")))
    found = cells.cells(papers.runs(table, limit=2))
    settings = Settings(tmp_path / "r", "cpu", data_dir=tmp_path)
    assert run_table(table.name, found, settings).failed == []
    (record,) = records.load(tmp_path / "r", table.name).values()
    assert list(measures.missing(record.measures)) == ["rte"]
    assert measures.missing(record.measures)["rte"].startswith("there is no tasks/rte_validation.jsonl")
    shutil.copy(small.SHARED / "data/tasks/rte_validation.jsonl", tmp_path / "tasks")
    assert len(run_table(table.name, found, settings).done) == 1
    (record,) = records.load(tmp_path / "r", table.name).values()
    shared = record.measures["tasks@0shot[:2]"]
    kept = read_samples(records.folder(tmp_path / "r", table.name) / shared["samples"]["file"])
    assert shared["missing"] == {}
    assert [sample["task"] for sample in kept] == ["rte", "rte", "piqa", "piqa"]


def test_cells_are_compared_on_the_same_documents(scored):
    table, root = scored
    made = rows.rows(table, root)
    text = comparisons.page(table, made, comparisons.baselines(table, made, [root]))
    pairs = [(made[1], made[0])]
    (piqa, winogrande) = comparisons.task_tests(table, pairs)
    files = [records.folder(root, table.name) / row.measure(SHORT.key)["samples"]["file"] for row in made]
    dense, pruned = ([s["acc"] for s in read_samples(file)[:12]] for file in files)
    only_here, only_dense = (sum(a > b for a, b in zip(*p, strict=True)) for p in ((pruned, dense), (dense, pruned)))
    assert (piqa.only_here, piqa.only_baseline) == (only_here, only_dense)
    total = only_here + only_dense
    single = stats.binomtest(only_here, total).pvalue if total else 1.0
    assert min(1.0, single) <= piqa.p <= min(1.0, 2 * single) + 1e-12
    assert "every cell minus Dense" in text
    assert f"perplexity {small.PPL.key}" in text
    assert f"Holm's method for the {len([piqa, winogrande])} tests" in text


def test_comparing_changed_answers_or_an_unknown_baseline_is_refused(scored, tmp_path):
    table, root = scored
    made = rows.rows(table, root)
    with pytest.raises(LookupError, match="Did you mean"):
        comparisons.baselines(table, made, [root], "magnitude 60 %")
    shutil.copytree(root, tmp_path / "root")
    made = rows.rows(table, tmp_path / "root")
    file = tmp_path / "root/runs/tiny" / made[0].measure(SHORT.key)["samples"]["file"]
    file.write_bytes(gzip.compress(gzip.decompress(file.read_bytes()).replace(b'"acc": 1.0', b'"acc": 0.0')))
    with pytest.raises(ValueError, match="the answers of Dense, is missing or was changed"):
        comparisons.task_tests(table, [(made[1], made[0])])


BOUND, TO_BOUND = "bandwidth lower bound, ms/step", "decode / bandwidth bound at that time"


def test_a_record_without_a_reference_stays_readable():
    cost = Efficiency((1,), (16,), new_tokens=2, repetitions=2)
    table = small.table((None,), measures=(cost,))
    spread = {"median": 0.02, "q1": 0.01, "q3": 0.03, "repetitions": 2}
    shape = {"batch": 1, "length": 16, "new_tokens": 2, "prefill_s": spread, "decode_s": spread, "peak_bytes": 10**9,
             "prefill_tokens_per_s": 800.0, "decode_tokens_per_s": 50.0}  # fmt: skip
    timing = {"device": "cpu: x", "threads": 1, "dtype": "torch.float32", "decode_bound_s": 0.005, "runs": [shape]}
    known = {"parameters": 1, "macs": 1, "macs_tokens": 64, "decode_s": 0.02, "decode_q1_s": 0.01, "decode_q3_s": 0.03,
             "decode_bound_s": 0.005, "timing": timing}  # fmt: skip
    (made,) = table.runs()
    row = rows.Row("Dense", "", made, small.record(made, measures={cost.key: known}), None)
    assert BOUND in frames.text([row]).columns
    assert TO_BOUND not in frames.text([row]).columns
    assert "| 5.0 " in speed.page(table, [row])
    told = {"median": 4.0, "q1": 3.0, "q3": 5.0}
    copies = {"bytes": 2**29, "median": 0.1, "q1": 0.08, "q3": 0.12, "repetitions": 3}
    shape |= {"decode_to_bound": told, "reference": copies, "noisy": True, "attempts": 3}
    assert "4.00 [3.00, 5.00] (noisy)" in speed.page(table, [row])
    assert "Noisy: the quartiles of the copies around its steps differ by 40 %." in speed.page(table, [row])


def test_cost_and_text_are_measured_and_shown(tmp_path, data):
    cost, text = Efficiency((1, 2), (16,), new_tokens=2, repetitions=2, semi_structured=True), Generation(new_tokens=6)
    table = small.table(METHODS, measures=(cost, text))
    assert run(table, tmp_path, data).failed == []
    made = rows.rows(table, tmp_path)
    dense, pruned = (row.measure(cost.key) for row in made)
    assert dense["parameters"] == pruned["parameters"] == 260_032
    assert pruned["nonzero_parameters"] < dense["nonzero_parameters"]
    assert dense["decode_bound_s"] < dense["decode_s"]
    shown = markdown.markdown(table, made)
    assert dense["decode_to_bound_q1"] <= dense["decode_to_bound"] <= dense["decode_to_bound_q3"]
    assert {"parameters, M", "MACs, G", "decode, ms/step", BOUND, TO_BOUND} <= set(frames.text(made).columns)
    assert "Magnitude 50 %: Unstructured: no speed-up from dense kernels, which move" in shown
    assert "2:4 kernels were not timed: semi-structured kernels need a CUDA device" in shown
    lines = [line.split("|")[1:4] for line in speed.page(table, made).splitlines() if "| 16 " in line]
    assert [[part.strip() for part in line] for line in lines[:2]] == [["Dense", "1", "16"], ["Dense", "2", "16"]]
    page = generation.page(generation.continuations(made))
    assert "| Dense" in page
    assert "Magnitude 50 %" in page


DRIVER = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_measures as t
from eval import answers

put = answers.AnswerStore.put
def put_and_die(store, *batch):
    put(store, *batch)
    if len(store) > 8:
        os.kill(os.getpid(), signal.SIGKILL)
answers.AnswerStore.put = put_and_die
t.run(t.small.table(t.METHODS, measures=(t.small.PPL, t.SHORT)), Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_evaluation_goes_on_where_it_was(scored, data, tmp_path):
    """Killed with -9 after some batches of its answers are on disk; what they answer is not asked again."""
    table, undisturbed = scored
    driver = DRIVER.format(tests=str(Path(__file__).parent))
    process = subprocess.run([sys.executable, "-c", driver, tmp_path, data], cwd=Path(__file__).parents[1])
    assert process.returncode == -signal.SIGKILL
    assert run(table, tmp_path, data).failed == []
    for index in range(len(METHODS)):
        assert cell(table, tmp_path, index).measures == cell(table, undisturbed, index).measures
    assert cell(table, tmp_path).resumed == 1


@pytest.fixture
def held(monkeypatch, tmp_path):
    """The stories model in the catalogue, with the perplexity it has as the published one."""
    found = catalogue.Model("stories", folder=small.MODEL, dense={}, positions=512)
    monkeypatch.setitem(catalogue.CATALOGUE, "stories", found)

    def table(perplexity: float, **changes) -> Table:
        model = replace(found, dense={small.PPL.key: perplexity}, **changes)
        monkeypatch.setitem(catalogue.CATALOGUE, "stories", model)
        made = small.table(METHODS)
        return replace(made, columns=(("stories",),))

    return table


def test_a_dense_model_that_meets_its_value_passes_and_is_evaluated_once(held, tmp_path, data, scored, monkeypatch):
    known = cell(*scored).measures[small.PPL.key]["perplexity"]
    evaluated = []
    inner = evaluation.perplexity
    monkeypatch.setattr(evaluation, "perplexity", lambda *a, **k: evaluated.append(1) or inner(*a, **k))
    table = held(known)
    assert run(table, tmp_path, data).failed == []
    assert len(evaluated) == 2  # dense for both cells, and the pruned one
    assert cell(table, tmp_path, 1).dense_gate == {
        small.PPL.key: {"expected": known, "found": pytest.approx(known), "tolerance": 0.01}
    }


def test_a_mutilated_model_is_stopped_with_the_likely_causes(held, tmp_path, data, scored):
    shutil.copytree(small.MODEL, tmp_path / "mutilated")
    model, _ = models.load(str(small.MODEL))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
    model.save_pretrained(tmp_path / "mutilated")
    table = held(cell(*scored).measures[small.PPL.key]["perplexity"], folder=tmp_path / "mutilated")
    assert run(table, tmp_path / "results", data).failed == ["Dense", "Magnitude 50 %"]
    (message,) = {failure.message for failure in records.load_failures(tmp_path / "results", "tiny").values()}
    assert (
        "they differ by more than 1 %. Likely causes: a different split of, or way of joining, ptb/test, a "
        "tokenizer" in message
    )
    assert run(table, tmp_path / "results", data, dense_gate=False).failed == []
    assert cell(table, tmp_path / "results", 1).dense_gate == {small.PPL.key: {"skipped": "--no-dense-gate"}}


def test_a_retrained_unpruned_model_is_no_dense_model(tmp_path, data):
    recovery = Retraining(Trainable(biases=False, norms=True), small.WINDOWS, steps=2, learning_rate=0.1, batch_size=1)
    dense = small.table(METHODS[:1]).runs()[0]
    runs = (dense, replace(dense, recovery=recovery))
    table = Table("tiny", "A tiny table", (0, 1), ((str(small.MODEL),),), lambda index, model: runs[index])
    assert run(table, tmp_path, data).failed == []
    first, second = (cell(table, tmp_path, index).measures[small.PPL.key]["perplexity"] for index in (0, 1))
    assert first != second


def test_a_damaged_dense_value_is_evaluated_again(tmp_path, caplog):
    values = {"a@1": {"perplexity": 7.0}}
    assert dense_gate.dense(tmp_path, {"model": "m"}, lambda: values) == values
    assert dense_gate.dense(tmp_path, {"model": "m"}, lambda: pytest.fail("it is kept")) == values
    small.edit(next(tmp_path.rglob("*.json")), "7.0", "8.0")
    assert dense_gate.dense(tmp_path, {"model": "m"}, lambda: values) == values
    assert "Evaluating again" in caplog.text


def test_a_published_value_holds_for_its_own_protocol_only():
    llama = models.find("llama-7b")
    assert dense_gate.published(Perplexity("wikitext2/test", 2048), llama)
    assert not dense_gate.published(Perplexity("wikitext2/test", 2048, limit=10), llama)
    assert not dense_gate.published(SHORT, llama)
