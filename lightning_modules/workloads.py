"""The two workloads of the energy study (Caspart et al., 2022): a load forecast and a classifier of X-ray images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import BinaryAUROC, BinaryConfusionMatrix
from typing_extensions import override

from lightning_modules.classification import LabelledImages, Stage
from lightning_modules.metrics.forecast import SumRatio
from lightning_modules.metrics.load import LoadErrors
from lightning_modules.supervised import Supervised

Batch = dict[str, Tensor]

_LOSSES: dict[str, Callable[..., Tensor]] = {"mse": F.mse_loss, "l1": F.l1_loss}


class Workload(Supervised):
    """What both workloads share beyond other supervised modules: a warning about untrained weights.

    Args:
        net: The network.
        optimizer: Partial that takes the parameters.
        scheduler: Partial that takes the optimizer; None: constant learning rate.
        weights: Whether the network begins with weights that somebody trained.
        scheduler_monitor: Metric given to schedulers that watch one.
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None,
        scheduler: Callable[..., Any] | None,
        weights: bool,
        scheduler_monitor: str,
        scheduler_interval: Literal["epoch", "step"],
    ) -> None:
        super().__init__(net, optimizer, scheduler, scheduler_monitor, scheduler_interval)
        self._trained, self._warned = weights, False
        self.register_load_state_dict_post_hook(_mark_trained)
        self.val_loss, self.test_loss = SumRatio(), SumRatio()

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        self._trained = True

    def _warn_if_untrained(self) -> None:
        if not self._trained and not self._warned:
            self._warned = True
            rank_zero_warn(
                "these weights are random: energy and time are right, errors are not. Give the checkpoint of a "
                "training run: ckpt_path=logs/<name>/<stamp>/checkpoints/best.ckpt"
            )


def _mark_trained(module: Workload, _: Any) -> None:
    module._trained = True


class LoadLSTM(Workload):
    """Forecasts the load of the next week from the last one, series by series.

    Batches are those of `datamodules.load_weeks.LoadWeeks`. Steps of validation, test and predict return in the data's
    units ``prediction`` (batch, time, 1) and, where it is known, ``target``; further ``series``, ``origin``, ``index``
    (batch,) and, but for predict, ``loss`` (scaled axis).

    Logged: ``train/loss``, ``val/`` and ``test/`` ``loss`` and the values of `metrics.load.LoadErrors`; validation
    compares with the previous week alone, test with the previous day and the mean of the training part by hour of the
    week too. All are exact for any number of ranks and any batch size.

    Args:
        net: Maps (batch, time, 1) to the forecast of the following window (`networks.load_lstm.WeekAheadLSTM`).
        optimizer: Partial that takes the parameters, e.g. ``functools.partial(torch.optim.Adam, lr=1e-3)``. None: the
            module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        loss: ``mse``, the study's, or ``l1``, which minimises the reported MAE.
        weights: File of weights to begin with: the published ``energy_baseline.pt``, or a checkpoint of this program.
        legacy: Whether test also reports ``mape_batch_scaled_percent``, the MAPE of the published evaluation: every
            batch of mixed hours and series is scaled by its own extremes before the network sees it.
        scheduler_monitor: Metric given to schedulers that watch one (ReduceLROnPlateau).
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("history", "target", "location", "scale", "series", "origin", "index")

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        loss: Literal["mse", "l1"] = "mse",
        weights: str | None = None,
        legacy: bool = False,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(net, optimizer, scheduler, weights is not None, scheduler_monitor, scheduler_interval)
        if loss not in _LOSSES:
            raise ValueError(f"model.loss={loss!r} is unknown; choose one of {', '.join(_LOSSES)}.")
        self.save_hyperparameters(ignore=["net", "optimizer", "scheduler"])
        self.loss, self.legacy = loss, legacy
        if weights is not None:
            net.load_published(weights)
        self.val_errors, self.test_errors, self.test_batch_scaled = LoadErrors(), LoadErrors(), SumRatio()

    @override
    def forward(self, history: Tensor) -> Tensor:
        """Forecast of the next week, scaled, (batch, time, 1)."""
        return self.net(history)

    # --------------------------------------------------------------------------------------------------- training

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        target = batch["target"]
        loss = _LOSSES[self.loss](self(batch["history"]).to(target.dtype), target)
        self._add_to_epoch("loss", loss.detach().double() * len(target), len(target))
        return {"loss": loss}

    # ------------------------------------------------------------------------------------------------- evaluation

    def _evaluation_step(self, batch: Batch, stage: Literal["val", "test"]) -> dict[str, Tensor]:
        history, target = batch["history"], batch["target"]
        prediction = self(history).to(target.dtype)
        loss = _LOSSES[self.loss](prediction, target)
        getattr(self, f"{stage}_loss").update(loss.double() * len(target), len(target))
        baselines = {"previous_week": history}
        if stage == "test":
            day = history.shape[1] // 7
            baselines["previous_day"] = history[:, -day:].repeat(1, 7, 1)
            baselines["seasonal_mean"] = batch.get("seasonal_mean")
        getattr(self, f"{stage}_errors").update(prediction, target, batch["location"], batch["scale"], baselines)
        if self.legacy and stage == "test":
            self._add_batch_scaled(batch)
        return {"loss": loss} | self._in_units(batch, prediction)

    def _add_batch_scaled(self, batch: Batch) -> None:
        """The published ``evaluate_mape.py``: the extremes of the batch at hand scale its inputs and its forecasts."""
        history, target = _to_units(batch["history"], batch), _to_units(batch["target"], batch)
        low, high = history.min(), history.max()
        prediction = self((history - low) / (high - low)) * (high - low) + low
        relative = (1 - prediction / target).abs()
        counted = target != 0
        self.test_batch_scaled.update(100 * relative[counted].double().sum(), counted.sum())

    @staticmethod
    def _in_units(batch: Batch, prediction: Tensor) -> dict[str, Tensor]:
        """What callbacks may read of a step."""
        out = {"prediction": _to_units(prediction, batch)}
        if "target" in batch:
            out["target"] = _to_units(batch["target"], batch)
        return out | {key: batch[key] for key in ("series", "origin", "index")}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluation_step(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluation_step(batch, "test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._in_units(batch, self(batch["history"]).to(batch["history"].dtype))

    @override
    def on_validation_epoch_start(self) -> None:
        self.val_loss.reset()
        self.val_errors.reset()

    @override
    def on_test_epoch_start(self) -> None:
        self._warn_if_untrained()
        for metric in (self.test_loss, self.test_errors, self.test_batch_scaled):
            metric.reset()

    @override
    def on_predict_epoch_start(self) -> None:
        self._warn_if_untrained()

    @override
    def on_validation_epoch_end(self) -> None:
        values = self.val_errors.compute()
        self._log_exact({"val/loss": self.val_loss.compute(), "val/mase": values.pop("mase")}, prog_bar=True)
        self._log_exact({f"val/{name}": value for name, value in values.items()})

    @override
    def on_test_epoch_end(self) -> None:
        values = {"loss": self.test_loss.compute()} | self.test_errors.compute()
        if self.legacy:
            values["mape_batch_scaled_percent"] = self.test_batch_scaled.compute()
        self._log_exact({f"test/{name}": value for name, value in values.items()})


def _to_units(scaled: Tensor, batch: Batch) -> Tensor:
    """Values in the data's units, (batch, time, 1)."""
    return scaled * batch["scale"].view(-1, 1, 1) + batch["location"].view(-1, 1, 1)


