"""LaTeX of made-up records: it compiles, nothing leaves the page, and bold is only what the paired test allows."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import small_table as small

import pruners
from analysis import compare, rows, significance
from analysis.tables import latex, markdown
from analysis.tables.frames import OTHER_CODE
from experiments import papers
from experiments.spec import Run, Table, needs_windows
from experiments.store import records

PDFLATEX = shutil.which("pdflatex")
PAGE = (
    r"\documentclass{article}\usepackage{array,booktabs,graphicx}\usepackage[margin=1in]{geometry}"
    "\n\\begin{document}\n%s\n\\end{document}\n"
)
ODD = r'Element^1 & a_b 50 % #1 {x} \y ~z "q" |W|*||G||_1 < > ± — 日本 é' + "\n\n\x1b[31m -3.5"
METHODS = (None, pruners.Magnitude(sparsity=0.5), pruners.Wanda(sparsity=0.5), pruners.SparseGPT(sparsity=0.5))
DECLARED = ("flap.perplexity", "llm_pruner.llama_7b", "embedded.gblm", "gblm.metric_ablation")


def table(seeds=(0,)) -> Table:
    def run(method, model, seed):
        windows = replace(small.WINDOWS, seed=seed) if needs_windows(method) else None
        return Run(model, method, windows, (small.PPL,))

    columns = tuple(("smollm2-135m", seed) for seed in seeds)
    return Table("tiny", "A tiny table", METHODS, columns, run)


def marked(root, declared, shifts, noise=0.001):
    """Methods in bold whose negative log-likelihoods are one text's, shifted by so much a method and seed."""
    text = np.random.default_rng(0).normal(3.0, 1.0, 50)
    for run in declared.runs():
        name, seed = type(run.method).__name__, run.windows.seed if run.windows else 0
        one = np.random.default_rng(len(name) + seed).normal(0.0, noise, 50)
        nll = text + np.broadcast_to(shifts[name], 3)[seed] + one - one.mean()
        record = small.record(run)
        for found in record.measures.values():
            found.update(nll_per_window=nll.tolist(), perplexity=float(np.exp(nll.mean())))
        records.write(record, root)
    return compare.cells(declared, rows.rows(declared, root))


def test_the_best_is_marked_though_its_interval_alone_overlaps_the_others(tmp_path):
    shifts = {"NoneType": -1.0, "Magnitude": 0.3, "Wanda": 0.1, "SparseGPT": 0.2}
    found = marked(tmp_path, table(), shifts)
    assert {name[1] for name in significance.best(found)} == {"Wanda"}
    made = rows.rows(table(), tmp_path)
    assert markdown.markdown(table(), made).count("**") == 4  # the heading and one value
    assert markdown.tex(table(), made).count(r"\textbf") == 1


def test_two_that_cannot_be_told_apart_leave_nothing_in_bold(tmp_path):
    shifts = {"NoneType": -1.0, "Magnitude": 0.3, "Wanda": 0.1, "SparseGPT": 0.101}
    assert significance.best(marked(tmp_path, table(), shifts, noise=0.5)) == set()


def test_over_seeds_the_mean_is_marked_where_every_draw_agrees(tmp_path):
    draws = table(seeds=(0, 1, 2))
    shifts = {"NoneType": -1.0, "Magnitude": 0.5, "Wanda": [0.1, 0.12, 0.08], "SparseGPT": [0.2, 0.22, 0.19]}
    found = marked(tmp_path, draws, shifts)
    assert {name[1] for name in significance.best(found)} == {"Wanda"}
    assert markdown.tex(draws, rows.rows(draws, tmp_path)).count(r"\textbf") == 1  # not each of its seeds


def test_over_seeds_a_lucky_draw_marks_nothing(tmp_path):
    shifts = {"NoneType": -1.0, "Magnitude": 0.5, "Wanda": [0.1, 0.3, 0.2], "SparseGPT": [0.2, 0.15, 0.3]}
    assert significance.best(marked(tmp_path, table(seeds=(0, 1, 2)), shifts)) == set()


def test_one_method_alone_is_not_the_best_of_anything(tmp_path):
    run = table().runs()[2]
    records.write(small.record(run), tmp_path)
    found = compare.cells(table(), rows.rows(table(), tmp_path))
    assert significance.best(found) == set()
    assert not significance.competes(found)


