"""The figure of masks from made-up records: what is drawn is what was recorded, on one scale of grey."""

from __future__ import annotations

import numpy as np
import pytest
import small_table as small
import torch
from conftest import hollow
from PIL import Image
from torch import nn

import pruners
from analysis import rows
from analysis.__main__ import main
from analysis.figures import masks
from eval.patterns import mask_patterns
from experiments import papers
from experiments.spec import MaskPatterns, Run, Table
from experiments.store import records

METHODS = (None, pruners.Magnitude(sparsity=0.5), pruners.Wanda(sparsity=0.5), pruners.Wanda(sparsity=0.6))


def table(blocks=(0,)) -> Table:
    measures = tuple(MaskPatterns(block) for block in blocks)
    return Table("tiny", "A tiny table", METHODS, (("smollm2-135m",),), lambda m, model: Run(model, m, None, measures))


def measured(share: float, block: int = 0) -> dict:
    """Of two blocks with a matrix whose left half goes, and one that a random share of stays in."""
    draw = torch.Generator().manual_seed(int(100 * share))
    model = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(40, 20), "down_proj": nn.Linear(40, 80)}) for _ in "ab"])
    for inner in model:
        inner["q_proj"].weight.data = (torch.arange(40) >= 20).float().expand(20, 40)
        inner["down_proj"].weight.data = (torch.rand(80, 40, generator=draw) < share).float()
    return mask_patterns(nn.ModuleDict({"layers": model}), block, side=20)


def fill(root, blocks=(0,), declared=None) -> list[rows.Row]:
    declared = declared or table(blocks)
    for run in declared.runs():
        if run.method is not None:
            share = 1 - run.method.asked
            maps = {what.key: measured(share, what.block) for what in run.measures if isinstance(what, MaskPatterns)}
            records.write(small.record(run, measures=maps).model_copy(update={"table": declared.name}), root)
    return rows.rows(declared, root)


def test_every_pruned_cell_has_a_line_and_every_matrix_a_column(tmp_path):
    *panels, bar = masks.masks(table(), fill(tmp_path)).axes
    assert [axes.get_title() for axes in panels[:2]] == ["q_proj", "down_proj"]
    assert [axes.get_ylabel() for axes in panels[::2]] == ["Magnitude\n50 %", "Wanda\n50 %", "Wanda\n60 %"]
    assert bar.get_ylabel() == "weights kept, %"
    assert len({axes.images[0].get_clim() for axes in panels}) == 1


def test_the_maps_are_what_was_recorded_and_dark_is_what_went(tmp_path):
    column, random, *_ = masks.masks(table(), fill(tmp_path)).axes
    drawn = column.images[0].get_array()
    assert drawn.shape == (20, 20)
    assert np.array_equal(drawn, np.repeat([[0.0] * 10 + [99.0] * 10], 20, axis=0))
    assert column.images[0].to_rgba(drawn)[0, 0, 0] < column.images[0].to_rgba(drawn)[0, -1, 0]
    assert 40 < random.images[0].get_array().mean() < 60


def test_the_overdispersion_below_a_map_is_that_of_its_block(tmp_path):
    column, random, *_ = masks.masks(table(), fill(tmp_path)).axes
    told = measured(0.5)["matrices"]
    assert column.get_xlabel() == f"rows 0.0\ncolumns {told['q_proj']['columns'][0]:.1f}"
    assert (
        random.get_xlabel() == f"rows {told['down_proj']['rows'][0]:.1f}\ncolumns {told['down_proj']['columns'][0]:.1f}"
    )


def test_a_matrix_that_nothing_is_left_of_has_no_map(tmp_path, monkeypatch):
    cut = {0.5: hollow("opt", "nothing"), 0.4: hollow("opt", "no head, no channel")}
    monkeypatch.setitem(globals(), "measured", lambda share, block: mask_patterns(cut[round(share, 1)], block))
    *panels, _ = masks.masks(table(), fill(tmp_path)).axes
    assert [axes.get_title() for axes in panels[:2]] == ["fc1", "fc2"]
    assert [np.isnan(axes.images[0].get_array().filled(np.nan)).all() for axes in panels] == [True] * 4 + [False] * 2
    cut[0.4] = cut[0.5]
    with pytest.raises(ValueError, match="That block is empty in every model"):
        masks.masks(table(), fill(tmp_path / "again"))


def test_masks_of_several_blocks_ask_which(tmp_path):
    made = fill(tmp_path, blocks=(0, 1))
    with pytest.raises(
        ValueError, match="choose with --measure one of: mask patterns, block 0, mask patterns, block 1"
    ):
        masks.masks(table((0, 1)), made)
    assert masks.masks(table((0, 1)), made, "mask patterns, block 1").axes


def test_without_masks_there_is_nothing_to_draw(tmp_path):
    plain = small.table((None, pruners.Magnitude(sparsity=0.5)))
    for run in plain.runs("opt-125m"):
        records.write(small.record(run), tmp_path)
    with pytest.raises(ValueError, match="No record has maps"):
        masks.masks(plain, rows.rows(plain, tmp_path, "opt-125m"))


@pytest.mark.parametrize("lines", [["0099", "00"], ["00xx", "0000"], ["009"], []])
def test_a_broken_map_is_refused(lines):
    with pytest.raises(ValueError, match="two-digit percentages"):
        masks.grey(lines)


def test_the_command_writes_both_files(tmp_path):
    fill(tmp_path, declared=papers.find("gblm.patterns"))
    assert main(["figure", "gblm.patterns", "--kind", "masks", "--results", str(tmp_path)]) == 0
    assert Image.open(tmp_path / "gblm.patterns.masks.png").size[0] > 1000
    assert (tmp_path / "gblm.patterns.masks.svg").exists()
