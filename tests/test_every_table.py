"""Every declared table ends in something to look at: with all its records it is drawn, compared and printed."""

from __future__ import annotations

import made_up
import pytest

from analysis import figures
from analysis.pages import comparisons
from analysis.tables import markdown
from experiments import papers

FEW = 12  # cells whose bootstraps do not take long


@pytest.mark.parametrize("table", papers.TABLES.values(), ids=papers.TABLES)
def test_a_full_table_is_drawn_compared_and_printed(table, tmp_path):
    made = made_up.rows(table)
    for kind, key in figures.main(made):
        figure = figures.draw(kind, table, made, key)
        assert any(axes.has_data() for axes in figure.axes)
    printed = markdown.markdown(table, made)
    assert "cells are missing" not in printed
    assert len({row.run.model for row in made}) == 1 or all(row.run.model_name in printed for row in made)
    if len(made) > len({row.run.model for row in made}):
        against = comparisons.baselines(table, made, [tmp_path])
        assert "cell minus" in comparisons.page(table, made[:FEW], against)