def test_a_method_that_was_not_measured_leaves_nothing_in_bold(tmp_path):
    shifts = {"NoneType": -1.0, "Magnitude": 0.3, "Wanda": 0.1, "SparseGPT": 0.2}
    found = marked(tmp_path, table(), shifts)
    unmeasured = [replace(cell, rows=(replace(cell.rows[0], record=None),)) for cell in found[-1:]]
    assert significance.best([*found[:-1], *unmeasured]) == set()


def test_higher_accuracy_is_better(tmp_path):
    declared = papers.find("flap.zero_shot")
    found = fill(declared, tmp_path)
    names = {name[-1]: name[1] for name in significance.best(found) if name[2] == "20 %"}
    ranked = {cell.method: cell.ours for cell in found if cell.setting == "20 %" and cell.key.startswith("mean")}
    assert names["score"] == max(ranked, key=ranked.get)


def fill(declared, root):
    """A record for every cell of a declared table, no two alike."""
    for index, run in enumerate(declared.runs()):
        record = small.record(run).model_copy(update={"table": declared.name})
        record.measures.clear()
        for key in (key for what in run.measures for key in what.keys):
            value = {"perplexity": 5.0 + index, "standard_error": 0.1, "nll_per_window": [1.0 + index, 2.0 + index]}
            score = {"score": 0.3 + 0.02 * index, "standard_error": 0.001}
            record.measures[key] = value if "@0shot" not in key else score
        records.write(record, root)
    return compare.cells(declared, rows.rows(declared, root))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A frame of every odd sign, and what `analysis table` writes for made-up records of declared tables."""
    frame = pd.DataFrame({"Method": [ODD, "[a]", "*b"] * 40, ODD: ["-1.5", ODD, "2"] * 40})
    made = [
        latex.tables(frame, frame.iloc[:, 1:] == "2", ("Method",), ODD, "tab:odd_1"),
        latex.notes([ODD], "tab:odd_1"),
    ]
    for name in DECLARED:
        root = tmp_path_factory.mktemp(name)
        fill(papers.find(name), root)
        made.append(markdown.tex(papers.find(name), rows.rows(papers.find(name), root)))
    return made


@pytest.mark.skipif(PDFLATEX is None, reason="no pdflatex here: apt-get install texlive-latex-recommended")
def test_it_compiles_and_stays_on_the_page(texts, tmp_path):
    (tmp_path / "page.tex").write_text(PAGE % "\n\\clearpage\n".join(texts), encoding="utf-8")
    command = [str(PDFLATEX), "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "page.tex"]
    for _ in "ab":  # once more for the references
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, errors="replace")
        assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout
    assert "too large" not in done.stdout
    assert "undefined" not in done.stdout


def test_it_parses(texts):
    walker = pytest.importorskip("pylatexenc.latexwalker", reason="pylatexenc is not installed: requirements-dev.txt")
    for text in texts:
        nodes, _, length = walker.LatexWalker(text, tolerant_parsing=False).get_latex_nodes()
        assert length == len(text)
        assert any(getattr(node, "environmentname", None) == "table" for node in nodes) or text is texts[1]


def test_more_columns_than_a_page_holds_are_cut_and_none_is_lost():
    numbers = {f"n{index}": ["1", "—"] if index < 12 else ["—", "2"] for index in range(24)}
    frame = pd.DataFrame({"Method": ["a", "b"], **numbers})
    text = latex.tables(frame, frame.iloc[:, 1:] == "2", ("Method",), "A caption", "tab:wide")
    parts = text.split(r"\end{table}")[:-1]
    assert len(parts) == 3  # 24 by at most 11
    assert [part.count(r"\textbf{2}") for part in parts] == [0, 4, 8]
    assert ["a &" in part for part in parts] == [True, True, False]
    assert text.count(r"\label") == 1


def test_every_special_sign_is_escaped():
    assert latex.escaped("a_b & 50 % Element^1 #{x}~") == (
        r"a\_b \& 50 \% Element\textasciicircum{}1 \#\{x\}\textasciitilde{}"
    )
    assert latex.escaped("-3.5") == "$-$3.5"
    assert latex.escaped(f"{OTHER_CODE} 1–2") == r"$\dagger$ 1--2"
    assert latex.escaped("日") == "$<$U+65E5$>$"


def test_letters_of_europe_are_themselves():
    assert latex.escaped("späce ünï Łódź † 模") == r"späce ünï Łódź $\dagger$ $<$U+6A21$>$"
