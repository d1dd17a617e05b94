"""Figures of power flows, and the table at the end of the scaling study."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from callbacks.figures import power_flow as figures
from callbacks.power_flow_study import draw_sweep, read_jobs, table
from datamodules.power_grids import PowerGrids
from physics.power_flow import METHODS

NAN = float("nan")


def data(**options) -> PowerGrids:
    made = PowerGrids(**{"grid": "case14", "kind": "series", "num_scenarios": 5} | options)
    made.setup()
    return made


def history(**methods) -> torch.Tensor:
    rows = [
        (METHODS.index(name), i, 0.01 * (i + 1), size, size**2, 100 * size)
        for name, sizes in methods.items()
        for i, size in enumerate(sizes)
    ]
    return torch.tensor(rows, dtype=torch.float64)


def texts(figure) -> str:
    found = []
    for axes in figure.axes:
        found += [text.get_text() for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts)]
    found += [text.get_text() for axes in figure.axes for text in (*axes.get_yticklabels(), *axes.get_xticklabels())]
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return "\n".join(found + [text.get_text() for legend in legends for text in legend.get_texts()])


def test_error_against_seconds(tmp_path: Path):
    outputs = {"history": history(newton=[1.0, 1e-3, 1e-9], adam=np.geomspace(1, 0.05, 200), dc=[2.5], chord=[1e-10])}
    figure = figures.error_against_seconds(outputs, data())
    left, right = figure.axes
    newton = next(line for line in right.lines if line.get_label() == "Newton")
    np.testing.assert_allclose(newton.get_xdata(), [0.01, 0.02, 0.03])
    np.testing.assert_allclose(newton.get_ydata(), [1.0, 1e-3, 1e-9])
    dc = next(line for line in left.lines if line.get_label() == "DC")
    assert set(dc.get_ydata()) == {2.5}
    for label in ("Newton", "chord", "Adam (paper)", "DC", "iteration (from 1)", "largest mismatch [p.u.]"):
        assert label in texts(figure)
    figure.savefig(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"no method was compared: name some in model\.compare"):
        figures.error_against_seconds({"history": torch.zeros(0, 6)}, data())


def test_voltage_profile(tmp_path: Path):
    made = data(grid="case33bw")
    vm = torch.linspace(1.0, 0.9, 33).repeat(3, 1) * torch.tensor([[1.0], [0.95], [NAN]])
    figure = figures.voltage_profile({"scenario": torch.tensor([4, 0, 1]), "vm_pu": vm}, made)
    assert "2012-10-01T00:00:00" in texts(figure)  # the one with the lowest voltage
    assert "outside its limits" in texts(figure) and "range over 2 scenarios" in texts(figure)
    lines = figure.axes[0].collections[0].get_segments()
    assert len(lines) == 32  # branches in service
    away = np.array([line[:, 0] for line in lines])
    assert (away[:, 1] > away[:, 0]).all()  # the feeder is a tree
    figure.savefig(tmp_path / "x.png")
    chosen = figures.voltage_profile({"scenario": torch.tensor([4, 0, 1]), "vm_pu": vm}, made, scenario=4)
    assert "2012-10-01T01:00:00" in texts(chosen)


def test_a_feeder_of_a_joint_grid_can_be_shown():
    made = data()
    part = figures.voltage_profile({"scenario": torch.tensor([0]), "vm_pu": torch.ones(1, 14)}, made, feeder="Bus 1")
    whole = figures.voltage_profile({"scenario": torch.tensor([0]), "vm_pu": torch.ones(1, 14)}, made)
    assert len(part.axes[0].collections[0].get_segments()) < len(whole.axes[0].collections[0].get_segments())
    with pytest.raises(ValueError, match="no bus of case14 has a name that begins with 'nowhere'"):
        figures.voltage_profile({"scenario": torch.tensor([0]), "vm_pu": torch.ones(1, 14)}, made, feeder="nowhere")


def test_the_feeder_of_a_joint_grid(tmp_path: Path):
    made = data(grid="case118", feeder="case33bw", num_feeders=2)
    figure = figures.feeder_profile({"scenario": torch.tensor([0]), "vm_pu": torch.ones(1, made.grid.num_buses)}, made)
    assert len(figure.axes[0].collections[0].get_segments()) == 33  # its branches and its transformer
    with pytest.raises(ValueError, match="has a name that begins with 'feeder 1:'"):
        figures.feeder_profile({"scenario": torch.tensor([0]), "vm_pu": torch.ones(1, 14)}, data())


def test_loading_strip(tmp_path: Path):
    """Scenarios in their order whatever order they came in, branches by their largest loading."""
    made = data()
    loading = torch.full((5, 20), 10.0)
    loading[:, 7] = torch.tensor([150.0, 20, 30, 40, 50])  # of scenario 3 the first
    loading[:, 2] = 60.0
    outputs = {"scenario": torch.tensor([3, 0, 1, 2, 4]), "loading_percent": loading}
    figure = figures.loading_strip(outputs, made, num_branches=3)
    values = np.asarray(figure.axes[0].collections[0].get_array()).reshape(3, 5)
    assert values[0].tolist() == [20, 30, 40, 150, 50] and (values[1] == 60).all()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:2] == [made.grid.branch_names[7], made.grid.branch_names[2]]
    assert "2012-10-01" in texts(figure)
    few = figures.loading_strip(outputs, made, num_branches=3, num_columns=2)  # three steps a cell
    values = np.asarray(few.axes[0].collections[0].get_array()).reshape(3, 2)
    assert values[0].tolist() == [40, 150] and "the largest of 3 steps" in texts(few)
    figure.savefig(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"no branch of case14 has a limit: set data\.limits=base"):
        figures.loading_strip({"scenario": torch.arange(5), "loading_percent": torch.full((5, 20), NAN)}, made)


def test_outage_ranking(tmp_path: Path):
    made = data(kind="contingencies", num_scenarios=None)
    count = 20
    outputs = {
        "scenario": torch.arange(count),
        "islanding": torch.arange(count) == 13,
        "converged": torch.arange(count) != 13,
        "severity": torch.where(torch.arange(count) == 5, 0.4, torch.where(torch.arange(count) == 9, 0.1, 0.0)),
        "overloads": torch.tensor([3 if i == 5 else 1 if i == 9 else 0 for i in range(count)]),
        "low_voltages": torch.zeros(count, dtype=torch.int64),
        "high_voltages": torch.tensor([2] + [0] * 19),
        "loading_percent": torch.full((count, 20), 50.0),
    }
    outputs["loading_percent"][5, 3] = 160.0
    outputs["loading_percent"][9, 4] = 130.0
    outputs["loading_percent"][0, 4] = 99.0
    figure = figures.outage_ranking(outputs, made, num_outages=4)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:3] == [made.grid.branch_names[i] for i in (5, 9, 0)]
    shown = texts(figure)
    assert f"{made.grid.branch_names[3]}; 3 overloads" in shown and "2 voltages outside" in shown
    assert "19 outages solved, 0 without a solution" in shown
    assert figure.get_supxlabel() == f"1 island buses: {made.grid.branch_names[13]}"
    figure.savefig(tmp_path / "x.png")


def test_true_against_identified(tmp_path: Path):
    true = torch.tensor([0.1, 0.2, 0.4])
    outputs = {"parameter_true": true, "parameter_found": 1.01 * true, "parameter_start": 1.5 * true}
    figure = figures.true_against_identified(outputs, data())
    found = next(line for line in figure.axes[1].lines if line.get_label() == "identified")
    np.testing.assert_allclose(found.get_ydata(), 0.01, rtol=1e-4)
    assert figure.axes[0].get_xscale() == "log"
    figure.savefig(tmp_path / "x.png")
    negative = {name: value - 0.2 for name, value in outputs.items()}
    assert figures.true_against_identified(negative, data()).axes[0].get_xscale() == "linear"


# ------------------------------------------------------------------------------------------------------------- study


def job(buses: int, reached: float) -> dict:
    adam = {"seconds": 2.0, "seconds_to_1e-3": float("inf"), "max_mismatch_pu": 0.06, "iterations": 1000.0}
    newton = {"seconds": 2 * reached, "seconds_to_1e-3": reached, "max_mismatch_pu": 1e-9, "iterations": 4.0}
    return {"buses": buses, "peak_mib": 300.0, "newton": newton, "adam": adam}


def test_time_to_tolerance(tmp_path: Path):
    figure = figures.time_to_tolerance([job(1000, 0.1), job(100, 0.01)])
    newton = figure.axes[0].lines[0]
    np.testing.assert_allclose(newton.get_xdata(), [100, 1000])
    np.testing.assert_allclose(newton.get_ydata(), [0.01, 0.1])
    assert "Adam (paper), not reached" in texts(figure)
    figure.savefig(tmp_path / "x.png")
    assert figures.time_to_tolerance([]) is None


def test_not_reached_is_a_value_of_the_table():
    lines = table([job(100, 0.01)]).splitlines()
    assert lines[0] == "| buses | Newton, s to 1e-3 | Adam (paper), s to 1e-3 | peak MiB |"
    assert lines[2] == "| 100 | 0.01 | not reached: 6.0e-02 after 2 s | 300 |"


def test_the_end_of_a_sweep(tmp_path: Path):
    rows = ["job,data.copies,status,parameters,run_dir"]
    for number, buses in enumerate((118, 472)):
        folder = tmp_path / str(number)
        folder.mkdir()
        metrics = {"test/buses": buses, "test/peak_mib": 400.0}
        for name, value in job(buses, buses / 1e4)["newton"].items():
            metrics[f"test/newton_{name}"] = value
        metrics |= {
            "test/adam_seconds": 1.0,
            "test/adam_max_mismatch_pu": 0.1,
            "test/adam_seconds_to_1e-3": float("inf"),
        }
        (folder / "results.json").write_text(json.dumps({"metrics": metrics}))
        rows.append(f"{number},{number},completed,0,{folder}")
    (tmp_path / "table.csv").write_text("\n".join(rows) + "\n")
    found = read_jobs(tmp_path)
    assert [one["buses"] for one in found] == [118, 472] and np.isinf(found[0]["adam"]["seconds_to_1e-3"])
    printed = draw_sweep(tmp_path)
    assert "| 118 | 0.0118 | not reached: 1.0e-01 after 1 s | 400 |" in printed
    assert (tmp_path / "figures" / "time_to_tolerance.png").stat().st_size > 1000
