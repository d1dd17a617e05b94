"""What was measured arrives in every logger, and a run stays one run when it is resumed."""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path

import pytest

from runner import job
from runner.wandb_key import has_key, wandb_offline
from tests import cli, wandb_file
from tests.cli import results
from tests.composing import tiny

OFFLINE = ("logger=wandb", "++logger.wandb.offline=true", "tags=[one,two]", "notes=a note", "seed=7")


def last_values(run_dir: Path, version: int = 0) -> dict[str, float]:
    """The last value of every column of metrics.csv."""
    rows = csv.DictReader((run_dir / "csv" / f"version_{version}" / "metrics.csv").open())
    return {key: float(value) for row in rows for key, value in row.items() if value}


@pytest.fixture(scope="module")
def wandb_run(tmp_path_factory):
    """Folder of a run that was stopped after two epochs and resumed."""
    folder = tmp_path_factory.mktemp("wandb")
    assert job.run(tiny(folder, *OFFLINE, "trainer.max_epochs=2"))["status"] == "completed"
    assert job.run(tiny(folder, *OFFLINE))["status"] == "completed"
    return folder


def wandb_files(run_dir: Path) -> list[wandb_file.WandbRun]:
    """The W&B runs of a folder; W&B's own process may still be writing after ``finish`` has returned."""
    paths = sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb"), key=lambda p: p.stat().st_mtime)
    deadline = time.monotonic() + 30
    while any(not ended(path) for path in paths) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [wandb_file.read(path) for path in paths]


def ended(path: Path) -> bool:
    try:
        return wandb_file.read(path).exit_code is not None
    except ValueError:  # in the middle of a record
        return False


def test_wandb_has_what_metrics_csv_has(wandb_run):
    files = wandb_files(wandb_run)
    assert len(files) == 2, "one file for each part"
    for version, logged in enumerate(files):
        expected, found = last_values(wandb_run, version), logged.last()
        assert {"val/loss", "test/loss", "epoch", "energy/total_it_kwh", "energy/epoch/it_kwh"} <= expected.keys()
        assert {"energy/time_s", "energy/power_w/total", "energy/power_w/cpu"} <= expected.keys()
        for key, value in expected.items():
            name = "trainer/global_step" if key == "step" else key
            assert found[name] == pytest.approx(value, rel=1e-6), key


def test_wandb_describes_the_run(wandb_run):
    first, second = wandb_files(wandb_run)
    assert first.run["run_id"] == second.run["run_id"] == results(wandb_run)["wandb_run_id"]
    for part in (first, second):
        assert part.run["project"] == "wattlight" and part.run["group"] == "tiny"
        assert part.run["job_type"] == "train" and part.run["display_name"] == "tiny-seed7"
        assert part.run["tags"] == ["one", "two"] and part.run["notes"] == "a note"
        assert part.exit_code == 0
        assert part.config["seed"] == 7 and part.config["model/optimizer/lr"] == 0.01
    assert first.config["trainer/max_epochs"] == 2 and second.config["trainer/max_epochs"] == 3
    assert second.summary["test/loss"] == pytest.approx(results(wandb_run)["metrics"]["test/loss"])


def test_a_failed_run_is_failed_in_wandb_too(tmp_path):
    assert job.run(tiny(tmp_path, *OFFLINE, "model.fault=raise"))["status"] == "failed"
    (logged,) = wandb_files(tmp_path)
    assert logged.exit_code == 1
    assert results(tmp_path)["wandb_run_id"] == logged.run["run_id"]


def test_two_runs_in_one_process_are_two_runs_in_wandb(tmp_path):
    """Without finishing the first, W&B would write the second into it."""
    for seed in (1, 2):
        job.run(tiny(tmp_path / str(seed), *OFFLINE, f"seed={seed}", "trainer.max_epochs=1"))
    (first,), (second,) = wandb_files(tmp_path / "1"), wandb_files(tmp_path / "2")
    assert first.run["run_id"] != second.run["run_id"]
    assert (first.config["seed"], second.config["seed"]) == (1, 2)


