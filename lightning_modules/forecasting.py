"""Forecaster: trains and evaluates any network that maps a batch of windows to a forecast."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, get_args

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_modules.metrics.calibration import (
    ConformalIntervals,
    ConformalScores,
    QuantileScores,
    QuantileSet,
    RollingScores,
    pinball_loss,
    point_index,
    quantile_levels,
)
from lightning_modules.metrics.forecast import ForecastErrors, SumRatio
from lightning_modules.metrics.sums import keeping_type
from lightning_modules.supervised import Supervised

Batch = dict[str, Tensor]
Calibration = Literal["none", "conformal", "rolling"]

_LOSSES: dict[str, Callable[..., Tensor]] = {"l1": F.l1_loss, "mse": F.mse_loss, "huber": F.huber_loss}
_NEEDED_FROM_DATA = (
    "channel_names",
    "target_scale",
    "mase_scale",
    "season_length",
    "cycle_length",
    "horizon",
)
_VALIDATION_METRICS = ("mae", "mae_scaled", "mse_scaled", "skill_rhp_percent", "pinball_scaled")
_PASSED_ON = ("valid", "origin", "target_day_type", "target_holiday")


class TargetUnits(nn.Module):
    """Scaler of the targets as buffers, so that a checkpoint can convert its forecasts without the data.

    Their sizes are those of the data or of the checkpoint, whichever comes first.
    """

    location: Tensor
    scale: Tensor
    mase_scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("location", "scale", "mase_scale"):
            self.register_buffer(name, torch.zeros(0))

    def assign(self, location: Tensor, scale: Tensor, mase_scale: Tensor) -> None:
        """Take over the statistics of a DataModule, each (channel,)."""
        for name, value in (("location", location), ("scale", scale), ("mase_scale", mase_scale)):
            setattr(self, name, value.detach().to(self.scale).clone())

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply(keeping_type(fn), recurse)  # units of 8 bits are none

    def forward(self, scaled: Tensor) -> Tensor:
        """Values in the data's units, (batch, time, channel) or (batch, time, channel, quantile)."""
        shape = (-1, 1) if scaled.ndim == 4 else (-1,)
        return scaled * self.scale.view(shape) + self.location.view(shape)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in list(self.named_buffers()):
            if (stored := state_dict.get(f"{prefix}{name}")) is not None:
                setattr(self, name, torch.empty_like(stored, device=buffer.device))
        super()._load_from_state_dict(state_dict, prefix, *args)


