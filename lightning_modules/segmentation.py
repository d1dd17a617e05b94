"""Segmenter: trains and evaluates any network that maps an image to the logits of a class for every pixel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_modules.metrics.forecast import SumRatio
from lightning_modules.metrics.segmentation import PixelScores
from lightning_modules.supervised import Supervised

Batch = dict[str, Tensor]
Stage = Literal["val", "test"]


class Segmenter(Supervised):
    """One class per pixel, by cross-entropy.

    Batches have ``image`` (batch, channel, height, width), ``label`` (batch, height, width) int64 and ``index``
    (batch,). Steps of validation and test return ``loss``, ``prediction`` and ``target``, both of the shape of
    ``label``, and ``index``; predict returns ``prediction`` and ``index``.

    Logged: ``train/`` ``loss`` and ``pixel_accuracy`` of the batches as they were trained on; ``val/`` and ``test/``
    ``loss``, ``miou``, ``pixel_accuracy`` and ``iou/<class>`` (`metrics.segmentation.PixelScores`). All are exact for
    any number of ranks and any batch size.

    Args:
        net: Maps images to logits (batch, class, height, width).
        optimizer: Partial that takes the parameters. None: the module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        num_classes: Number of classes.
        ignore_index: Label of pixels that count for nothing (void); None: all count.
        scheduler_monitor: Metric given to schedulers that watch one.
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.

    Raises:
        ValueError: Names the argument and the remedy, also where network and data do not fit.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label", "index")

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        num_classes: int = 4,
        ignore_index: int | None = None,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"model.num_classes={num_classes}: pixels need at least 2 classes")
        if ignore_index is not None and 0 <= ignore_index < num_classes:
            raise ValueError(
                f"model.ignore_index={ignore_index} is one of the {num_classes} classes (model.num_classes): give the "
                "label of void pixels, such as 255, or null"
            )
        super().__init__(net, optimizer, scheduler, scheduler_monitor, scheduler_interval)
        self.save_hyperparameters(ignore=list(self.objects))
        self.num_classes, self.ignore_index = num_classes, ignore_index
        for stage in ("val", "test"):
            setattr(self, f"{stage}_loss", SumRatio())
            setattr(self, f"{stage}_scores", PixelScores(num_classes, ignore_index))

    @override
    def setup(self, stage: str) -> None:
        """Compare network and data before the first batch."""
        data = getattr(self.trainer, "datamodule", None)
        for name in ("num_classes", "num_channels"):
            given, expected = getattr(data, name, None), getattr(self.net, name, None)
            if given is not None and expected is not None and given != expected:
                option = "model.num_classes" if name == "num_classes" else f"model.net.{name}"
                raise ValueError(f"{option}={expected}, but the data have {given}: set {option}={given}")
        size, multiple = getattr(data, "image_size", None), getattr(self.net, "multiple_of", 1)
        if size is not None and size % multiple:
            below = size - size % multiple
            raise ValueError(
                f"data.image_size={size}: the network takes multiples of {multiple}, "
                f"such as {below} or {below + multiple}"
            )
        if getattr(self.net, "num_classes", self.num_classes) != self.num_classes:
            raise ValueError(f"model.net.num_classes={self.net.num_classes}, but model.num_classes={self.num_classes}")

    @override
    def forward(self, image: Tensor) -> Tensor:
        """Logits, (batch, class, height, width)."""
        return self.net(image)

    def _logits_and_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, the mean loss of the pixels that count, and their number."""
        logits, label = self(batch["image"]), batch["label"]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        ignored = -100 if self.ignore_index is None else self.ignore_index
        total = F.cross_entropy(logits, label, ignore_index=ignored, reduction="sum")
        number = (label != ignored).sum()
        return logits, total / number.clamp_min(1), number

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        logits, loss, number = self._logits_and_loss(batch)
        self._add_to_epoch("loss", loss.detach().double() * number, number)
        self._add_to_epoch("pixel_accuracy", (logits.detach().argmax(1) == batch["label"]).sum(), number)
        return {"loss": loss}

    def _evaluation_step(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        logits, loss, number = self._logits_and_loss(batch)
        prediction = logits.argmax(1)
        getattr(self, f"{stage}_loss").update(loss.double() * number, number)
        getattr(self, f"{stage}_scores").update(prediction, batch["label"])
        return {"loss": loss, "prediction": prediction, "target": batch["label"], "index": batch["index"]}

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluation_step(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluation_step(batch, "test")

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return {"prediction": self(batch["image"]).argmax(1), "index": batch["index"]}

    def _begin(self, stage: Stage) -> None:
        for name in ("loss", "scores"):
            getattr(self, f"{stage}_{name}").reset()

    def _end(self, stage: Stage) -> None:
        values = getattr(self, f"{stage}_scores").compute()
        iou = values.pop("iou")
        names = getattr(getattr(self.trainer, "datamodule", None), "class_names", range(self.num_classes))
        values = {"loss": getattr(self, f"{stage}_loss").compute()} | values
        self._log_exact({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=stage == "val")
        self._log_exact({f"{stage}/iou/{name}": value for name, value in zip(names, iou, strict=True)})

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
