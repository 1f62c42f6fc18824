"""README's results, their report and figures are what the kept records say; and how they are written."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest
import small_table as small

from analysis.__main__ import main
from analysis.claims import statements
from analysis.claims.judge import Answer
from analysis.pages import readme
from analysis.tables import grid
from experiments import papers
from experiments.store import records

TABLES = f"{readme.TABLES_BEGIN}\n{readme.TABLES_END}"
RESULTS = Path(__file__).resolve().parents[1] / "results"
DRIFTED = (
    "{} is not what the records under results/runs say: run `python -m analysis readme` and commit what it writes."
)


def without_figures(page):
    return re.sub(r'data:image/svg\+xml,[^"]*', "", page)


@pytest.fixture(scope="module")
def written():
    return readme.written(RESULTS)


def test_nothing_drifted_from_the_records(written):
    for path, text in written.items():
        assert path.is_file(), DRIFTED.format(path)
        kept = path.read_text(encoding="utf-8")
        if path.suffix == ".svg" and f"Matplotlib v{matplotlib.__version__}," not in kept:
            continue  # another release of matplotlib draws the same numbers a little differently
        assert without_figures(kept) == without_figures(text), DRIFTED.format(path)


def test_the_report_shows_every_kept_table_and_draws_it(written):
    (page,) = (text for path, text in written.items() if path.name == "report.html")
    sections = dict(re.findall(r'<section id="(embedded[.][a-z_]+)-section">(.*?)</section>', page, re.S))
    there = {path.name for path in (RESULTS / "runs").iterdir() if list(path.glob("*.json"))}
    kept = {name for name in there if name.startswith("embedded.")} - {readme.REHEARSAL}
    assert sections.keys() == kept
    for name, section in sections.items():
        assert "data:image/svg+xml" in section, name
        assert ("How far the calibration windows move" in section) == (name in ("embedded.order", "embedded.sources"))
    left = page.partition("Not on this page</h2>")[2].partition("</ul>")[0]
    assert not [name for name in kept if f"<code>{name}</code>" in left]


@pytest.fixture
def root(tmp_path):
    (tmp_path / "README.md").write_text(f"# Title\n\n{TABLES}\n{readme.BEGIN}\nstale\n{readme.END}\n\nThe rest.\n")
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def store(root, table, method, perplexities):
    """One record a seed of this method at 50 %."""
    runs = [run for run in papers.find(table).runs() if papers.find(table).label(run) == (method, "50 %")]
    for run, value in zip(runs, perplexities, strict=True):
        record = small.record(run).model_copy(update={"table": table})
        for measured in record.measures.values():
            measured |= {"perplexity": value, "nll_per_window": [1.0, 2.0]}
        records.write(record, root)


def test_without_records_it_says_so(root):
    assert main(["readme", "--results", str(root)]) == 0
    text = (root.parent / "README.md").read_text()
    assert text.startswith("# Title\n")
    assert text.endswith("The rest.\n")
    assert text.count("no records yet") == 4
    assert "stale" not in text
    assert not (root / "embedded").exists()


def test_a_mean_its_interval_and_a_sentence_stand_there(root):
    store(root, "embedded.gblm", "Wanda", [20.0, 21.0, 22.0])
    store(root, "embedded.gblm", "Magnitude", [30.0])
    for other in ("SparseGPT", "GBLM-Pruner (l1)"):
        store(root, "embedded.gblm", other, [40.0, 41.0, 42.0])
    readme.write(root)
    text = (root.parent / "README.md").read_text()
    assert re.search(r"\| Wanda +\| \*\*21\.00 ± 2\.48\*\* \| +— \|", text)
    assert re.search(r"\| Magnitude +\| +30\.00 \| +— \|", text)
    assert (
        "256 tokens as `embedded/wiki@512[:128]`; calibrated on 32 x 512 tokens of embedded/c4; 10 of 21 cells" in text
    )
    assert "no doubt: 1 hold, 1 hold so far, 2 fail, 1 undecided, 36 not run yet, 1 without a cell here." in text
    for link in re.findall(r"\]\((results/[^)]+)\)", text):
        assert (root.parent / link).is_file()


def test_other_tables_move_nothing_and_a_changed_number_does(root):
    store(root, "embedded.gblm", "Wanda", [20.0, 21.0, 22.0])
    before = readme.written(root)
    other = papers.find("embedded.demo").runs()[0]
    records.write(small.record(other).model_copy(update={"table": "embedded.demo"}), root)
    assert readme.written(root) == before
    store(root, "embedded.gblm", "Wanda", [20.0, 21.0, 22.1])
    after = readme.written(root)
    assert all(after[path] != text for path, text in before.items())


@pytest.mark.parametrize(
    "text",
    ["nothing", f"{TABLES}{readme.BEGIN}", TABLES + f"{readme.BEGIN}{readme.END}" * 2, f"{readme.BEGIN}{readme.END}"],
)
def test_a_readme_without_a_place_is_refused(root, text):
    (root.parent / "README.md").write_text(text)
    with pytest.raises(ValueError, match="must have each of these lines once"):
        readme.written(root)


def test_without_a_readme_one_sentence_says_so(root, capsys):
    (root.parent / "README.md").unlink()
    assert main(["readme", "--results", str(root)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"There is no {root.parent / 'README.md'}")
    assert error.count("\n") == 1


def test_a_failure_alone_is_no_record_yet(root):
    failure = small.failure(papers.find("embedded.gblm").runs()[0], "no memory")
    records.write_failure(failure.model_copy(update={"table": "embedded.gblm"}), root)
    readme.write(root)
    assert (root.parent / "README.md").read_text().count("no records yet") == 4


def test_a_table_is_told_the_sentences_that_it_answers(root):
    store(root, "embedded.gblm", "Wanda", [20.0, 21.0, 22.0])
    store(root, "embedded.gblm", "Magnitude", [19.0])
    judged = grid.judged(statements.CLAIMS, root)
    told = {one.claim.name: one for one in grid.about("embedded.gblm", judged)}
    assert list(told) == ["wanda-magnitude"]
    assert told["wanda-magnitude"].noisy.verdict == "undecided"
    assert told["wanda-magnitude"].ours.verdict == "fails"
    assert grid.about("embedded.flap", judged) == []


def test_what_does_not_hold_is_named_once_for_the_model():
    one = Answer("fails", held=1, of=2, against=["smollm2-135m FLAP 20 %"], where="smollm2-135m")
    assert grid.against(one) == "1 of 2; against it: FLAP 20 %"
    assert grid.against(Answer("holds", held=1, of=1)) == ""
    assert grid.against(Answer("holds so far", held=1, of=1, without=1)) == "1 of 1; 1 of 2 not measured"
