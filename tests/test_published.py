"""The papers' values: as the transcriptions have them, tidy, each cell once, in base units."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pandas as pd
import pytest

from analysis import published
from experiments.models import catalogue
from tools import import_published

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "published"
needs_source = pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/published is absent")
ROW = dict.fromkeys(import_published.SOURCE, "") | {"table": "Table 1 (x)", "model": "LLaMA-1-7B", "method": "Wanda"}
ROW |= {"setting": "unstructured 50%", "dataset": "WikiText-2", "metric": "perplexity", "value": "7.26", "unit": "ppl"}
ROW |= {"seq_len": "2048", "confidence": "high"}


def tidy(tmp_path: Path, *changes: dict[str, str], **columns: str) -> pd.DataFrame:
    path = tmp_path / "wanda.csv"
    pd.DataFrame([ROW | change | columns for change in changes]).to_csv(path, index=False)
    return import_published.tidy(path, "wanda")


def found(paper: str, table: str, model: str, method: str, setting: str, protocol: str) -> published.Published:
    key = (table, model, method, setting, protocol)
    (cell,) = (c for c in published.read(paper) if (c.table, c.model, c.method, c.setting, c.protocol) == key)
    return cell


@needs_source
def test_the_tables_are_what_the_script_makes_of_their_source(tmp_path):
    assert import_published.main([str(SHARED), "--target", str(tmp_path)]) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == sorted(path.name for path in published.FOLDER.glob("*.csv"))
    assert filecmp.cmpfiles(tmp_path, published.FOLDER, names, shallow=False)[0] == names


def test_known_cells_have_their_value_protocol_and_precision():
    cell = found("flap", "table 1", "llama-7b", "FLAP", "20 %", "wikitext2/test@128")
    assert (cell.value, cell.rounding, cell.caveat) == (14.62, 0.005, "")
    mean = found("llm_pruner", "table 1", "llama-7b", "Element^2 (Block)", "20 %, tuned", "mean.llm_pruner@0shot")
    assert mean.value == pytest.approx(0.6007)
    assert mean.rounding == pytest.approx(5e-5)
    counted = found("flap", "table 4", "llama-7b", "FLAP", "20 %", "efficiency")
    assert counted.value == pytest.approx(5.443e9, rel=1e-3)
    assert "1024^3" in counted.note


def test_copied_and_presumed_cells_say_so():
    copied = found("flap", "table 1", "llama-7b", "LLM-Pruner", "20 %", "wikitext2/test@128")
    assert copied.caveat == "FLAP copied it from LLM-Pruner's paper"
    assert found("llm_pruner", "table 4", "vicuna-7b-v0", "L2", "20 %", "wikitext2/test@128").caveat == ""
    assert all(cell.caveat for cell in published.read("llm_pruner") if "superseded" in cell.table)


def test_dense_values_agree_with_the_catalogue():
    dense = [
        c for p in ("gblm", "wanda", "sparsegpt") for c in published.read(p) if c.method == "Dense" and not c.caveat
    ]
    for cell in dense:
        known = catalogue.CATALOGUE[cell.model].dense if cell.model in catalogue.CATALOGUE else {}
        if cell.protocol in known:
            assert cell.value == pytest.approx(known[cell.protocol], rel=0.005)


def test_words_are_no_numbers(tmp_path):
    frame = tidy(tmp_path, {"value": "3 to 5"}, {"value": "nan", "model": "x"}, {"value": "2e4", "model": "y"})
    assert frame.value.isna().tolist() == [True, True, False]
    assert frame.rounding[2] == 5000


def test_an_unknown_column_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has the columns .*surprise; expected paper, table"):
        tidy(tmp_path, {}, surprise="!")


def test_a_cell_printed_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"table 1 / llama-7b / Wanda / 50 % .* twice \(7.26 ppl and 9.99 ppl\)"):
        tidy(tmp_path, {}, {"value": "9.99"})


def test_a_tidy_table_that_was_edited_is_refused(tmp_path):
    tidy(tmp_path, {}).assign(extra=1).to_csv(tmp_path / "odd.csv", index=False)
    with pytest.raises(ValueError, match=r"wrong columns .*\(extra\)"):
        published.read("odd", tmp_path)


@pytest.mark.parametrize(
    ("column", "value", "said"), [("value", "abc", "value must be a number or empty; got 'abc'"),
                                  ("paper", "garbage", "is not a cell of odd"), ("metric", "", "is not a cell of odd")],
)  # fmt: skip
def test_a_broken_line_is_named(tmp_path, column, value, said):
    frame = tidy(tmp_path, {}, {"dataset": "another"}).astype(object).assign(paper="odd")
    frame.loc[1, column] = value
    frame.to_csv(tmp_path / "odd.csv", index=False)
    with pytest.raises(ValueError, match=rf"odd\.csv, line 3:? {said}"):
        published.read("odd", tmp_path)


def test_unknown_papers_and_tables_get_the_nearest_names():
    with pytest.raises(LookupError, match="wanda"):
        published.read("wander")
    with pytest.raises(LookupError, match="table 23"):
        published.of("wanda: table 2, table 230")


def test_memory_after_loading_is_that_of_the_weights_and_speed_is_the_machine_s():
    memory = [
        cell for cell in published.read("llm_pruner") if cell.place == "llm_pruner: table 3" and "MiB" in cell.printed
    ]
    assert [(cell.metric, cell.protocol, cell.caveat) for cell in memory] == [("weight_bytes", "efficiency", "")] * 5
    dense = memory[0].value
    assert dense == pytest.approx(2 * 6_738_415_616 + 32 * 2**20, abs=memory[0].rounding)  # and its rotary tables
    speed = [cell for cell in published.read("flap") if cell.metric == "tokens_per_second"]
    assert {cell.protocol for cell in speed} == {"efficiency@1x128+128"}
    assert all("belong to the paper's machine" in cell.caveat for cell in speed)
