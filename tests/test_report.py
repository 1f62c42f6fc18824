"""The report from made-up records: whole in itself, and working in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html import escape, unescape
from pathlib import Path

import pytest
import small_table as small

import pruners
from analysis import compare, rows
from analysis.__main__ import main
from analysis.figures import cost, structure, style, sweeps, training
from analysis.pages import provenance, report
from analysis.tables import grid
from experiments import papers
from experiments.papers import gblm
from experiments.recovery import Retraining
from experiments.spec import Run, Table
from experiments.store import records
from pruners.retrain import Trainable

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--enable-logging=stderr", "--virtual-time-budget=4000",
)  # fmt: skip
RESULTS = Path(__file__).resolve().parents[1] / "results"
VALUES = {("Dense", ""): 5.68, ("Magnitude", "50 %"): 17.4, ("Wanda", "50 %"): 7.3, ("SparseGPT", "50 %"): 7.5}
PROBE = """<script>
const column = (id, index) => [...document.getElementById(id).tBodies[0].rows].filter(row => !row.hidden)
  .map(row => row.cells[index].textContent.trim());
const sorted = (id, name) => { const cells = [...document.getElementById(id).tHead.rows[0].cells];
  const at = cells.findIndex(cell => cell.textContent.trim() === name);
  cells[at].querySelector("button").click(); return column(id, at); };
const filtered = (id, words) => { const input = document.querySelector(`input[data-filter="${id}"]`);
  input.value = words; input.dispatchEvent(new Event("input")); return column(id, 0); };
const told = {}, id = "gblm.perplexity-beside";
told.rising = sorted(id, "Ours").slice(0, 4).map(parseFloat);
told.falling = sorted(id, "Ours").filter(text => text !== "\u2014").map(parseFloat);
told.filtered = filtered(id, "wanda llama-7b 50");
told.pivot = sorted("gblm.perplexity-pivot-1", "llama-7b 50 %").slice(0, 4).map(parseFloat);
told.claims = filtered("claims", "gblm-pruner magnitude");
[...document.querySelectorAll("td button[data-of]")].find(button => button.textContent.startsWith("7.30")).click();
told.origin = dialog.open && dialog.textContent.replace(/\\s+/g, " ");
told.inside = dialog.getBoundingClientRect().width <= innerWidth;
dialog.querySelector("form button").click();
told.closed = !dialog.open;
told.fits = document.documentElement.scrollWidth <= innerWidth;
parent.document.body.textContent = JSON.stringify(told);
</script></body>"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    place = tmp_path_factory.mktemp("results")
    for run in gblm.perplexity.runs():
        if run.model == "llama-7b" and (value := VALUES.get(gblm.label(run))):
            record = small.record(run).model_copy(update={"table": "gblm.perplexity"})
            for measured in record.measures.values():
                measured["perplexity"] = value
            records.write(record, place)
    return place


@pytest.fixture(scope="module")
def page(root):
    return report.html(root)


def test_the_page_holds_everything_and_asks_for_nothing(page):
    figures = r'src="data:image/svg\+xml,[^"]*"'  # an SVG names its namespace; as an image it can fetch nothing
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|https?://""", re.sub(figures, "", page))
    assert "default-src 'none'" in page


def test_ours_the_papers_the_verdict_and_the_origin_are_there(page):
    assert re.search(
        r"7\.30 ± 0\.07</td>\s*<td[^>]*>7\.26</td>\s*<td[^>]*>\+0\.04</td>\s*<td class=\"good\">matches", page
    )
    assert page.count("data:image/svg+xml") == 3
    assert f'"commit":"{"a" * 40}"' in page
    assert re.search(r'"good">holds</span>\s*<small>6 of 6</small>', page)
    assert "llm_pruner.quantised" in page


def test_text_from_records_cannot_become_markup(root, tmp_path):
    failure = small.failure(gblm.perplexity.runs()[0], "<script>alert(1)</script>")
    records.write_failure(failure.model_copy(update={"table": "gblm.perplexity"}), tmp_path)
    assert "<script>alert" not in report.html(tmp_path)


