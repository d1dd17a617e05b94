"""The benchmark of the simulator, on few stacks."""

from __future__ import annotations

import pytest

from benchmarks import thin_film


def test_all_programs_simulate_the_same_stacks():
    result = thin_film.run(repeats=1, stacks=4, tmm_stacks=1, data=100, layers=(20,))
    differences = {row["variant"]: row["value"] for row in result.rows if row["what"].startswith("largest difference")}
    assert "tokens - ours" in differences and max(differences.values()) < 1e-12
    ratios = {row["variant"]: row for row in result.rows if row["what"].endswith("20 layers, ratio")}
    peers = {name.replace("_", "-") for name in thin_film.installed()}
    assert ratios.keys() == {f"{peer} / {mine}" for peer, mine in thin_film.BOUNDS if peer in peers}
    assert all(row["value"] == row["cpu"] > 0 and "at_least" in row for row in ratios.values())
    assert result.settings["stacks of tmm"] == 1


def test_gradients_are_those_of_the_peer():
    pytest.importorskip("tmm_fast", reason="needs the extra peers")
    problem = thin_film.Problem(3, 20)
    ours, theirs = problem.ours_gradient(), problem.tmm_fast(gradient=True)()
    assert ours.shape == (3, 20) and (ours - theirs).abs().max() < 1e-10
