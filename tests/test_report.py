"""The report from made-up records: whole in itself, and working in a real browser."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import small_table as small

from analysis import charts, inside, report, rows, verdicts
from analysis.__main__ import main
from experiments import gblm, records, tables

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--no-first-run", "--enable-logging=stderr", "--virtual-time-budget=4000",
)  # fmt: skip
VALUES = {("Dense", ""): 5.68, ("Magnitude", "50 %"): 17.4, ("Wanda", "50 %"): 7.3, ("SparseGPT", "50 %"): 7.5}
PROBE = """<script>
const column = (id, index) => [...document.getElementById(id).tBodies[0].rows].filter(row => !row.hidden)
  .map(row => row.cells[index].textContent.trim());
const told = {};
const table = document.getElementById("gblm.perplexity-beside");
const head = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent.trim() === "Ours");
table.tHead.rows[0].cells[head].querySelector("button").click();
told.rising = column(table.id, head).slice(0, 4).map(parseFloat);
table.tHead.rows[0].cells[head].querySelector("button").click();
told.falling = column(table.id, head).filter(text => text !== "\u2014").map(parseFloat);
const input = document.querySelector('input[data-filter="gblm.perplexity-beside"]');
input.value = "wanda llama-7b 50"; input.dispatchEvent(new Event("input"));
told.filtered = column(table.id, 0);
told.wide = document.documentElement.scrollWidth <= innerWidth;
document.body.innerHTML = "<pre id=told>" + JSON.stringify(told) + "</pre>";
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
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert not re.search(
        r"https?://", re.sub(r"data:image/svg\+xml;base64,[\w+/=]+", "", page).partition("<script>")[0]
    )
    assert "default-src 'none'" in page


def test_ours_the_papers_the_verdict_and_the_origin_are_there(page):
    assert re.search(r"7\.30 ± 0\.07</td>\s*<td[^>]*>7\.26</td>\s*<td[^>]*>\+0\.04</td>\s*<td class=\"matches\">", page)
    assert page.count("data:image/svg+xml") == 3
    assert "&#34;commit&#34;: &#34;aaaa" in page
    assert "holds (6 of 6)" in page
    assert "llm_pruner.quantised" in page


def test_text_from_records_cannot_become_markup(root, tmp_path):
    failure = small.failure(gblm.perplexity.runs()[0], "<script>alert(1)</script>")
    records.write_failure(failure.model_copy(update={"table": "gblm.perplexity"}), tmp_path)
    assert "<script>alert" not in report.html(tmp_path)


def test_without_records_there_is_no_report(tmp_path, capsys):
    assert main(["report", "--results", str(tmp_path)]) == 2
    assert "No record of any table" in capsys.readouterr().err


def test_every_kind_of_figure_is_written(root):
    for kind in ("perplexity", "paper", "cost"):
        assert main(["figure", "gblm.perplexity", "--kind", kind, "--results", str(root)]) == 0
    assert {path.name for path in root.glob("*.svg")} == {
        "gblm.perplexity.svg", "gblm.perplexity.paper.svg", "gblm.perplexity.cost.svg",
    }  # fmt: skip


@pytest.mark.parametrize("draw", [charts.by_sparsity, charts.against_paper])
def test_a_figure_of_one_point_is_refused(draw, tmp_path):
    run = gblm.perplexity.runs()[0]
    records.write(small.record(run).model_copy(update={"table": "gblm.perplexity"}), tmp_path)
    found = verdicts.cells(gblm.perplexity, rows.rows(gblm.perplexity, tmp_path))
    with pytest.raises(ValueError, match=r"needs two .* at least and there (is 1|are 0); run more"):
        draw(gblm.perplexity, found)


def test_the_sweep_has_a_line_a_method(tmp_path):
    table = tables.find("gblm.sparsity")
    for run in table.runs():
        if run.method is not None and run.model == "llama-30b":
            record = small.record(run).model_copy(update={"table": table.name})
            record.achieved["sparsity"] = run.method.sparsity
            records.write(record, tmp_path)
    (axes,) = charts.by_sparsity(table, verdicts.cells(table, rows.rows(table, tmp_path))).axes
    assert {line.get_label(): len(line.get_xdata()) for line in axes.lines} == {
        "Magnitude": 6, "SparseGPT": 6, "Wanda": 6, "GBLM-Pruner (l1)": 6,
    }  # fmt: skip


def test_what_is_kept_and_the_losses_are_drawn_by_block_and_step(tmp_path):
    table = tables.find("flap.perplexity")
    run = next(run for run in table.runs() if run.method is not None)
    blocks = {
        "before": [{"heads": 8, "channels": 100}] * 3,
        "after": [{"heads": 8 - 2 * i, "channels": 50} for i in range(3)],
    }
    structure = {when: {"blocks": told, "size": {"model": 1}} for when, told in blocks.items()}
    achieved = {"sparsity": 0.2, "structure": structure, "recovery": {"losses": [3.0, 2.5, 2.25]}}
    records.write(small.record(run, achieved=achieved).model_copy(update={"table": table.name}), tmp_path)
    made = rows.rows(table, tmp_path)
    heads, channels = inside.kept(table, made).axes
    assert heads.lines[0].get_ydata().tolist() == [100, 75, 50]
    assert channels.lines[0].get_ydata().tolist() == [50, 50, 50]
    assert inside.losses(table, made).axes[0].lines[0].get_ydata().tolist() == [3.0, 2.5, 2.25]
    with pytest.raises(ValueError, match="two mean accuracies"):
        inside.by_parameters(table, verdicts.cells(table, made))


def chromium(path, tmp_path, *more):
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *more, path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
@pytest.mark.parametrize("size", ["1200,900", "500,900"])
def test_a_browser_opens_sorts_and_filters_it(page, tmp_path, size):
    path = tmp_path / "report.html"
    path.write_text(page.replace("</body>", PROBE), encoding="utf-8")
    done = chromium(path, tmp_path, "--dump-dom", f"--window-size={size}")
    told = re.search(r'<pre id="told">(.*?)</pre>', done.stdout)[1]
    assert '"rising":[5.68,7.3,7.5,17.4]' in told
    assert '"falling":[17.4,7.5,7.3,5.68]' in told
    assert '"filtered":["Wanda"]' in told
    assert '"wide":true' in told
    assert "CONSOLE" not in done.stderr
