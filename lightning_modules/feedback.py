"""What F3 and its relatives are trained for: classes of images and values from rows of numbers.

Flügel, Coquelin, Weiel, Debus, Streit and Götz, "Feed-Forward Optimization With Delayed Feedback for Neural Network
Training", arXiv 2304.13372. How they learn: `lightning_modules.feedback_training`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_modules.classification import LabelledImages, Stage
from lightning_modules.feedback_training import Batch, FeedbackTraining
from lightning_modules.metrics.classification import ClassificationScores, Separation
from lightning_modules.metrics.forecast import SumRatio


class FeedbackClassifier(FeedbackTraining, LabelledImages):
    """Classes of images by any of the algorithms of `FeedbackTraining`.

    Batches are those of `datamodules.images.Images`. Logged: ``train/`` ``loss`` and ``accuracy``; ``val/`` and
    ``test/`` ``loss``, ``error`` (in percent) and the values of `metrics.classification.ClassificationScores`;
    ``test/auroc``, the mean over classes of the area under the ROC curve of one class against the others. With
    ``sigmoid_bce`` probabilities are the sigmoids over their sum.

    Args:
        net: Maps (batch, channel, height, width) to raw outputs (batch, class).
        optimizer: See `FeedbackTraining`.
        scheduler: See `FeedbackTraining`.
        num_classes: Number of classes.
        top_k: k of the top-k accuracy; None: not reported.
        num_bins: Bins of the calibration error.
        **options: Arguments of `FeedbackTraining`.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label", "index")
    score_names: ClassVar[tuple[str, ...]] = ("scores",)

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        num_classes: int = 10,
        top_k: int | None = 5,
        num_bins: int = 15,
        **options: Any,
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"model.num_classes={num_classes}: a classifier needs at least 2")
        if top_k is not None and not 1 <= top_k <= num_classes:
            raise ValueError(f"model.top_k={top_k}: must be 1 to {num_classes} (model.num_classes), or null")
        super().__init__(net, optimizer, scheduler, num_outputs=num_classes, **options)
        self.save_hyperparameters(ignore=list(self.objects))
        self.num_classes = num_classes
        for stage in ("val", "test"):
            setattr(self, f"{stage}_loss", SumRatio())
            setattr(self, f"{stage}_scores", ClassificationScores(num_classes, top_k, num_bins))
        self.test_separations = nn.ModuleList(Separation() for _ in range(num_classes))

    @override
    def forward(self, image: Tensor) -> Tensor:
        """Raw outputs, (batch, class)."""
        return self.net(image)

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        classes = getattr(self.trainer.datamodule, "num_classes", self.num_classes)
        if classes not in (None, self.num_classes):
            raise ValueError(f"model.num_classes={self.num_classes}, but the data have {classes} classes")

    @override
    def sample(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch["image"], self._one_hot(batch["label"], batch["image"].dtype)

    def _one_hot(self, label: Tensor, dtype: torch.dtype) -> Tensor:
        return F.one_hot(label, self.num_classes).to(dtype if dtype == torch.float64 else torch.float32)

    @override
    def note(self, raw: Tensor, batch: Batch) -> None:
        label = batch["label"]
        self._add_to_epoch("accuracy", (raw.argmax(1) == label).sum(), len(label))

    @override
    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        return self.objective.loss(logits, self._one_hot(label, logits.dtype))

    @override
    def _probability(self, logits: Tensor) -> Tensor:
        return self.objective.class_logits(logits).softmax(1)

    @override
    def uncertainties(self, logits: Tensor) -> dict[str, Tensor]:
        return super().uncertainties(self.objective.class_logits(logits))

    @override
    def on_test_epoch_start(self) -> None:
        super().on_test_epoch_start()
        for separation in self.test_separations:
            separation.reset()

    @override
    def update_scores(self, stage: Stage, logits: Tensor, label: Tensor) -> None:
        logits = self.objective.class_logits(logits)
        getattr(self, f"{stage}_scores").update(logits, label)
        if stage == "test":
            log_probability = logits.double().log_softmax(1)
            for c, separation in enumerate(self.test_separations):
                for is_class in (False, True):
                    separation.update(log_probability[(label == c) == is_class, c], is_class)

    @override
    def scores(self, stage: Stage) -> dict[str, Tensor]:
        values = {"loss": getattr(self, f"{stage}_loss").compute()} | getattr(self, f"{stage}_scores").compute()
        values["error"] = 100 * (1 - values["accuracy"])
        if stage == "test":
            values["auroc"] = torch.stack([separation.compute() for separation in self.test_separations]).nanmean()
        return values


class FeedbackRegressor(FeedbackTraining):
    """Values from rows of numbers by any of the algorithms of `FeedbackTraining`.

    Batches are those of `datamodules.tables.Tables`: ``features`` (batch, F), ``target`` (batch, C) and ``index``.
    Steps of validation and test return ``loss``, ``prediction`` and ``target`` (both as the network sees them,
    standardised by the DataModule) and ``index``; predict returns predictions in the units of the data.

    Logged: ``train/loss``; ``val/`` and ``test/`` ``loss``, ``mse`` and ``mae`` of standardised targets, ``mape`` in
    percent of the target in its own units (where that is not 0).

    Args:
        net: Maps (batch, F) to (batch, C).
        optimizer: See `FeedbackTraining`.
        scheduler: See `FeedbackTraining`.
        **options: Arguments of `FeedbackTraining`.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("features", "target", "index")

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(net, optimizer, scheduler, **options)
        self.save_hyperparameters(ignore=list(self.objects))
        for stage in ("val", "test"):
            for name in ("loss", "mse", "mae", "mape"):
                setattr(self, f"{stage}_{name}", SumRatio())

    @override
    def forward(self, features: Tensor) -> Tensor:
        """Standardised values, (batch, C)."""
        return self.net(features)

    @override
    def sample(self, batch: Batch) -> tuple[Tensor, Tensor]:
        target = batch["target"]
        if target.ndim != 2 or target.shape[1] != self.num_outputs:
            raise ValueError(
                f"targets of the shape {tuple(target.shape)}; model.num_outputs={self.num_outputs} wants (batch, "
                f"{self.num_outputs})"
            )
        return batch["features"], target

    def _in_units(self, values: Tensor) -> Tensor:
        data = getattr(self.trainer, "datamodule", None)
        return values if data is None or not hasattr(data, "in_units") else data.in_units(values)

    def _evaluation_step(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        x, target = self.sample(batch)
        raw = self(x)
        loss, n = self.objective.loss(raw, target), len(target)
        getattr(self, f"{stage}_loss").update(loss.double() * n, n)
        difference = (raw - target).double()
        getattr(self, f"{stage}_mse").update(difference.square().mean(1).sum(), n)
        getattr(self, f"{stage}_mae").update(difference.abs().mean(1).sum(), n)
        truth, guess = self._in_units(target.double()), self._in_units(raw.double())
        known = truth != 0
        getattr(self, f"{stage}_mape").update(100 * ((guess - truth) / truth)[known].abs().sum(), known.sum())
        return {"loss": loss, "prediction": raw, "target": target, "index": batch["index"]}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluation_step(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluation_step(batch, "test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"prediction": self._in_units(self(batch["features"])), "index": batch["index"]}

    def _begin(self, stage: Stage) -> None:
        for name in ("loss", "mse", "mae", "mape"):
            getattr(self, f"{stage}_{name}").reset()

    def _end(self, stage: Stage) -> None:
        names = ("loss", "mse", "mae", "mape")
        self._log_exact({f"{stage}/{n}": getattr(self, f"{stage}_{n}").compute() for n in names}, stage == "val")

    @override
    def on_validation_epoch_start(self) -> None:
        self._begin("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._begin("test")

    @override
    def on_validation_epoch_end(self) -> None:
        self._end("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._end("test")
