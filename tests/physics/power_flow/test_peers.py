"""The benchmark against lightsim2grid, shortened: both sides compute the same."""

from __future__ import annotations

import pytest

from benchmarks import power_flow as bench
from benchmarks.record import holds
from physics.power_flow import Grid, solve
from tests.physics.power_flow.grids import embedded, reference


def test_a_short_run():
    pytest.importorskip("lightsim2grid")
    result = bench.run(cases=("case118", "no_such_case"), repeats=1, scale=0.01)
    rows = {(row["what"], row["variant"]): row for row in result.rows}
    assert holds(rows["case118, series", "unsolved steps"])
    assert holds(rows["case118, series", "largest difference of voltages"])
    assert holds(rows["case118, gradients of 2, per case", "relative difference of gradients to loads"])
    assert any("outages" in what for what, _ in rows)


def test_the_peer_is_asked_for(monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="extra 'peers'"):
        bench.run()


def test_tables_are_the_grid():
    grid = embedded("case118")
    tables = bench.tables_of(grid)
    again = Grid.from_matpower({"name": "again", "base_mva": tables["baseMVA"], **tables})
    assert float((solve(again).v - solve(grid).v).abs().max()) < 1e-9


def test_transformers_of_pandapower_are_refused():
    pytest.importorskip("lightsim2grid")
    with pytest.raises(ValueError, match="cannot be written as tables of MATPOWER"):
        bench.model_of(Grid.from_pandapower(reference("case118").net))
