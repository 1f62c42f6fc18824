"""Figures from made-up records: one mark for several seeds, nothing merged that differs, nothing beyond the canvas."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import made_up
import numpy as np
import pytest
import small_table as small
from matplotlib.text import Text
from PIL import Image

import pruners
from analysis import rows
from analysis.figures import cost, numbers, perplexity, structure, sweeps, training
from experiments import papers
from experiments.spec import Run, Table, needs_windows
from experiments.store import records

METHODS = (None, pruners.Magnitude, pruners.Wanda, pruners.SparseGPT)
SEEDS, SPARSITIES = (0, 1, 2), (0.4, 0.5)
LONG = "A title of a table that says so much about what was pruned and how that no figure is wide enough for it, ever"


def table(models=("smollm2-135m",), seeds=SEEDS) -> Table:
    def run(method, model, sparsity, seed):
        made = method and method(sparsity=sparsity)
        windows = replace(small.WINDOWS, seed=seed) if needs_windows(made) else None
        return Run(model, made, windows, (small.PPL,))

    return Table("tiny", LONG, METHODS, tuple(product(models, SPARSITIES, seeds)), run)


def fill(declared: Table, root) -> list[rows.Row]:
    """Perplexities 10 to 14 by method and 0, 1 or 2 more by seed; the larger sparsity doubles them."""
    for run in declared.runs():
        seed, sparsity = run.windows.seed if run.windows else 0, run.method.sparsity if run.method else 0.0
        value = (10.0 + len(type(run.method).__name__) % 5 + seed) * (2 if sparsity > 0.45 else 1)
        record = small.record(run, achieved={"asked": sparsity, "sparsity": sparsity})
        record.measures[small.PPL.key].update(perplexity=value)
        record.cost.seconds.update(prune=10.0 + seed)
        records.write(record, root)
    return rows.rows(declared, root)


def drawn(figure) -> np.ndarray:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=60)
    return np.asarray(Image.open(picture).convert("L"))


def test_seeds_are_one_mark_at_their_mean_with_a_t_interval(tmp_path):
    (axes,) = perplexity.perplexity(table(), fill(table(), tmp_path)).axes
    low, high = (container for container in axes.containers)
    assert [low.get_label(), high.get_label()] == ["40 %", "50 %"]
    assert low[0].get_xdata().tolist() == [14.0, 11.0, 15.0]  # magnitude has one run
    (bars,) = low[2]
    assert [line[1, 0] - line[0, 0] for line in bars.get_segments()] == pytest.approx([3.0, 2 * 2.484, 2 * 2.484], 1e-3)
    seeds = next(line for line in axes.lines if line.get_marker() == "|" and len(line.get_xdata()) == 6)
    assert sorted(seeds.get_xdata()) == [10.0, 11.0, 12.0, 14.0, 15.0, 16.0]


@pytest.mark.parametrize("labelled", [True, False])
def test_a_mark_that_lacks_seeds_says_so(labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(perplexity, "LABELLED", 4 if labelled else 1)
    made = [replace(row, record=None) if row.method == "Wanda" and row.seed else row for row in fill(table(), tmp_path)]
    (axes,) = perplexity.perplexity(table(), made).axes
    told = [text.get_text() for text in axes.texts]
    assert [text for text in told if "of" in text] == ["10.0 (1 of 3 seeds)", "20.0 (1 of 3 seeds)"]
    assert len(told) == (6 if labelled else 2)


def test_the_dense_model_alone_is_drawn_without_a_warning(tmp_path, recwarn):
    made = [row for row in fill(table(), tmp_path) if row.run.method is None]
    perplexity.perplexity(table(), made)
    assert [str(one.message) for one in recwarn] == []


def test_the_bars_are_told_apart_in_words(tmp_path):
    (legend,) = perplexity.perplexity(table(), fill(table(), tmp_path)).legends
    told = legend.get_title().get_text().replace("\n", " ")
    assert told == ("several seeds: mean, its 95 % interval, and each seed; one run: ± 1 standard error over windows")


def test_an_interval_that_reaches_below_zero_does_not_stretch_a_logarithmic_axis(tmp_path):
    made = fill(table(), tmp_path)
    for row, value in zip((row for row in made if row.method == "Wanda"), (1.0, 2.0, 300.0), strict=False):
        row.record.measures[small.PPL.key].update(perplexity=value)
    (axes,) = perplexity.perplexity(table(), made).axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] > 0.5


def test_no_two_of_forty_nine_methods_look_alike():
    looks = [perplexity.look(index) for index in range(49)]
    assert len({(one["color"], one["marker"]) for one in looks}) == 49
    assert len({(one["color"], one["linestyle"]) for one in looks[:28]}) == 28


@pytest.mark.parametrize("models", [("smollm2-135m",), ("opt-125m", "opt-1.3b", "opt-2.7b")])
def test_nothing_reaches_the_edge_of_a_figure(tmp_path, models):
    declared = table(models)
    made = fill(declared, tmp_path)
    for figure in (
        perplexity.perplexity(declared, made),
        sweeps.by_sparsity(declared, made),
        cost.cost(declared, made),
    ):
        picture = drawn(figure)
        edges = (picture[0], picture[-1], picture[:, 0], picture[:, -1])
        assert all((edge == 255).all() for edge in edges)
        assert figure._suptitle.get_text().replace("\n", " ") == LONG


def test_every_model_and_every_method_has_its_bar(tmp_path):
    declared = table(("opt-125m", "opt-1.3b"))
    (left,) = cost.cost(declared, fill(declared, tmp_path)).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == [
        f"{method}, {model}" for method in ("Magnitude", "Wanda", "SparseGPT") for model in ("opt-125m", "opt-1.3b")
    ]
    assert [bar.get_width() for bar in left.patches] == [10.0, 10.0, 11.0, 11.0, 11.0, 11.0]
    assert left.get_xlabel().endswith(", s")


def test_a_cell_that_went_on_after_a_kill_has_no_time_of_its_own(tmp_path):
    declared = table(("opt-125m",))
    made = fill(declared, tmp_path)
    again = [
        replace(row, record=row.record.model_copy(update={"resumed": 1})) if row.method == "Wanda" else row
        for row in made
    ]
    (axes,) = cost.cost(declared, again).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["Magnitude", "SparseGPT"]


def test_a_choice_of_learning_rates_has_no_bar_of_what_pruning_costs():
    declared = papers.find("embedded.rates")
    with pytest.raises(ValueError, match="pruned cells and there are 0"):
        cost.cost(declared, rows.rows(declared, Path(__file__).resolve().parents[1] / "results"))


def test_a_long_legend_takes_nothing_from_the_panels(tmp_path):
    made = fill(table(("opt-125m",)), tmp_path)
    tail = "and a reconstruction of all that is left"
    many = [replace(row, method=row.method and f"{row.method} {n} {tail}") for row in made for n in range(5)]
    heights = []
    for cells in (made, many):
        figure = sweeps.by_sparsity(table(("opt-125m",)), cells)
        drawn(figure)
        heights.append(figure.axes[0].get_window_extent().height)
    assert heights[1] > 0.9 * heights[0]


def test_statistics_of_a_cell_that_went_on_after_a_kill_are_nobodys_cost(tmp_path):
    runs = [Run("opt-125m", pruners.GBLM(sparsity=share), small.WINDOWS, (small.PPL,)) for share in (0.3, 0.5, 0.6)]
    for run, took, resumed in zip(runs, (100.0, 0.1, 0.1), (1, 0, 0), strict=True):
        record = small.record(run)
        record.cost.seconds.update(statistics=took, prune=5.0)
        records.write(record.model_copy(update={"resumed": resumed}), tmp_path)
    declared = Table("tiny", "", tuple(runs), (("opt-125m",),), lambda run, model: run)
    with pytest.raises(ValueError, match="pruned cells and there are 0"):
        cost.cost(declared, rows.rows(declared, tmp_path))


def test_long_names_have_room_for_their_lines(tmp_path):
    made = fill(table(("opt-125m",)), tmp_path)
    tail = "and then a reconstruction of everything that is left, on inputs of the dense model"
    long = [replace(row, method=row.method and f"{row.method} {n} {tail}") for row in made for n in range(5)]
    for draw in (perplexity.perplexity, cost.cost):
        figure = draw(table(("opt-125m",)), long)
        drawn(figure)
        boxes = sorted((box.y0, box.y1) for box in map(Text.get_window_extent, figure.axes[0].get_yticklabels()))
        assert len(boxes) == 15
        gaps = [upper[0] - lower[1] for lower, upper in pairwise(boxes)]
        assert min(gaps) > -2, gaps
        assert figure.axes[0].get_window_extent().width > 100


def test_statistics_from_the_cache_cost_what_they_took_and_memory_is_the_accelerators(tmp_path):
    runs = [Run("opt-125m", pruners.GBLM(sparsity=share), small.WINDOWS, (small.PPL,)) for share in SPARSITIES]
    for run, statistics in zip(runs, (100.0, 0.1), strict=True):
        record = small.record(run)
        record.cost.seconds.update(prune=10.0, statistics=statistics)
        made_by = record.made_by.model_copy(update={"device": "cuda (A card)"})
        records.write(record.model_copy(update={"made_by": made_by}), tmp_path)
    declared = Table("tiny", "", tuple(runs), (("opt-125m",),), lambda run, model: run)
    left, right = cost.cost(declared, rows.rows(declared, tmp_path)).axes
    assert [bar.get_width() for bar in left.patches] == [110.0]
    assert [point for line in left.lines for point in line.get_xdata()] == [110.0, 110.0]
    assert right.get_xlabel() == "peak memory of the cell, GiB"


def test_retraining_curves_have_a_panel_a_setting(tmp_path):
    made = fill(table(), tmp_path)
    for row in made:
        row.record.achieved["recovery"] = {"losses": [3.0, 2.0]} if row.run.method else {}
    panels = training.losses(table(), made).axes
    assert [axes.get_title("left") for axes in panels] == ["40 %", "50 %"]
    assert [len(axes.lines) for axes in panels] == [3, 3]  # of three seeds the first


@pytest.mark.parametrize("heads", [(0, 8, 8), (0, 0, 0)])
def test_what_a_block_keeps_stands_in_its_own_place_beside_blocks_without_any(heads):
    declared = papers.find("embedded.flap")
    made = [row for row in made_up.rows(declared) if row.run.method is not None]
    before = [{"heads": count, "channels": 10} for count in heads]
    after = [{"heads": count // 2, "channels": 5} for count in heads]
    for row in made:
        row.record.achieved["structure"] = {"before": {"blocks": before}, "after": {"blocks": after}}
    panel, channels, *_ = structure.kept(declared, made).axes
    expected = [50.0 if count else np.nan for count in heads]
    assert panel.lines[0].get_ydata().tolist() == pytest.approx(expected, nan_ok=True)
    assert channels.lines[0].get_ydata().tolist() == [50.0] * 3


def test_a_cell_that_was_not_run_has_no_bar():
    declared = papers.find("llm_pruner.statistics")
    made = made_up.rows(declared)
    made[2] = replace(made[2], record=None)
    for axes in numbers.numbers(declared, made).axes:
        assert [bool(np.isnan(bar.get_width())) for bar in axes.patches] == [False, False, True, False, False]
