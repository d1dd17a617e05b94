"""Tables of predictions with names: complete, in order, whatever the batches, and once where once is enough."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
import pytest

from callbacks.grid_tables import GridTable
from datamodules.grid_measurements import GridMeasurements
from datamodules.power_grids import PowerGrids
from lightning_modules.power_flow import GridIdentification, PowerFlowSolver
from strategies.ddp import DDP
from tests.lightning_modules.test_power_flow import trainer


def predicted(module: pl.LightningModule, data: pl.LightningDataModule, *tables: GridTable) -> None:
    run = trainer(callbacks=list(tables), max_epochs=2)
    if isinstance(module, GridIdentification):
        run.fit(module, data)
    run.predict(module, data)


def test_buses_and_branches_of_all_scenarios(tmp_path: Path):
    data = PowerGrids("case14", kind="series", num_scenarios=5, eval_batch_size=2)
    tables = [GridTable(tmp_path, "buses.csv"), GridTable(tmp_path, "branches.parquet", "branch_table")]
    predicted(PowerFlowSolver(), data, *tables)
    buses, branches = pd.read_csv(tmp_path / "buses.csv"), pd.read_parquet(tmp_path / "branches.parquet")
    assert len(buses) == 5 * 14 and len(branches) == 5 * 20
    assert buses["scenario"].drop_duplicates().tolist() == [data.scenario_name(i) for i in range(5)]
    assert buses["bus"].tolist() == list(data.grid.bus_names) * 5
    assert buses["converged"].all() and branches["p_from_mw"].notna().all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["branches.parquet", "buses.csv"]


def _predict_on_two(folder: str) -> None:
    data = PowerGrids("case14", kind="series", num_scenarios=5, eval_batch_size=2)
    table = GridTable(folder, "buses.csv")
    trainer(devices=2, strategy=DDP(), callbacks=[table]).predict(
        PowerFlowSolver("newton"), data, return_predictions=False
    )


def test_two_processes_write_the_table_of_one(ranks2, tmp_path: Path):
    ranks2(_predict_on_two, str(tmp_path / "two"))
    data = PowerGrids("case14", kind="series", num_scenarios=5, eval_batch_size=2)
    predicted(PowerFlowSolver("newton"), data, GridTable(tmp_path / "one", "buses.csv"))
    one, two = (pd.read_csv(tmp_path / name / "buses.csv") for name in ("one", "two"))
    pd.testing.assert_frame_equal(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["buses.csv", "buses.parquet"])
def test_a_run_that_fails_leaves_the_old_table(name, tmp_path: Path):
    class Fails(PowerFlowSolver):
        def predict_step(self, batch, batch_idx):
            if batch_idx == 1:
                raise RuntimeError("gone")
            return super().predict_step(batch, batch_idx)

    (tmp_path / name).write_text("old")
    data = PowerGrids("case14", kind="series", num_scenarios=4, eval_batch_size=2)
    with pytest.raises(RuntimeError, match="gone"):
        predicted(Fails(), data, GridTable(tmp_path, name))
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "old"
    predicted(PowerFlowSolver(), data, GridTable(tmp_path, name))
    assert [path.name for path in tmp_path.iterdir()] == [name] and (tmp_path / name).stat().st_size > 1000


def test_rows_can_be_sorted(tmp_path: Path):
    data = PowerGrids("case14", num_scenarios=3)
    predicted(PowerFlowSolver(), data, GridTable(tmp_path, "buses.csv", sort_by="vm_pu"))
    assert pd.read_csv(tmp_path / "buses.csv")["vm_pu"].is_monotonic_decreasing


def test_parameters_stand_there_once(tmp_path: Path):
    data = GridMeasurements(num_train=4, num_val=1, num_test=4, eval_batch_size=2)
    predicted(GridIdentification(), data, GridTable(tmp_path, "parameters.csv", "parameter_table", once=True))
    table = pd.read_csv(tmp_path / "parameters.csv")
    assert table["element"].tolist() == list(data.grid.branch_names)
    assert {"start", "found", "standard_error", "true", "relative_error"} < set(table)


def test_the_name_says_the_format():
    with pytest.raises(ValueError, match=r"filename='x\.txt': use a name that ends in \.csv or \.parquet"):
        GridTable("folder", "x.txt")
