"""Fields that rotate: samples of a step for each device. Their physics is in tests/physics/test_advected_fields.py."""

from __future__ import annotations

import pytest
import torch

from datamodules.weather import AdvectedFields
from parallel.sharding import JigsawGrid
from tests.datamodules.test_weather import placed

SMALL = {"height": 16, "width": 32, "truncation": 5, "num_train": 2, "records": 24, "leads_h": [6, 12]}


def fields(folder, **options) -> AdvectedFields:
    return AdvectedFields(str(folder), **{**SMALL, **options})


@pytest.mark.parametrize(("options", "expected"), [({"local_batch_size": 3}, 3), ({"batch_size": 12}, None)])
def test_samples_of_a_step_are_counted_on_a_device_or_over_all(tmp_path, options, expected):
    seen = {}
    for devices in (1, 2, 4):
        parts = []
        for rank in range(devices):
            data = placed(fields(tmp_path, **options), JigsawGrid(data_size=devices, data=rank))
            loader = data.train_dataloader()
            assert loader.batch_size == next(iter(loader))["input"].shape[0] == (expected or 12 // devices)
            parts.append(torch.cat([batch["index"] for batch in loader]))
        seen[devices] = len(torch.cat(parts).unique())
        assert data.val_dataloader().batch_size * devices == 16  # of evaluation over all devices, as ever
    samples = 2 * 23
    size = {devices: (expected or 12 // devices) * devices for devices in (1, 2, 4)}
    assert seen == {n: samples // size[n] * size[n] for n in (1, 2, 4)}


def test_without_a_trainer_there_is_one_device(tmp_path):
    data = fields(tmp_path, local_batch_size=5)
    data.setup("fit")
    assert data.train_dataloader().batch_size == 5


def test_wrong_local_batches_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"data\.local_batch_size=0: must be at least 1"):
        fields(tmp_path, local_batch_size=0)
    data = placed(fields(tmp_path, local_batch_size=30), JigsawGrid(data_size=2))
    with pytest.raises(ValueError, match=r"data\.batch_size=60 is larger than the training part \(46 samples\)"):
        data.train_dataloader()
