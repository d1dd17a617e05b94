"""`load_run` rebuilds a run from its folder alone."""

from __future__ import annotations

import shutil

import pytest
import torch

from runner import job
from runner.load import load_run
from tests.composing import tiny


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert job.run(tiny(folder, "seed=3"))["status"] == "completed"
    return folder


@pytest.mark.parametrize("checkpoint", ["best", "last"])
def test_the_module_predicts_as_the_run_did(run_dir, tmp_path, checkpoint):
    moved = tmp_path / "moved"
    shutil.copytree(run_dir, moved)
    module, datamodule, config = load_run(moved, checkpoint)
    assert config == tiny(run_dir, "seed=3") and not module.training
    stored = torch.load(run_dir / f"checkpoints/{checkpoint}.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(value, stored[name]) for name, value in module.state_dict().items())
    datamodule.setup("test")
    inputs = datamodule.test.tensors[0]
    loss = torch.nn.functional.mse_loss(module.net(inputs), datamodule.test.tensors[1]).item()
    if checkpoint == "best":
        result = job.run(tiny(run_dir, "seed=3", "train=false"))  # evaluates the best checkpoint again
        assert loss == pytest.approx(result["metrics"]["test/loss"], rel=1e-6)


def test_a_path_and_no_checkpoint(run_dir, tmp_path):
    assert load_run(run_dir, str(run_dir / "checkpoints/last.ckpt"))[2]["name"] == "tiny"
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_run(tmp_path)
