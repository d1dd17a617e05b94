"""Tables, lists and figures of coincidences."""

from __future__ import annotations

import json

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest

from callbacks.coincidence_table import CoincidenceTable, CoincidenceWriter, markdown, method_name, sweep_rows
from callbacks.figures import coincidence as figures
from callbacks.figures.callback import FiguresCallback
from callbacks.run_record import RunRecord
from lightning_modules.coincidence.petnet import PETNet
from networks.petnet import LORNetwork
from tests.lightning_modules.test_coincidence import QUIET, data

PLOTS = (
    "spike_raster", "time_residuals", "calibration_residuals", "speed_against_hits", "back_projection",
    "learned_geometry",
)  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callbacks = [
        RunRecord(str(folder), {"name": "x"}),
        CoincidenceTable(folder / "predictions"),
        CoincidenceWriter(folder / "predictions"),
        FiguresCallback([f"callbacks.figures.coincidence.{p}" for p in PLOTS], folder / "figures", dpi=30),
    ]
    module = PETNet(LORNetwork("toy24"), None, tolerance=0, reach=0, pair_window=0, baselines=["scw", "take_all_goods"])
    trainer = pl.Trainer(accelerator="cpu", use_distributed_sampler=False, callbacks=callbacks, **QUIET)
    source = data(num_test=100, eval_batch_size=60)
    trainer.test(module, datamodule=source, verbose=False)
    trainer.predict(module, datamodule=source)
    return folder, module


def test_the_table_of_a_run(finished):
    folder, module = finished
    lines = (folder / "predictions/comparison.md").read_text().splitlines()
    assert len(lines) == 5 and lines[3].startswith("| calibrated single window | 0 |")
    assert lines[4].startswith("| GATE take_all_goods | 0 |")
    record = json.loads((folder / "results.json").read_text())["coincidences"]
    assert [row["method"] for row in record] == ["snn", "scw", "take_all_goods"]
    table = pd.read_csv(folder / "predictions/comparison.csv")
    assert table["f1"].tolist() == pytest.approx([float(row["f1"]) for row in module.results_table()])


def test_the_list_of_a_prediction(finished):
    table = pd.read_csv(finished[0] / "predictions/coincidences.csv")
    assert len(table) > 10 and table["sample"].is_monotonic_increasing and table["same_decay"].mean() > 0.9


def test_all_figures_are_drawn(finished):
    assert sorted(p.stem for p in (finished[0] / "figures").iterdir()) == sorted(PLOTS)


def test_f1_over_a_setting():
    points = [
        ({"data.activity_bq": a}, {"method": m, "f1": 0.9, "f1_low": 0.8, "f1_high": 0.95})
        for a in ("1e7", "1e8")
        for m in ("scw", "pair_scorer")
    ]
    (axes,) = figures.f1_against_setting(points).axes
    assert len(axes.lines) == 2 and axes.get_xlabel() == "activity [Bq]"
    assert figures.f1_against_setting([({"data": "toy"}, points[0][1])]) is None
    assert figures.f1_against_setting([({"a": "1", "b": "2"}, points[0][1])]) is None


def test_rows_of_a_sweep():
    def row(method, f1, speed):
        return {"method": method, "f1": f1, "hits_per_s": speed}

    points = [({"model": m}, row(m, f1, 1.0)) for m, f1 in (("pair_scorer", 0.9), ("competing_lines", 0.8))]
    points[1:1] = [({"model": "pair_scorer"}, row("scw", 0.7, 2.0))]
    points += [({"model": "competing_lines"}, row("scw", 0.7, 3.0))]
    labels = [r["label"] for r in sweep_rows(points)]
    assert labels == [
        "pair scorer (trained) (model=pair_scorer)",
        "calibrated single window",  # found the same in both jobs
        "spiking network of competing lines (trained) (model=competing_lines)",
    ]
    points[-1] = ({"model": "competing_lines"}, row("scw", 0.6, 3.0))
    assert len(sweep_rows(points)) == 4


def test_names_and_labels():
    row = {"method": "scw", "label": "window (a=1)", "precision": 1, "recall": 1, "f1": 1, "f1_low": 1, "f1_high": 1,
           "randoms_fraction": 0, "scatter_fraction": 0, "hits_per_s": 1e6}  # fmt: skip
    assert markdown([row]).splitlines()[2].startswith("| window (a=1) |")
    assert method_name("take_all_goods") == "GATE take_all_goods"
    with pytest.raises(ValueError, match="petsird"):
        CoincidenceWriter("x", "list.txt")


def test_lists_as_petsird(tmp_path):
    pytest.importorskip("petsird")
    from datamodules.readers.petsird_file import read_coincidences, write_coincidences

    source = data()
    rows = {"sample": [1, 0], "crystal_a": [3, 5], "crystal_b": [15, 17], "time_ns": [7.0, 90.0]}
    source.write_petsird(pd.DataFrame(rows), tmp_path / "x.petsird")
    again = read_coincidences(tmp_path / "x.petsird")
    assert again.time_ns.tolist() == [90.0, 107.0] and again.a.tolist() == [5, 3]
    with pytest.raises(ValueError, match="in order"):
        write_coincidences(tmp_path / "y", source.layout, np.array([1, 1]), np.array([2, 2]), np.array([5.0, 1.0]))
    with pytest.raises(ValueError, match="0 to 23"):
        write_coincidences(tmp_path / "y", source.layout, np.array([24]), np.array([2]), np.array([5.0]))
    with pytest.raises(FileNotFoundError):
        read_coincidences(tmp_path / "nope")
