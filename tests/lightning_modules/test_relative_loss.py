"""FourCastNet's loss, and its preset on a small store of its twenty channels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from datamodules.readers.weather_store import Channel, PackedWriter
from lightning_modules.weather.loss import relative_distance
from runner import job
from tests.composing import composed, plain

PUBLISHED = [
    "u10", "v10", "t2m", "sp", "msl", "t850", "u1000", "v1000", "z1000", "u850", "v850", "z850", "u500", "v500", "z500",
    "t500", "z50", "r500", "r850", "tcwv",
]  # fmt: skip
HEIGHT, WIDTH = 16, 32


def test_the_distance_by_hand():
    """Two samples of two numbers: |(3, 4) - 0| / |(6, 8)| = 1/2 and |(1, 0)| / |(0, 2)| = 1/2 ... and 3/2."""
    target = torch.tensor([[6.0, 8.0], [0.0, 2.0]]).view(2, 1, 2, 1)
    prediction = target + torch.tensor([[3.0, 4.0], [3.0, 0.0]]).view(2, 1, 2, 1)
    assert float(relative_distance(prediction, target)) == pytest.approx((0.5 + 1.5) / 2)
    scaled = relative_distance(7 * prediction, 7 * target)
    torch.testing.assert_close(scaled, relative_distance(prediction, target))


def test_channels_by_name():
    found = [Channel.named(name) for name in PUBLISHED]
    assert [channel.name for channel in found] == PUBLISHED
    assert found[0] == Channel("u10") and found[2] == Channel("t2m") and found[-1] == Channel("tcwv")
    assert found[6] == Channel("u", 1000.0) and found[16] == Channel("z", 50.0)
    assert Channel.named("total_column_water_vapour") == Channel("tcwv")


@pytest.fixture
def store(tmp_path):
    times = np.datetime64("1979-01-01", "ns") + np.arange(24) * np.timedelta64(6, "h")
    latitudes = 90 - (np.arange(HEIGHT) + 0.5) * 180 / HEIGHT
    writer = PackedWriter(
        tmp_path / "era5.zarr", PUBLISHED, times, latitudes, np.arange(WIDTH) * 360 / WIDTH, {}, 1, 20, False
    )
    random = np.random.default_rng(0)
    for record in range(24):
        writer.write(record, random.normal(size=(20, HEIGHT, WIDTH)).astype(np.float32))
    writer.close()
    return tmp_path


SMALL = (
    "data.store=era5.zarr", f"data.height={HEIGHT}", f"data.width={WIDTH}", "data.train=null", "data.val=null",
    "data.test=null", "data.leads_h=[6,12]", "data.batch_size=2", "data.num_workers=0", "data.pin_memory=false",
    "trainer.precision=32-true", "model.net.dim=16", "model.net.depth=1", "model.baseline_samples=8", "num_threads=1",
    "callbacks=none", "logger=none",
)  # fmt: skip


@pytest.mark.parametrize("name", ["afno_paper", "afno_paper_finetune"])
def test_the_preset_of_the_paper_trains(store, name):
    config = plain(
        composed(f"experiment=energy_scaling/{name}", "debug=tiny", f"data_dir={store}", *SMALL, run_dir=store)
    )
    assert config["data"]["named"] == PUBLISHED and config["model"]["loss"] == "relative"
    result = job.run(config)
    assert result["status"] == "completed", result.get("error")
    # Noise of which nothing can be known: the distance from a forecast near zero is about one.
    assert 0.8 < result["metrics"]["val/loss"] < 1.6
    assert {"test/rmse/z500@6h", "test/acc/t2m@12h"} <= result["metrics"].keys()


def test_weights_and_other_mistakes_are_refused(store):
    composing = ("experiment=energy_scaling/afno_paper", "debug=tiny", f"data_dir={store}", *SMALL)
    for override, text in (
        ("model.latitude_weighted=true", "model.loss=relative has no weights"),
        ("model.loss=l2", r"model.loss='l2' is unknown; choose squared, relative"),
        ("data.surface=[t2m]", "data.named gives all channels"),
    ):
        result = job.run(plain(composed(*composing, override, run_dir=store / "run")))
        assert result["status"] == "failed" and text in result["error"], result["error"]