class Forecaster(Supervised):
    """Point or quantile forecasts: training on the scaled axis, evaluation on it and in the data's units.

    Works with every network that is called as ``net(batch)`` and returns (batch, time, channel) or (batch, time,
    channel, quantile) on the scaled axis; a method ``net.penalty() -> Tensor``, if it has one, is added to the training
    loss. A network with ``net.member_outputs(batch) -> list[Tensor]`` (`networks.ensemble.Ensemble`) is trained on the
    sum of its members' losses, ``train/loss`` is their mean. Series with a missing value in a window (``valid`` is
    False) count neither in the loss nor in a metric.

    Steps of validation, test and predict return, in the data's units, ``prediction`` (batch, time, channel[,
    quantile]), ``target`` and ``profile`` (batch, time, channel), further ``loss`` (scaled axis), ``valid``,
    ``origin``, ``target_day_type``, ``target_holiday``, and ``quantiles`` (quantile,) for quantile models; predict has
    neither ``loss`` nor, beyond the end of the data, ``target``.

    Logged: ``train/loss``, ``val/loss`` and a few of, in test all of, the values of `ForecastErrors` and
    `QuantileScores`; they are exact for any number of ranks and any batch size.

    Args:
        net: The network.
        optimizer: Partial that takes the parameters, e.g. ``functools.partial(torch.optim.Adam, lr=1e-3)``. None: the
            module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        loss: ``l1``, ``mse`` or ``huber`` (delta = 1) for point forecasts. With ``quantiles`` it must be ``l1``, which
            then means its generalisation, the pinball loss.
        quantiles: Levels, or their number Q (see ``quantile_set``); must be what the network emits. None: point
            forecast.
        quantile_set: Levels that a number stands for: ``equidistant``, ``upper`` or ``lower``
            (`metrics.calibration.quantile_levels`).
        sort_quantiles: Whether forecasts are rearranged into ascending order (training sees the raw ones). It never
            increases the pinball loss (Chernozhukov, Fernandez-Val and Galichon, 2010).
        calibrate: ``conformal``: after every validation the central intervals are calibrated for each lead day; test
            and predict widen or narrow them accordingly, validation reports the raw ones. ``rolling``: test and
            predict calibrate every origin on the latest windows whose targets lie wholly before it, those of
            validation and of the test part, so that the intervals follow a series that changes. It costs one more
            pass over both parts. ``none``: never.
        calibration_windows: Windows that ``rolling`` looks back on (56 daily origins = eight weeks).
        scheduler_monitor: Metric given to schedulers that watch one (ReduceLROnPlateau).
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.
        log_steps: Whether the loss of single steps is logged too, as ``train/loss_step``. It costs as much as a
            training step of a small network.
        log_channels: Whether test reports the MAE of every channel.
    """

    batch_keys: ClassVar[tuple[str, ...]] = (
        "history",
        "target",
        "valid",
        "forecast_profile",
        "target_day_type",
        "target_holiday",
        "origin",
    )

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        loss: str = "l1",
        quantiles: int | Sequence[float] | None = None,
        quantile_set: QuantileSet = "equidistant",
        sort_quantiles: bool = True,
        calibrate: Calibration = "none",
        calibration_windows: int = 56,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
        log_steps: bool = False,
        log_channels: bool = False,
    ) -> None:
        if loss not in _LOSSES:
            raise ValueError(f"model.loss={loss!r} is unknown; choose one of {', '.join(_LOSSES)}.")
        if quantiles is not None and loss != "l1":
            raise ValueError(
                f"model.loss={loss!r} has no quantiles; set model.loss=l1 (pinball) or model.quantiles=null."
            )
        if calibrate not in get_args(Calibration):
            raise ValueError(
                f"model.calibrate={calibrate!r} is unknown; choose one of {', '.join(get_args(Calibration))}."
            )
        if calibration_windows < 1:
            raise ValueError(f"model.calibration_windows={calibration_windows} calibrates on nothing; give at least 1.")
        if calibrate != "none" and quantiles is None:
            raise ValueError(f"model.calibrate={calibrate!r} needs intervals; set model.quantiles, e.g. to 9.")
        super().__init__(net, optimizer, scheduler, scheduler_monitor, scheduler_interval)
        self.save_hyperparameters(ignore=list(self.objects))
        self.loss, self.sort_quantiles = loss, sort_quantiles
        self.log_steps, self.log_channels = log_steps, log_channels
        self.levels = None if quantiles is None else quantile_levels(quantiles, quantile_set)
        if self.levels is not None:
            self.register_buffer("quantiles", torch.tensor(self.levels), persistent=False)
        self.units = TargetUnits()
        self.calibrate, self.calibration_windows = calibrate, calibration_windows
        self.intervals = None if calibrate == "none" else ConformalIntervals(self.levels)
        self.cycle_length = self.season_length = 0  # known after setup

    # ------------------------------------------------------------------------------------------------ preparation

    @override
    def setup(self, stage: str) -> None:
        data = self._datamodule()
        self.cycle_length, self.season_length = data.cycle_length, data.season_length
        self._adopt_units()
        location, scale = data.target_scale
        sizes = (location, scale, data.mase_scale, data.horizon, data.cycle_length)
        self.val_loss, self.test_loss = SumRatio(), SumRatio()
        self.val_errors = ForecastErrors(*sizes, breakdown=False)
        self.test_errors = ForecastErrors(*sizes, channel_names=data.channel_names if self.log_channels else None)
        if self.levels is not None:
            self.val_quantiles = QuantileScores(self.levels, scale)
            self.test_quantiles = QuantileScores(self.levels, scale)
        if self.calibrate == "conformal":
            self.conformal_scores = ConformalScores(self.levels, data.cycle_length)
        elif self.calibrate == "rolling":
            self.rolling_scores = RollingScores(self.levels, data.cycle_length, self.calibration_windows)

    def _datamodule(self) -> Any:
        data = getattr(self.trainer, "datamodule", None)
        needed = (*_NEEDED_FROM_DATA, *(["calibration_dataloader"] if self.calibrate == "rolling" else []))
        if missing := [name for name in needed if not hasattr(data, name)]:
            raise ValueError(
                f"data: {type(self).__name__} needs a DataModule with {', '.join(missing)} "
                "(datamodules.series.SeriesDataModule has them); loaders alone do not tell the units."
            )
        return data

    def _adopt_units(self) -> None:
        """Batches are scaled by the DataModule at hand: its statistics win over those of a checkpoint."""
        data = self._datamodule()
        self.units.assign(*data.target_scale, data.mase_scale)

    # --------------------------------------------------------------------------------------------------- forecast

    @override
    def forward(self, batch: Batch) -> Tensor:
        """What the network says, scaled, (batch, time, channel[, quantile])."""
        return self._checked(self.net(batch), batch)

    def _checked(self, prediction: Tensor, batch: Batch) -> Tensor:
        """Refuse outputs of a network whose sizes disagree with the data or the levels."""
        batch_size, _, channels = batch["history"].shape
        expected = (batch_size, batch["forecast_profile"].shape[1], channels)
        if self.levels is not None:
            expected += (len(self.levels),)
            if len(self.levels) == 1 and prediction.ndim == 3:
                prediction = prediction.unsqueeze(-1)
        if prediction.shape != expected:
            raise ValueError(
                f"model.net returned shape {tuple(prediction.shape)}, expected {expected} (batch, time, channel"
                f"{', quantile' if self.levels else ''}); check the sizes of model.net and model.quantiles="
                f"{self.levels}."
            )
        return prediction

    def forecast(self, batch: Batch, *, calibrated: bool = True) -> Tensor:
        """Forecast as it is delivered: in order, calibrated; scaled, (batch, time, channel[, quantile])."""
        prediction = self(batch).to(batch["history"].dtype)  # autocast may leave half precision
        if self.levels is not None and self.sort_quantiles:
            prediction = prediction.sort(dim=-1).values
        if self.intervals is not None and calibrated:
            offsets = None
            if self.calibrate == "rolling":
                offsets = self.rolling_scores.offsets(batch["origin"], prediction.shape[1])
            prediction = self.intervals(prediction, self.cycle_length, offsets)
        return prediction

    def point(self, prediction: Tensor) -> Tensor:
        """Point forecast, (batch, time, channel): the quantile nearest to the median, or the forecast itself."""
        return prediction if self.levels is None else prediction[..., point_index(self.levels)]

    def _window_losses(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean loss over time (and quantiles) of each window, (batch, channel)."""
        if self.levels is None:
            return _LOSSES[self.loss](prediction, target, reduction="none").mean(1)
        return pinball_loss(prediction, target, self.quantiles).mean((1, 3))

    # --------------------------------------------------------------------------------------------------- training

    def _outputs_to_train(self, batch: Batch) -> list[Tensor]:
        """What the loss is taken of: the members of an ensemble one by one, or the one forecast there is."""
        if hasattr(self.net, "member_outputs"):
            return [self._checked(output, batch) for output in self.net.member_outputs(batch)]
        return [self(batch)]

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        valid = batch["valid"]
        target = batch["target"]
        outputs = self._outputs_to_train(batch)
        losses = torch.stack([self._window_losses(output.to(target.dtype), target) for output in outputs]).sum(0)
        total = torch.where(valid, losses, losses.new_zeros(())).sum()
        # Divided by all windows, not by the valid ones: a valid value then weighs the same in every batch and on every
        # rank, and the gradient averaged over ranks is that of one process.
        loss = total / valid.numel()
        sums = (total.detach().double() / len(outputs), valid.sum())
        self._add_to_epoch("loss", *sums)
        if self.log_steps:
            self.log("train/loss_step", (sums[0] / sums[1]).to(target.dtype), on_step=True, on_epoch=False)
        if hasattr(self.net, "penalty"):
            loss = loss + self.net.penalty()
        return {"loss": loss}

    # ------------------------------------------------------------------------------------------------- evaluation

    def _evaluation_step(self, batch: Batch, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        prediction = self.forecast(batch, calibrated=stage == "test")
        target, valid, profile = batch["target"], batch["valid"], batch["forecast_profile"]
        losses = torch.where(valid, self._window_losses(prediction, target), prediction.new_zeros(())).double()
        getattr(self, f"{stage}_loss").update(losses.sum(), valid.sum())
        last_week = repeat_last(batch["history"], self.season_length, target.shape[1])
        getattr(self, f"{stage}_errors").update(
            self.point(prediction),
            target,
            valid,
            peers={"rhp": profile, "last_week": last_week},
            day_type=batch["target_day_type"],
            holiday=batch["target_holiday"],
        )
        if self.levels is not None:
            getattr(self, f"{stage}_quantiles").update(prediction, target, valid)
        if stage == "val" and self.calibrate == "conformal":
            self.conformal_scores.update(prediction, target, valid)
        return {"loss": (losses.sum() / valid.sum()).to(target.dtype)} | self._in_units(batch, prediction)

    def _in_units(self, batch: Batch, prediction: Tensor) -> dict[str, Tensor]:
        """What callbacks may read of a step."""
        out = {"prediction": self.units(prediction), "profile": self.units(batch["forecast_profile"])}
        if "target" in batch:
            out["target"] = self.units(batch["target"])
        if self.levels is not None:
            out["quantiles"] = self.quantiles
        return out | {key: batch[key] for key in _PASSED_ON if key in batch}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluation_step(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluation_step(batch, "test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._in_units(batch, self.forecast(batch))

    @override
    def on_validation_epoch_start(self) -> None:
        self._adopt_units()
        self._reset(self.val_loss, self.val_errors, getattr(self, "val_quantiles", None))
        self._reset(getattr(self, "conformal_scores", None))

    @override
    def on_test_epoch_start(self) -> None:
        self._adopt_units()
        self._prepare_calibration()
        self._reset(self.test_loss, self.test_errors, getattr(self, "test_quantiles", None))

    @override
    def on_predict_epoch_start(self) -> None:
        self._adopt_units()
        self._prepare_calibration()

    @staticmethod
    def _reset(*metrics: Any) -> None:
        for metric in metrics:
            if metric is not None:
                metric.reset()

    def _prepare_calibration(self) -> None:
        if self.calibrate == "rolling":
            self._score_past_windows()
        elif self.calibrate == "conformal" and not self.intervals.fitted:
            rank_zero_warn(
                "model.calibrate='conformal', but these weights were never validated: the intervals are the raw ones. "
                "Run validation first (validate=true) or load a checkpoint of a finished epoch."
            )

    def _score_past_windows(self) -> None:
        """Forecast all windows of validation and test once, uncalibrated, on every rank alike."""
        self.rolling_scores.reset()
        for batch in self._datamodule().calibration_dataloader():
            batch = move_data_to_device(batch, self.device)
            with self.trainer.precision_plugin.forward_context():
                prediction = self.forecast(batch, calibrated=False)
            self.rolling_scores.update(prediction, batch["target"], batch["valid"], batch["origin"])

    @override
    def on_validation_epoch_end(self) -> None:
        values = self._values("val")
        self._log_exact({"val/loss": values.pop("loss")}, prog_bar=True)
        self._log_exact({f"val/{name}": values[name] for name in _VALIDATION_METRICS if name in values})
        if self.calibrate == "conformal" and not self.trainer.sanity_checking:
            # Now, and not in on_validation_end: that is where ModelCheckpoint saves the buffers.
            self._join_gather()
            self.intervals.fit_offsets(self.conformal_scores.compute())
            self.conformal_scores.reset()

    @override
    def on_test_epoch_end(self) -> None:
        self._log_exact({f"test/{name}": value for name, value in self._values("test").items()})

    def _values(self, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        values = {"loss": getattr(self, f"{stage}_loss").compute(), **getattr(self, f"{stage}_errors").compute()}
        return values if self.levels is None else values | getattr(self, f"{stage}_quantiles").compute()

    def _join_gather(self) -> None:
        """Give a rank that had no window an empty block of the right shape: all ranks gather equal dimensions."""
        data, channels = self._datamodule(), len(self.units.scale)
        target = self.units.scale.new_zeros(0, data.horizon, channels)
        prediction = target.new_zeros(*target.shape, len(self.levels))
        self.conformal_scores.update(prediction, target, target.new_zeros(0, channels, dtype=torch.bool))


def repeat_last(history: Tensor, season_length: int, horizon: int) -> Tensor | None:
    """Forecast that repeats the last season, (batch, horizon, channel); None if the history is shorter than one."""
    if history.shape[1] < season_length:
        return None
    season = history[:, history.shape[1] - season_length :]
    return season.repeat(1, math.ceil(horizon / season_length), 1)[:, :horizon]
