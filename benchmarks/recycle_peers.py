"""The same forecasters here and in neuralforecast, the usual peer: time of a training and the error it buys.

Hourly Bay-Area road occupancy, three weeks to the next week, 32 windows a step, Adam at 1e-3, one thread, the same
number of steps, the last 20 % of the days as 141 test windows. Both programs train a network of the same published
shape (NLinear and DLinear have no other freedom; PatchTST and iTransformer get the same widths, heads and layers).
neuralforecast draws its windows from all hours, ours from midnights: that is how a user gets either. Both scale the
series by the statistics of the training part beforehand. Timed is the call a user makes: building, training, and
forecasting the 141 windows; imports are not. ReCycle itself, which neuralforecast lacks, stands beside them.

Needs the extra ``peers`` (1.7 GB): ``pip install -c constraints.txt -e '.[peers]'``.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.measure import compare, ratio_row, single_thread, time_rows
from benchmarks.record import Result, Row
from benchmarks.trained import configuration
from datamodules.series import SeriesDataModule
from runner import job

CLAIM: str = (
    "Training and testing the same forecaster here takes less time than in neuralforecast, and ReCycle has the lowest "
    "error of all."
)

HISTORY, HORIZON, WINDOWS = 504, 168, 141
# Enough for a few seconds each: the networks differ in cost by two orders of magnitude.
STEPS = {"nlinear": 600, "dlinear": 600, "itransformer": 200, "patchtst": 40}
SHAPES: dict[str, dict[str, Any]] = {
    "nlinear": {},
    "dlinear": {},
    "patchtst": {"hidden_size": 16, "n_heads": 4, "linear_hidden_size": 128, "encoder_layers": 3},
    "itransformer": {"n_series": 1, "hidden_size": 256, "n_heads": 8, "d_ff": 256, "e_layers": 2},
}
PEER_CLASSES = {"nlinear": "NLinear", "dlinear": "DLinear", "patchtst": "PatchTST", "itransformer": "iTransformer"}


def run(steps: Mapping[str, int] = STEPS, repeats: int = 5) -> Result:
    """Time both programs in turns, for each model."""
    os.environ.setdefault("NIXTLA_ID_AS_COL", "1")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    series = scaled_traffic()
    rows: list[Row] = []
    errors: dict[str, float] = {}
    with single_thread():
        for name, number in steps.items():
            variants = {"Wattlight": ours(name, number, errors), "neuralforecast": theirs(name, number, series, errors)}
            timings = compare(variants, repeats)
            what = f"{name}: train {number} steps and test"
            rows += time_rows(what, timings, unit="s")
            rows.append(ratio_row(what, timings, "neuralforecast", "Wattlight", at_least=1.0))
        ours("recycle", max(steps.values()), errors)()
    for key, value in errors.items():
        rows.append({"what": "test MAE, scaled, after these steps", "variant": key, "value": value, "unit": ""})
    settings = {"history": HISTORY, "horizon": HORIZON, "batch": 32, "repeats": repeats, "threads": 1}
    return Result(rows, settings, packages=("neuralforecast",))


def scaled_traffic() -> pd.DataFrame:
    """The series in neuralforecast's layout, on the scale that our DataModule uses."""
    data = SeriesDataModule("hourly_sf_traffic.csv", ["y"], country="US")
    data.prepare_data()
    data.setup("fit")
    location, scale = (float(part) for part in data.target_scale)
    frame = pd.read_csv(data.path, parse_dates=["ts"]).rename(columns={"ts": "ds"})
    return pd.DataFrame({"unique_id": "traffic", "ds": frame["ds"], "y": (frame["y"] - location) / scale})


def ours(name: str, steps: int, errors: dict[str, float]) -> Callable[[], None]:
    """What ``python run.py experiment=recycle model=NAME`` does, for a number of steps."""

    def call() -> None:
        with tempfile.TemporaryDirectory() as folder:
            result = job.run(
                configuration(
                    folder,
                    "experiment=recycle",
                    f"model={name}",
                    "optimizer=adam",
                    "scheduler=none",
                    f"trainer.max_steps={steps}",
                    "trainer.max_epochs=-1",
                    "trainer.check_val_every_n_epoch=10",
                )
            )
        if result["status"] != "completed":
            raise RuntimeError(f"{name}: {result.get('error', result['status'])}")
        errors[f"{name}, Wattlight"] = result["metrics"]["test/mae_scaled"]

    return call


def theirs(name: str, steps: int, series: pd.DataFrame, errors: dict[str, float]) -> Callable[[], None]:
    """The documented way there: ``NeuralForecast(...).cross_validation`` without refitting."""
    from neuralforecast import NeuralForecast, models

    def call() -> None:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = getattr(models, PEER_CLASSES[name])(
                h=HORIZON,
                input_size=HISTORY,
                max_steps=steps,
                learning_rate=1e-3,
                windows_batch_size=32,
                batch_size=32,
                scaler_type="identity",
                random_seed=0,
                alias="peer",
                enable_progress_bar=False,
                logger=False,
                enable_checkpointing=False,
                accelerator="cpu",
                **SHAPES[name],
            )
            # The windows begin at the midnights of days 584 to 724.
            forecast = NeuralForecast([model], freq="h").cross_validation(
                series, n_windows=WINDOWS, step_size=24, refit=False, verbose=False
            )
        errors[f"{name}, neuralforecast"] = float(np.abs(forecast["y"] - forecast["peer"]).mean())

    return call