def test_of_many_cells_only_what_the_papers_draw_is_drawn_unless_asked(root, page, tmp_path, monkeypatch, capsys):
    hint = f"Figures: <code>python -m analysis figure gblm.perplexity --results {root}</code>"
    assert hint not in page
    monkeypatch.setattr(report, "FEW_CELLS", 0)
    few = report.html(root)
    assert few.count("data:image/svg+xml") == 0
    assert hint in few
    shutil.copytree(root / "runs", tmp_path / "runs")
    for asked, drawn in (("all", 3), ("few", 0)):
        assert main(["report", "--results", str(tmp_path), "--figures", asked]) == 0
        assert (tmp_path / "report.html").read_text().count("data:image/svg+xml") == drawn


def test_a_table_on_another_model_stands_beside_the_declared_one(root, tmp_path, monkeypatch):
    shutil.copytree(root / "runs", tmp_path / "runs")
    (dense, *_) = papers.runs(gblm.perplexity, "vicuna-7b")
    records.write(small.record(dense).model_copy(update={"table": "gblm.perplexity"}), tmp_path)
    monkeypatch.setattr(report.figures, "KINDS", {})
    for model, places in (("vicuna-7b", ["", "-asked"]), ("mistral-7b", [""])):  # of which there is no record
        page = report.html(tmp_path, variants={"gblm.perplexity": (model, None, None, [])})
        assert re.findall(r'<section id="gblm\.perplexity(.*)-section"', page) == places
    page = report.html(tmp_path, variants={"gblm.perplexity": ("vicuna-7b", None, None, [])})
    declared, asked = re.findall(r'<section id="gblm\.perplexity.*?</section>', page, re.S)
    assert "7.30 ± 0.07" in declared
    assert "vicuna-7b" not in declared
    assert re.search(r"<h2>.*: vicuna-7b</h2>", asked)
    assert f"python -m experiments run gblm.perplexity --model vicuna-7b --results {tmp_path}<" in asked


def test_facts_of_many_cells_are_written_once():
    made_by = {"commit": "a" * 40, "torch": "2"}
    told = {name: {"cell": name, "Made by": made_by, "Cost": {"prune, s": cost}} for name, cost in (("a", 1), ("b", 2))}
    shared = provenance.shared(told)
    assert shared["groups"] == [made_by, {"prune, s": 1}, {"prune, s": 2}]
    assert shared["cells"] == {
        "a": {"cell": "a", "Made by": 0, "Cost": 1},
        "b": {"cell": "b", "Made by": 0, "Cost": 2},
    }


def test_without_records_there_is_no_report(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path)]) == 2
    assert "No record of any table" in capsys.readouterr().err


def test_every_kind_of_figure_is_written(root):
    for kind in ("perplexity", "paper", "cost"):
        assert main(["figure", "gblm.perplexity", "--kind", kind, "--results", str(root)]) == 0
    assert {path.name for path in root.glob("*.svg")} == {
        "gblm.perplexity.svg", "gblm.perplexity.paper.svg", "gblm.perplexity.cost.svg",
    }  # fmt: skip


@pytest.mark.parametrize("draw", [sweeps.by_sparsity, sweeps.against_paper])
def test_a_figure_of_one_point_is_refused(draw, tmp_path):
    run = gblm.perplexity.runs()[0]
    records.write(small.record(run).model_copy(update={"table": "gblm.perplexity"}), tmp_path)
    made = rows.rows(gblm.perplexity, tmp_path)
    with pytest.raises(ValueError, match=r"needs at least two .* and there (is 1|are 0); run more"):
        draw(gblm.perplexity, made)


def test_one_sparsity_that_methods_reach_more_or_less_is_no_sweep(tmp_path):
    for index, run in enumerate(gblm.zero_shot.runs()[1:]):
        record = small.record(replace(run, measures=gblm.PPL)).model_copy(update={"table": "gblm.zero_shot"})
        record.achieved["sparsity"] = 0.5 + 0.001 * index
        records.write(record, tmp_path)
    table = replace(gblm.zero_shot, run=lambda *column: replace(gblm.zero_shot.run(*column), measures=gblm.PPL))
    with pytest.raises(ValueError, match="needs at least two sparsities and there is 1"):
        sweeps.by_sparsity(table, rows.rows(table, tmp_path))


@pytest.mark.parametrize("name", ["embedded.sources", "embedded.architectures", "embedded.order"])
def test_cells_of_one_sparsity_each_are_no_sweep(name):
    """They differ in text or model or kind of method; a line through them would be one of nothing."""
    table = papers.find(name)
    with pytest.raises(ValueError, match=r"needs at least two sparsities and there (is 1|are 0)"):
        sweeps.by_sparsity(table, rows.rows(table, RESULTS))