def test_online_without_a_key_names_the_remedy(tmp_path):
    """In a process of its own: W&B reads its variables once."""
    nobody = {"NETRC": str(tmp_path / "netrc"), "WANDB_CONFIG_DIR": str(tmp_path)}
    run_dir = tmp_path / "run"
    done = cli.run(*cli.TINY, "logger=wandb", f"hydra.run.dir={run_dir}", cwd=tmp_path, WANDB_MODE="online", **nobody)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if "WANDB_MODE=offline" in line]
    assert "logger.wandb" in line and "Traceback" not in done.stderr
    assert results(run_dir)["status"] == "failed"


@pytest.mark.parametrize(
    ("mode", "key", "offline"),
    [("", "", True), ("", "k" * 40, False), ("offline", "k" * 40, True), ("online", "", False), ("disabled", "", True)],
)
def test_offline_without_a_key(monkeypatch, tmp_path, mode, key, offline):
    monkeypatch.setenv("WANDB_MODE", mode)
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wandb_offline() == offline


def test_key_in_netrc(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert not has_key()
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key()
    (tmp_path / "netrc").write_text("not a netrc file")
    assert not has_key()


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert job.run(tiny(tmp_path, "logger=tensorboard"))["status"] == "completed"
    events = EventAccumulator(str(tmp_path / "tensorboard" / "version_0")).Reload()
    expected = last_values(tmp_path)
    assert {"val/loss", "test/loss"} <= expected.keys()
    for key in expected.keys() - {"step"}:
        assert events.Scalars(key)[-1].value == pytest.approx(expected[key], rel=1e-6), key


@pytest.mark.parametrize(("fault", "status"), [("none", "FINISHED"), ("raise", "FAILED")])
def test_mlflow(tmp_path, fault, status):
    mlflow = pytest.importorskip("mlflow")
    job.run(tiny(tmp_path, "logger=mlflow", f"model.fault={fault}"))
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert run.info.status == status
    for key, value in last_values(tmp_path).items():
        if key != "step":
            assert run.data.metrics[key] == pytest.approx(value, rel=1e-6)


def test_every_logger_at_once(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("mlflow")
    assert job.run(tiny(tmp_path, "logger=many"))["status"] == "completed"
    assert {"csv", "wandb", "tensorboard", "mlflow.db"} <= {p.name for p in tmp_path.iterdir()}


def test_a_logger_that_cannot_be_closed_does_not_fail_the_run(tmp_path, monkeypatch):
    from lightning.pytorch.loggers import CSVLogger

    finalize = CSVLogger.finalize

    def broken(self, status):
        finalize(self, status)
        if results(tmp_path)["status"] == "completed":
            raise OSError("disk full")

    monkeypatch.setattr(CSVLogger, "finalize", broken)
    assert job.run(tiny(tmp_path))["status"] == "completed"
    assert "could not close CSVLogger: OSError: disk full" in (tmp_path / "run.log").read_text()


def test_numbers_of_a_killed_run_are_on_disk(tmp_path):
    """The CSV file is written at every step that logs; results.json after every validation."""
    job.run(tiny(tmp_path, "model.fault=raise", "model.fault_step=8"))
    assert math.isclose(last_values(tmp_path)["val/loss"], results(tmp_path)["metrics"]["val/loss"], rel_tol=1e-6)


def test_the_reader_refuses_other_files(tmp_path):
    with pytest.raises(ValueError, match="not a W&B file"):
        list(wandb_file.payloads(b"something else"))


def test_the_reader_joins_parts():
    def record(kind: int, data: bytes) -> bytes:
        return wandb_file.HEADER.pack(0, len(data), kind) + data

    head = b":W&B" + bytes(3)
    filler = record(1, b"x" * (wandb_file.BLOCK - len(head) - 7 - 7 - 4 - 3))
    content = head + filler + record(2, b"abcd") + bytes(3) + record(3, b"ef") + record(4, b"g") + record(1, b"h")
    assert list(wandb_file.payloads(content))[1:] == [b"abcdefg", b"h"]
    with pytest.raises(ValueError, match="middle of a record"):
        list(wandb_file.payloads(head + record(2, b"abcd")))
