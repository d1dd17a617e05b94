"""Figures of a sweep reach the loggers of its jobs."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from callbacks.figures.axes import make_figure
from runner.sweep_figures import log_figures
from tests import wandb_file


def swept(folder: Path, logger: dict[str, object]) -> list[Path]:
    """A finished job with a logger, and two figures of its sweep."""
    run = folder / "0"
    run.mkdir(parents=True)
    nodes = {name: {k: f"{run}/x" if v == "DIR" else v for k, v in node.items()} for name, node in logger.items()}
    config = {"name": "tickets", "run": {"dir": str(run), "group": "tickets-1"}, "logger": nodes}
    (run / "results.json").write_text(json.dumps({"config": config}))
    for name in ("cost", "tickets"):
        figure, (axes,) = make_figure(2, 2)
        axes.plot([0, 1], [0, 1])
        (folder / "figures").mkdir(exist_ok=True)
        figure.savefig(folder / "figures" / f"{name}.png", dpi=30)
    return [run]


def test_wandb_gets_a_run_in_the_group_of_the_sweep(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    target = "lightning.pytorch.loggers.WandbLogger"
    node = {"_target_": target, "save_dir": "DIR", "offline": True, "project": "p", "group": "tickets-1", "id": "abc"}
    runs = swept(
        tmp_path, {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "DIR"}, "wandb": node}
    )
    (tmp_path / "x").mkdir()
    assert log_figures(tmp_path, runs) == ["wandb"]
    deadline = time.monotonic() + 30
    paths: list[Path] = []
    while not paths and time.monotonic() < deadline:
        paths = [p for p in tmp_path.glob("x/wandb/offline-run-*/run-*.wandb") if p.stat().st_size]
        time.sleep(0.1)
    logged = wandb_file.read(paths[0])
    assert (logged.run["group"], logged.run["job_type"], logged.run["display_name"]) == (
        *("tickets-1", "sweep", "tickets-sweep"),
    )
    assert logged.run["run_id"] != "abc"
    assert {"figures/cost", "figures/tickets"} <= {
        key.removesuffix("/_type") for key in logged.last()
    } | logged.last().keys()


def test_tensorboard_gets_images(tmp_path):
    pytest.importorskip("tensorboard")
    node = {"_target_": "lightning.pytorch.loggers.TensorBoardLogger", "save_dir": "DIR", "name": "tb"}
    assert log_figures(tmp_path, swept(tmp_path, {"tensorboard": node})) == ["tensorboard"]
    (file,) = tmp_path.glob("x/tb/**/events*")
    assert b"figures/cost" in file.read_bytes()


def test_a_logger_that_fails_costs_no_sweep(tmp_path, caplog):
    node = {"_target_": "no.such.WandbLogger", "save_dir": "DIR"}
    assert log_figures(tmp_path, swept(tmp_path, {"wandb": node})) == []
    assert "logger.wandb: the figures of the sweep were not logged" in caplog.text
    assert log_figures(tmp_path / "nothing", []) == []