def swept(name, model, root):
    """By line of the figure its points, where every cell of the model has removed what was asked."""
    table = papers.find(name)
    for run in table.runs():
        if run.method is not None and run.model == model:
            record = small.record(run).model_copy(update={"table": table.name})
            record.achieved["sparsity"] = run.method.asked
            records.write(record, root)
    (axes,) = sweeps.by_sparsity(table, rows.rows(table, root)).axes
    return {line.get_label(): len(line.get_xdata()) for line in axes.lines}


def test_cells_that_were_tuned_have_a_line_of_their_own(tmp_path):
    """In the paper's words, whose 20 % are 25 % of LLM-Pruner's groups."""
    points = swept("flap.perplexity", "llama-7b", tmp_path)
    assert (points["FLAP"], points["LLM-Pruner"], points["LLM-Pruner, tuned"]) == (3, 2, 2)
    assert not [name for name in points if "%" in name]


def test_the_sweep_has_a_line_a_method(tmp_path):
    assert swept("gblm.sparsity", "llama-30b", tmp_path) == {
        "Magnitude": 6, "SparseGPT": 6, "Wanda": 6, "GBLM-Pruner (l1)": 6,
    }  # fmt: skip


def test_what_is_kept_and_the_losses_are_drawn_by_block_and_step(tmp_path):
    table = papers.find("flap.perplexity")
    run = next(run for run in table.runs() if run.method is not None)
    blocks = {
        "before": [{"heads": 8, "channels": 100}] * 3,
        "after": [{"heads": 8 - 2 * i, "channels": 50} for i in range(3)],
    }
    shape = {when: {"blocks": told, "size": {"model": 1}} for when, told in blocks.items()}
    achieved = {"sparsity": 0.2, "structure": shape, "recovery": {"losses": [3.0, 2.5, 2.25]}}
    records.write(small.record(run, achieved=achieved).model_copy(update={"table": table.name}), tmp_path)
    made = rows.rows(table, tmp_path)
    heads, channels = structure.kept(table, made).axes
    assert heads.lines[0].get_ydata().tolist() == [100, 75, 50]
    assert channels.lines[0].get_ydata().tolist() == [50, 50, 50]
    assert training.losses(table, made).axes[0].lines[0].get_ydata().tolist() == [3.0, 2.5, 2.25]
    with pytest.raises(ValueError, match="two mean accuracies"):
        structure.by_parameters(table, made)


def test_perplexity_by_step_has_a_line_a_corpus(tmp_path):
    table = papers.find("llm_pruner.tuning_steps")
    for step, run in enumerate(table.runs(), start=-1):  # the dense model first, which is no step
        measured = {what.key: {"perplexity": 20.0 + 10 * i - step} for i, what in enumerate(run.measures[:2])}
        record = small.record(run, measures=measured).model_copy(update={"table": table.name})
        records.write(record, tmp_path)
        if step == 0:
            with pytest.raises(ValueError, match="at least two steps of retraining and there are 0"):
                training.steps(table, rows.rows(table, tmp_path))
    (axes,) = training.steps(table, rows.rows(table, tmp_path)).axes
    wikitext, ptb = axes.lines
    assert wikitext.get_xdata().tolist() == list(range(0, 1600, 200))
    assert wikitext.get_ydata().tolist() == [20.0 - step for step in range(8)]
    assert ptb.get_label() == "ptb/validation@128"


def stopped(tmp_path, sparsities, recoveries):
    """Rows of magnitude pruning, retrained as said."""

    def run(sparsity, model, recovery):
        return Run(model, pruners.Magnitude(sparsity=sparsity), None, (small.PPL,), recovery=recovery)

    table = Table("tiny", "Steps", sparsities, tuple(("smollm2-135m", one) for one in recoveries), run)
    for run in table.runs():
        records.write(small.record(run), tmp_path)
    return table, rows.rows(table, tmp_path)


SCHEDULE = Retraining(Trainable(norms=True), small.WINDOWS, steps=8, learning_rate=1e-3)


def test_a_line_of_steps_is_of_one_sparsity_one_schedule_and_one_seed(tmp_path):
    others = (replace(SCHEDULE, seed=1), replace(SCHEDULE, learning_rate=1e-2))
    table, made = stopped(tmp_path, (0.5, 0.6), (None, replace(SCHEDULE, stop=4), SCHEDULE, *others))
    (line,) = training.steps(table, made).axes[0].lines
    assert line.get_xdata().tolist() == [0, 4, 8]


