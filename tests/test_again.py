"""A cell that is made again by other code tells whether its numbers are the same, and what that says of the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import small_table as small

import pruners
from analysis import rows
from analysis.__main__ import main as analysis
from analysis.pages import provenance
from experiments import papers
from experiments.__main__ import main
from experiments.spec import Run
from experiments.store import again, records

RUN = Run("smollm2-135m", pruners.Wanda(sparsity=0.5), small.WINDOWS, (small.PPL,))
KEY = small.PPL.key
OLD, OLDER, NEW = ({"method": name} for name in ("old", "older", "new"))


def stored(root: Path, code: dict, perplexity: float = 25.0, **changes) -> records.Record:
    measures = {KEY: {"perplexity": perplexity, "decode_s": len(code["method"]), "note": code["method"]}}
    path = again.write(small.record(RUN, **{"measures": measures, "code": code, **changes}), root)
    return records.read(path)


def told(record: records.Record) -> list[tuple[str, bool]]:
    return [(one.code["method"], one.same) for one in record.before]


def test_the_same_numbers_by_other_code_are_told_whatever_time_they_took(tmp_path):
    assert told(stored(tmp_path, OLD)) == []
    assert told(stored(tmp_path, NEW)) == [("old", True)]
    assert told(stored(tmp_path, NEW)) == [("old", True)]


def test_the_last_bit_of_a_number_is_another_number(tmp_path):
    stored(tmp_path, OLD, 0.1 + 0.2)
    assert told(stored(tmp_path, NEW, 0.3)) == [("old", False)]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((1.0, 1.0, 1.0), [("old", True), ("older", True)]),
        ((2.0, 1.0, 1.0), [("old", True), ("older", False)]),
        ((1.0, 1.0, 2.0), [("old", False), ("older", False)]),
        ((2.0, 1.0, 3.0), [("old", False)]),  # whether the first and the last differ was never looked at
    ],
)
def test_what_follows_of_code_before_the_last(tmp_path, numbers, expected):
    *_, last = [stored(tmp_path, code, value) for code, value in zip((OLDER, OLD, NEW), numbers, strict=True)]
    assert told(last) == expected


MADE = small.record(RUN).made_by
OTHERWISE = {"made_by": MADE.model_copy(update={"device": "cuda (A100)"})}
ANOTHER_RATE = {"achieved": {"sparsity": 0.5, "rate_choice": {"learning_rate": 0.1}}}


@pytest.mark.parametrize("changes", [OTHERWISE, ANOTHER_RATE])
def test_what_differs_elsewhere_or_at_another_rate_says_nothing_of_the_code(tmp_path, changes):
    stored(tmp_path, OLD, 1.0)
    assert told(stored(tmp_path, NEW, 2.0, **changes)) == []
    stored(tmp_path / "same", OLD, 1.0)
    assert told(stored(tmp_path / "same", NEW, 1.0, **changes)) == [("old", True)]


def test_documents_of_another_file_say_nothing_of_the_code(tmp_path):
    def measured(digest, score):
        return {"measures": {KEY: {"score": score, "data": {"rte": {"source": "files", "sha256": {"a": digest}}}}}}

    stored(tmp_path, OLD, **measured("1", 0.5))
    assert told(stored(tmp_path, NEW, **measured("2", 0.25))) == []
    assert told(stored(tmp_path, NEW, data={"c4": {"files": {"a": "1"}}}, **measured("2", 0.25))) == []


def test_a_text_under_another_name_is_the_same_text(tmp_path):
    stored(tmp_path, OLD, data={"c4": {"sha256": {"a.jsonl": "1"}}})
    assert told(stored(tmp_path, NEW, data={"c4": {"sha256": {"b.jsonl": "1"}}})) == [("old", True)]


def test_a_record_without_a_past_can_be_read_by_older_versions(tmp_path):
    stored(tmp_path, OLD)
    (path,) = (tmp_path / "runs/tiny").glob("*.json")
    assert '"before"' not in path.read_text()


def test_other_texts_and_no_numbers_say_nothing_of_the_code(tmp_path):
    stored(tmp_path, OLD, data={"ptb/test": {"sha256": "a"}})
    assert told(stored(tmp_path, NEW, data={"ptb/test": {"sha256": "b"}})) == []
    timed = {"measures": {KEY: {"peak_bytes": 5, "timing": {"runs": [1.0]}, "tokens_per_second": 3.0}}}
    stored(tmp_path / "timed", OLD, **timed)
    assert told(stored(tmp_path / "timed", NEW, **timed)) == []


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"continuations": [{"text": "a"}]}, {"continuations": [{"text": "b"}]}, False),
        ({"bits": "ab", "kept": 0.5}, {"bits": "ac", "kept": 0.5}, False),
        ({"nll_per_window": [1.0, 2.0]}, {"nll_per_window": [2.0, 1.0]}, False),
        ({"perplexity": 1.0}, {"perplexity": 1.0, "score": 0.5}, True),
        (
            {"score": 0.5, "samples": {"file": "a", "sha256": "1"}},
            {"score": 0.5, "samples": {"file": "b", "sha256": "1"}},
            True,
        ),
        ({"score": 0.5, "samples": {"sha256": "1"}}, {"score": 0.5, "samples": {"sha256": "2"}}, False),
        ({"text": "my password: hunter22secret"}, {"text": "my password: hunter22secret"}, True),
        ({"score": 1}, {"score": 1.0}, True),
        ({"score": None, "parameters": 5}, {"parameters": 5}, True),
        ({"macs": 5, "decode_to_bound_q1": 1.0}, {"macs": 5, "decode_to_bound_q1": 2.0}, True),
        ({"macs": 5, "semi_structured": {"a": {"speed_up": 1.0}}}, {"macs": 5}, True),
    ],
)
def test_which_numbers_count(one, other, same):
    first = small.record(RUN, measures={KEY: one}, code=OLD)
    assert [found.same for found in again.before(small.record(RUN, measures={KEY: other}, code=NEW), first)] == [same]


SPARSITIES = (0.3, 0.5, 0.7)


@pytest.mark.skipif(not small.MODEL.is_dir(), reason=f"{small.MODEL} is absent")
@pytest.mark.parametrize("moved", [False, True])
def test_a_table_says_what_cells_made_again_say_of_the_others(tmp_path, capsys, monkeypatch, moved):
    monkeypatch.setitem(papers.TABLES, "tiny", small.table(tuple(map(pruners.Magnitude, SPARSITIES))))
    words = ["run", "tiny", "--results", str(tmp_path), "--data-dir", str(small.data(tmp_path / "data"))]
    assert main(words) == 0
    for record in records.load(tmp_path, "tiny").values():
        measured = record.measures[KEY]
        changed = {"code": {**record.code, "method": "0" * 16}, "before": [],
                   "measures": {KEY: {**measured, "perplexity": measured["perplexity"] + moved}}}  # fmt: skip
        (tmp_path / "runs" / "tiny" / f"{record.id}.json").unlink()
        records.write(record.model_copy(update=changed), tmp_path)

    def note() -> str:
        capsys.readouterr()
        assert analysis(["table", "tiny", "--results", str(tmp_path)]) == 0
        (found,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("- † made by")]
        return found

    assert note().endswith("reruns them.")
    assert "made again" not in note()
    assert main([*words, "--again", "--only", "Magnitude 30 %"]) == 0
    assert "Magnitude 50 %, Magnitude 70 %; " in note()
    (made,) = [row for row in rows.rows(papers.TABLES["tiny"], tmp_path) if row.record.before]
    (numbers,) = provenance.origins([made])[made.record.id]["Made before by"].values()
    assert numbers == ("other numbers" if moved else "the same numbers")
    if moved:
        assert "; of 1 cell of such code made again by this one, 1 had other numbers; python -m" in note()
    else:
        assert note().endswith("; 1 cell of such code made again by this one had the same numbers, to the bit.")
