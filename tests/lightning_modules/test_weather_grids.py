"""The whole course of an experiment on grids of ranks: what is logged, and every forecast, is that of one device."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import xarray

from callbacks.forecast_store import ForecastStore
from datamodules.weather import ShallowWater
from lightning_modules.weather import WeatherMixerModule
from networks.weather_mixer import WeatherMixer
from parallel.sharding.blocks import block_of
from strategies.jigsaw import JigsawStrategy
from tests.lightning_modules.test_weather import Clock

NET = {"height": 16, "width": 32, "num_inputs": 6, "num_outputs": 4, "patch": 4, "dim": 16, "token_hidden": 16}


def course(cache: str, folder: str, sizes: tuple[int, int, int] | None, in_memory: bool) -> dict[str, float]:
    """Train on rollouts for an epoch, test, predict; everything that was logged."""
    data = ShallowWater(
        cache, truncation=10, dt_s=900.0, spin_up_days=2.0, num_train=2, records=14, leads_h=[6, 24], height=16,
        width=32, chunk_token=2, eval_every=1, train_steps=2, in_memory=in_memory, batch_size=4, eval_batch_size=8,
    )  # fmt: skip
    module = WeatherMixerModule(
        partial(WeatherMixer, **NET, blocks=1, dropout=0.1), partial(torch.optim.AdamW, lr=3e-3), None,
        rollout_max=2, edge_lr_factor=0.5, linear_patterns=4,
    )  # fmt: skip
    clock = Clock()
    ranks = {"devices": math.prod(sizes), "strategy": JigsawStrategy(*sizes)} if sizes else {}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=folder, gradient_clip_val=0.5,
        callbacks=[ForecastStore(folder), clock], **ranks,
    )  # fmt: skip
    trainer.fit(module, data)
    found = {name: float(value) for name, value in trainer.callback_metrics.items()}
    # A rollout of two steps: for the gradient of the input of the second the weights of the embedding travel once more.
    formula = 2 * sum(map(sum, module.net.received_bytes(clock.samples // clock.steps).values()))
    formula += 4 * block_of(module.net.embedding.weight).numel() * (module.net.grid.token_size - 1)
    blocks = [block_of(parameter).numel() for parameter in module.parameters()]
    # Gradient and two moments are as large as a parameter, beside them is the number of steps.
    found |= {"_formula": formula, "_held": 4 * 4 * sum(blocks) + 4 * len(blocks)}
    found["_samples/s"] = clock.samples / clock.seconds * (sizes[2] if sizes else 1)
    found["_io"] = clock.io_bytes / clock.steps
    trainer.test(module, data, verbose=False)
    found |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    found["rows"] = len(module.skill)
    trainer.predict(module, data, return_predictions=False)
    return found


@pytest.fixture(scope="module")
def serial(tmp_path_factory) -> tuple[Path, dict[str, float], Any]:
    folder = tmp_path_factory.mktemp("serial")
    found = course(str(folder), str(folder), None, True)
    return folder, found, xarray.open_zarr(folder / "forecasts.zarr", chunks=None).load()


@pytest.mark.parametrize(
    ("token", "channel", "data", "in_memory"),
    [
        (2, 2, 1, False),
        pytest.param(1, 2, 1, True, marks=pytest.mark.slow),
        pytest.param(2, 1, 1, False, marks=pytest.mark.slow),
        pytest.param(1, 2, 2, True, marks=pytest.mark.slow),
    ],
)
def test_a_grid_of_ranks_does_what_one_does(tmp_path, request, serial, token, channel, data, in_memory):
    cache, expected, forecasts = serial
    ranks = request.getfixturevalue(f"ranks{token * channel * data}")
    results = ranks(course, str(cache), str(tmp_path), (token, channel, data), in_memory)
    own = {name for name in expected if "/rank" in name or name.startswith(("mem/", "_")) or name.endswith("/s")}
    assert len(own) == 8 + 4
    for found in results:
        assert found.keys() == expected.keys()
        for name in expected.keys() - own:
            assert found[name] == pytest.approx(expected[name], rel=2e-4, abs=2e-5), name
        if channel == 1:  # groups of channels are padded to one width
            assert found["flops/rank"] == pytest.approx(expected["flops/rank"] / token)
        assert found["samples/s"] == pytest.approx(found["_samples/s"], rel=0.3)  # busy machines
        for name in own - {"_formula", "_held", "_samples/s", "_io"}:
            assert found[name] == results[0][name], name
        mean = {name: sum(found[name] for found in results) / len(results) for name in ("_formula", "_io")}
        assert found["comm_bytes/rank"] == pytest.approx(mean["_formula"], rel=1e-6) and mean["_formula"] > 0
        assert found["io_bytes/rank"] == pytest.approx(mean["_io"], rel=1e-6)
        assert (found["io_bytes/rank"] > 0) == (found["io_gb/s"] > 0) != in_memory
        assert found["mem/params"] == max(found["_held"] for found in results)
        parts = {"mem/params": token * channel, "mem/activations": token * channel * data}
        for name, count in parts.items():
            assert 0.95 * expected[name] / count < found[name] < 1.5 * expected[name] / count, name
    written = xarray.open_zarr(tmp_path / "forecasts.zarr", chunks=None)
    for name in ("h", "u", "v", "zeta"):
        assert np.allclose(written[name].values, forecasts[name].values, rtol=1e-3, atol=1e-2), name