def test_two_cells_at_one_step_are_no_line(tmp_path):
    table, made = stopped(tmp_path, (0.5,), (None, replace(SCHEDULE, stop=4), replace(SCHEDULE, stop=8), SCHEDULE))
    with pytest.raises(style.UndrawableError, match="Several cells of tiny are at step 8"):
        training.steps(table, made)


def test_only_a_figure_that_lacks_numbers_is_left_out(root, monkeypatch):
    def broken(*_):
        raise ValueError("broken")

    monkeypatch.setattr(cost, "cost", broken)
    with pytest.raises(ValueError, match="broken"):
        report.html(root)


@pytest.fixture(scope="module", params=[1200, 375], ids=["desktop", "phone"])
def told(page, request, tmp_path_factory):
    """What the page does in a browser's frame of that many pixels: no window is as narrow as a phone."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    folder = tmp_path_factory.mktemp("browser")
    framed = escape(page.replace("</body>", PROBE), quote=True)
    outer = f'<!doctype html><body><iframe style="width:{request.param}px;height:800px" srcdoc="{framed}"></iframe>'
    (folder / "outer.html").write_text(outer, encoding="utf-8")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", "--window-size=1300,900"]
    done = subprocess.run([*command, (folder / "outer.html").as_uri()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    return json.loads(unescape(re.search(r"<body>(.*)</body>", done.stdout, re.DOTALL)[1]))


def test_a_browser_sorts_and_filters(told):
    assert told["rising"] == told["pivot"] == [5.68, 7.3, 7.5, 17.4]
    assert told["falling"] == [17.4, 7.5, 7.3, 5.68]
    assert told["filtered"] == ["Wanda"]
    assert told["claims"] == ["GBLM-Pruner's perplexity is below magnitude pruning's at 50 %."]


def test_a_click_on_a_number_tells_its_origin(told):
    assert re.match(r"Wanda 50 %.* Close", told["origin"])
    for what in ("wikitext2/test@2048", "seed 0", "c4/train", "commit" + "a" * 40, "results/runs/gblm.perplexity/"):
        assert what in told["origin"]
    assert told["closed"]


def test_it_fits_the_screen(told):
    assert told["fits"]
    assert told["inside"]


def test_the_dense_model_stands_in_every_column_and_half_a_mean_is_none(tmp_path):
    table = papers.find("embedded.gblm")
    for run in table.runs():
        if run.method is None or (table.label(run)[0] == "Wanda" and run.windows.seed < 2):
            records.write(small.record(run).model_copy(update={"table": table.name}), tmp_path)
    pivot = grid.pivots(compare.cells(table, rows.rows(table, tmp_path)))[0]
    lines = {method: [grid.value(cell) for cell in cells] for method, cells in pivot.lines}
    assert pivot.heads == ["50 %", "2:4"]
    assert lines["Dense"] == ["25.00", "25.00"]
    assert lines["Wanda"] == ["2 of 3 runs"] * 2
    assert lines["SparseGPT"] == ["—", "—"]


def test_a_grid_of_which_nothing_is_known_is_left_out(tmp_path):
    table = papers.find("embedded.demo")
    made = small.record(table.runs()[0])
    first = next(iter(made.measures))
    only = {"table": table.name, "measures": {first: made.measures[first]}}
    records.write(made.model_copy(update=only), tmp_path)
    found = compare.cells(table, rows.rows(table, tmp_path))
    assert len({cell.key for cell in found if grid.is_headline(cell)}) == 2
    assert [pivot.key for pivot in grid.pivots(found)] == [first]


def test_seeds_are_told_apart_and_a_failure_is_told(tmp_path):
    table = papers.find("embedded.gblm")
    wanda = [run for run in table.runs() if table.label(run) == ("Wanda", "50 %")]
    for run in wanda[:2]:
        records.write(small.record(run).model_copy(update={"table": table.name}), tmp_path)
    records.write_failure(small.failure(wanda[2], "no memory").model_copy(update={"table": table.name}), tmp_path)
    made = [row for row in rows.rows(table, tmp_path) if row.state != "missing"]
    told = list(provenance.origins(made).values())
    assert [one["cell"] for one in told] == ["Wanda 50 %, seed 0", "Wanda 50 %, seed 1", "Wanda 50 %, seed 2"]
    assert told[2]["Failed"]["reason"] == "no memory"