class XrayVGG(LabelledImages, Workload):
    """Tells X-ray images with a finding from those without.

    Batches are those of `datamodules.xray.XrayImages`. Steps of validation, test and predict return ``prediction``
    (batch,) int64, 1 = positive, ``probability`` (batch,) of the positive class, ``index`` (batch,) and, where the
    label is known, ``target`` (batch,); validation and test also ``loss``.

    Logged: ``train/``, ``val/`` and ``test/`` ``loss`` and ``accuracy``; ``val/`` and ``test/`` ``auroc``,
    ``sensitivity``, ``specificity``, and the confusion matrix as ``true_negatives``, ``false_positives``,
    ``false_negatives``, ``true_positives``. All are exact for any number of ranks and any batch size.

    Args:
        net: Maps (batch, 1, height, width) to logits (batch, 2) (`networks.vgg.VGG`).
        optimizer: Partial that takes the parameters. None: the module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        scheduler_monitor: Metric given to schedulers that watch one (ReduceLROnPlateau).
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label", "index")
    score_names: ClassVar[tuple[str, ...]] = ("confusion", "auroc")

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(net, optimizer, scheduler, False, scheduler_monitor, scheduler_interval)
        self.save_hyperparameters(ignore=["net", "optimizer", "scheduler"])
        for stage in ("val", "test"):
            setattr(self, f"{stage}_confusion", BinaryConfusionMatrix(validate_args=False))
            setattr(self, f"{stage}_auroc", BinaryAUROC(validate_args=False))

    @override
    def forward(self, image: Tensor) -> Tensor:
        """Logits, (batch, 2)."""
        return self.net(image)

    @override
    def _probability(self, logits: Tensor) -> Tensor:
        """Of the positive class, (batch,)."""
        return logits.softmax(1)[:, 1]

    @override
    def update_scores(self, stage: Stage, logits: Tensor, label: Tensor) -> None:
        getattr(self, f"{stage}_confusion").update(logits.argmax(1), label)
        getattr(self, f"{stage}_auroc").update(self._probability(logits), label)

    @override
    def on_test_epoch_start(self) -> None:
        self._warn_if_untrained()
        super().on_test_epoch_start()

    @override
    def on_predict_epoch_start(self) -> None:
        self._warn_if_untrained()

    @override
    def scores(self, stage: Stage) -> dict[str, Tensor]:
        auroc = getattr(self, f"{stage}_auroc")
        (true_negatives, false_positives), (false_negatives, true_positives) = (
            getattr(self, f"{stage}_confusion").compute().double()
        )
        negatives, positives = true_negatives + false_positives, false_negatives + true_positives
        return {
            "loss": getattr(self, f"{stage}_loss").compute(),
            "accuracy": (true_negatives + true_positives) / (negatives + positives),
            # With one class alone there is nothing to rank; torchmetrics would say 0.
            "auroc": auroc.compute().double() if negatives and positives else negatives.new_tensor(torch.nan),
            "sensitivity": true_positives / positives,
            "specificity": true_negatives / negatives,
            "true_negatives": true_negatives,
            "false_positives": false_positives,
            "false_negatives": false_negatives,
            "true_positives": true_positives,
        }
