"""How small AB-training makes a VGG16 on a part of CIFAR-10, and what that costs (AB-training, acceptance 8).

Three trainings of 14 minutes on one core. Set AB_COMPRESSION_RUNS to a folder in which finished runs are kept, and
found again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from networks.tall_view import to_tall
from runner import job
from runner.load import load_run
from tests.composing import ROOT, composed, plain

DATA = Path(os.environ.get("WATTLIGHT_DATA", ROOT.parent / "shared" / "data"))
EXPERIMENT = "experiment=ab_training/vgg16_cifar10_small"
# Data parallel training with the weight decay of the experiment, and with twice as much, which suits it better.
BASELINES = {f"ddp_{decay}": ("strategy=ddp", f"model.optimizer.weight_decay={decay}") for decay in (0.5, 1.0)}


def _finished(folder: Path, *overrides: str) -> dict[str, Any]:
    """Train and test as a user does, or find the run; what its results.json says."""
    record = folder / "results.json"
    if not record.is_file() or json.loads(record.read_text())["status"] != "completed":
        result = job.run(plain(composed(EXPERIMENT, f"data_dir={DATA}", *overrides, run_dir=folder)))
        assert result["status"] == "completed", result["error"]
    return json.loads(record.read_text()) | {"folder": folder}


@pytest.fixture(scope="module")
def vgg(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """AB-training and both baselines."""
    if not (DATA / "cifar10-imagefolder.zip").is_file():
        pytest.skip(f"no cifar10-imagefolder.zip in WATTLIGHT_DATA ({DATA})")
    stored = os.environ.get("AB_COMPRESSION_RUNS")
    folder = Path(stored) if stored else tmp_path_factory.mktemp("vgg")
    return {name: _finished(folder / name, *more) for name, more in ({"ab": ()} | BASELINES).items()}


def _numbers_to_store(weight: torch.Tensor) -> int:
    """Of a weight, or of its factors where those are fewer; the rank is that of its singular values."""
    if weight.ndim < 2:
        return weight.numel()
    tall, _ = to_tall(weight.double())
    singular = torch.linalg.svdvals(tall)
    return min(weight.numel(), int((singular > 1e-5 * singular[0]).sum()) * sum(tall.shape))


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_vgg_is_ten_times_smaller_at_three_points_of_accuracy(vgg: dict[str, dict[str, Any]]) -> None:
    """All 10,000 test images; the size is counted from the ranks of the weights that were tested."""
    accuracy = {name: run["metrics"]["test/accuracy"] for name, run in vgg.items()}
    net = load_run(vgg["ab"]["folder"], "last")[0].net
    weights = list(net.parameters())
    ratio = sum(weight.numel() for weight in weights) / sum(_numbers_to_store(weight.detach()) for weight in weights)
    print(accuracy, ratio)
    assert ratio >= 10
    assert accuracy["ab"] >= max(accuracy[name] for name in BASELINES) - 0.03
    assert min(accuracy[name] for name in BASELINES) > 0.7  # they have learned
