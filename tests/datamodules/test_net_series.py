"""Series that come with nets of pandapower; the net here is a stand-in with the tables that are read."""

from __future__ import annotations

import importlib
import math
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from datamodules import grid_sources
from datamodules.grid_sources import load_grid
from datamodules.power_grids import PowerGrids
from datamodules.readers.net_series import net_injections
from physics.power_flow import Scenarios, solve


class Net(dict):
    """Tables by key, as a pandapowerNet has them; buses 0 and 1 are one, bus 9 is out of service."""

    def __init__(self) -> None:
        grid = load_grid("case14")
        lookup = np.full(10, -1)
        lookup[[0, 1, 2, 3, 4]] = (2, 2, 3, 1, 5)
        self._pd2ppc_lookups = {"bus": lookup}
        p = grid.p_load_mw.numpy()
        load = {"bus": [0, 1, 2, 9], "p_mw": [p[2] - 20, 20.0, p[3], 7.0], "q_mvar": [19.0, 0.0, -3.9, 1.0]}
        super().__init__(
            load=self.table(load, scaling=[1.0, 1.0, 0.5, 1.0]),
            sgen=self.table({"bus": [0], "p_mw": [0.0]}),
            storage=self.table({"bus": [], "p_mw": []}),
            gen=self.table({"bus": [3, 4], "p_mw": [40.0, 0.0]}, in_service=[True, False]),
        )

    @staticmethod
    def table(columns: dict[str, list], **more: list) -> pd.DataFrame:
        frame = pd.DataFrame(columns).assign(scaling=1.0, in_service=True).assign(**more)
        return frame.astype({"bus": int})


def series(**columns: list) -> dict[tuple[str, str], pd.DataFrame]:
    """``load_p_mw=[[...], ...]``: a list per step."""
    return {tuple(key.split("_", 1)): pd.DataFrame(rows) for key, rows in columns.items()}


def test_elements_are_summed_by_bus():
    net, grid = Net(), load_grid("case14")
    p, q = grid.p_load_mw.numpy(), grid.q_load_mvar.numpy()
    tables = net_injections(
        net,
        series(
            load_p_mw=[[50.0, 30.0, 10.0, 99.0], [60.0, 20.0, 20.0, 99.0]],
            load_q_mvar=[[5.0, 1.0, -3.9, 9.0], [19.0, 0.0, 0.0, 9.0]],
            sgen_p_mw=[[25.0], [0.0]],
            gen_p_mw=[[31.0, 4.0], [32.0, 4.0]],
        ),
        grid,
        times=["a", "b"],
    )
    assert tables["p_load_mw"].elements.tolist() == [2, 3] and tables["p_load_mw"].times == ["a", "b"]
    # The third load counts half.
    np.testing.assert_allclose(tables["p_load_mw"].values, [[55, p[3] + (10 - p[3]) / 2], [80, p[3] + (20 - p[3]) / 2]])
    np.testing.assert_allclose(tables["q_load_mvar"].values, [[6, q[3]], [q[2], q[3] + 3.9 / 2]])
    assert tables["gen_p_mw"].elements.tolist() == np.flatnonzero(grid.gen_bus.numpy() == 1).tolist()
    np.testing.assert_allclose(tables["gen_p_mw"].values, [[31.0], [32.0]])


def test_what_has_no_series_stays():
    tables = net_injections(Net(), series(sgen_p_mw=[[0.0]]), load_grid("case14"))
    np.testing.assert_allclose(tables["p_load_mw"].values, [[load_grid("case14").p_load_mw[2]]])
    assert list(tables) == ["p_load_mw"] and tables["p_load_mw"].times is None


def test_mistakes_name_the_element():
    grid = load_grid("case14")
    with pytest.raises(ValueError, match=r"net\.sgen\.p_mw of element 0, step 1: not a finite number"):
        net_injections(Net(), series(sgen_p_mw=[[1.0], [math.nan]]), grid)
    with pytest.raises(ValueError, match=r"net\.sgen has no element 1, of which there is a series of p_mw"):
        net_injections(Net(), series(sgen_p_mw=[[1.0, 2.0]]), grid)
    net = Net()
    net["gen"]["in_service"] = True
    net["gen"]["bus"] = 3
    with pytest.raises(ValueError, match=r"has 1 generators, but series for 2"):
        net_injections(net, series(gen_p_mw=[[1.0, 2.0]]), grid)


def test_a_year_is_a_series(monkeypatch):
    """The package stands behind two names: its net and its values."""
    net: Any = Net()
    net.profiles = {"load": pd.DataFrame({"time": ["01.01.2016 00:00", "01.01.2016 00:15"]})}
    values = series(sgen_p_mw=[[25.0], [50.0]])
    fake = SimpleNamespace(get_absolute_values=lambda given, profiles: values)
    monkeypatch.setattr(grid_sources, "_simbench_net", lambda code: net)
    monkeypatch.setattr(grid_sources, "_optional", lambda module, package: fake)
    monkeypatch.setattr(grid_sources.Grid, "from_pandapower", lambda net: load_grid("case14"))
    options = {"grid": "code", "grid_source": "simbench", "kind": "series", "num_scenarios": None, "files": "simbench"}
    data = PowerGrids(**options)
    data.setup()
    assert data.count == 2 and data.scenario_name(1) == "01.01.2016 00:15"
    p = data.batch(np.arange(2))["p_mw"].numpy()
    assert p[1, 2] - p[0, 2] == pytest.approx(25)
    with pytest.raises(ValueError, match=r"data\.files=simbench: give files by quantity, or simbench for a grid of"):
        PowerGrids(**options | {"grid_source": "auto"})


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_simbench_is_what_pandapower_says():
    """Two quarter-hours of a rural grid."""
    before = dict(os.environ)
    simbench = pytest.importorskip("simbench", reason="simbench is not installed (it needs pandas < 3)")
    pandapower = importlib.import_module("pandapower")
    for variable in set(os.environ) - set(before):  # its own imports set some
        del os.environ[variable]
    code = "1-LV-rural1--0-sw"
    data = PowerGrids(code, "simbench", kind="series", num_scenarios=None, files="simbench", load_scale=1.0)
    data.setup()
    assert data.count > 35_000 and data.grid.num_buses >= 15
    steps = np.array([48, 20_000])
    batch = data.batch(steps)
    solution = solve(data.grid, Scenarios(torch.complex(batch["p_mw"], batch["q_mvar"]).mT / data.grid.base_mva))
    net = simbench.get_simbench_net(code)
    values = simbench.get_absolute_values(net, True)
    for i, step in enumerate(steps):
        for (table, column), frame in values.items():
            if frame.shape[1]:
                net[table][column] = frame.iloc[step]
        pandapower.runpp(net, calculate_voltage_angles=True, tolerance_mva=1e-9)
        places = net._pd2ppc_lookups["bus"][net.bus.index]
        assert abs(solution.vm[:, i].numpy()[places] - net.res_bus.vm_pu.to_numpy()).max() < 1e-8
