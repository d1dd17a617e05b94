"""Classifier: trains and evaluates any network that maps an image to the logits of its classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from lightning_modules.metrics.classification import ClassificationScores, Separation
from lightning_modules.metrics.forecast import SumRatio
from lightning_modules.supervised import Supervised

Batch = dict[str, Tensor]
Stage = Literal["val", "test"]

_SHOWN = ("loss", "accuracy")


class LabelledImages(Supervised):
    """The steps of modules that give an image one of several classes, by cross-entropy.

    Subclasses give their metrics of evaluation in ``update_scores`` and ``scores``, and name them in ``score_names``:
    attributes ``<stage>_<name>`` that are reset before an evaluation, beside ``<stage>_loss``.

    Where the data have a second test loader, of images that the network cannot know (``data.ood``), a test logs
    ``test/ood_auroc_<name>`` for every measure of ``uncertainties``: how well it tells the two apart.
    """

    score_names: ClassVar[tuple[str, ...]]
    uncertainty_names: ClassVar[tuple[str, ...]] = ("entropy",)
    _separation: dict[str, Separation] | None = None  # during a test with unknown images

    def logits(self, image: Tensor) -> Tensor:
        """What the network gives for images, in float32 where the network computes in less."""
        logits = self(image)
        return logits if logits.dtype == torch.float64 else logits.float()

    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(logits, label)

    def _probability(self, logits: Tensor) -> Tensor:
        """What is delivered of the probabilities, (batch, class) or less."""
        return logits.softmax(1)

    def uncertainties(self, logits: Tensor) -> dict[str, Tensor]:
        """Measures of not knowing by ``uncertainty_names``, each (batch,): the entropy of the prediction, in nats."""
        log_probability = logits.double().log_softmax(1)
        return {"entropy": -(log_probability.exp() * log_probability).sum(1)}

    def _separate(self, logits: Tensor, unknown: bool) -> None:
        for name, value in self.uncertainties(logits).items():
            self._separation[name].update(value, unknown)

    def update_scores(self, stage: Stage, logits: Tensor, label: Tensor) -> None:
        """Add a batch to the metrics of a stage: logits (batch, class), labels (batch,)."""
        raise NotImplementedError

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        label = batch["label"]
        logits = self.logits(batch["image"])
        loss = self._loss(logits, label)
        self._add_to_epoch("loss", loss.detach().double() * len(label), len(label))
        self._add_to_epoch("accuracy", (logits.detach().argmax(1) == label).sum(), len(label))
        return {"loss": loss}

    def _outputs(self, batch: Batch, logits: Tensor) -> dict[str, Tensor]:
        """What callbacks may read of a step."""
        out = {"prediction": logits.argmax(1), "probability": self._probability(logits), "index": batch["index"]}
        return out | ({"target": batch["label"]} if "label" in batch else {})

    def _evaluation_step(self, batch: Batch, stage: Stage) -> dict[str, Tensor]:
        label = batch["label"]
        logits = self.logits(batch["image"])
        loss = self._loss(logits, label)
        getattr(self, f"{stage}_loss").update(loss.double() * len(label), len(label))
        self.update_scores(stage, logits, label)
        if stage == "test" and self._separation is not None:
            self._separate(logits, unknown=False)
        return {"loss": loss} | self._outputs(batch, logits)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._evaluation_step(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        if dataloader_idx == 0:
            return self._evaluation_step(batch, "test")
        logits = self.logits(batch["image"])
        self._separate(logits, unknown=True)
        return {name: value for name, value in self._outputs(batch, logits).items() if name != "target"}

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        return self._outputs(batch, self.logits(batch["image"]))

    def _reset(self, stage: Stage) -> None:
        for name in ("loss", *self.score_names):
            getattr(self, f"{stage}_{name}").reset()

    @override
    def on_validation_epoch_start(self) -> None:
        self._reset("val")

    @override
    def on_test_epoch_start(self) -> None:
        self._reset("test")
        unknown = getattr(getattr(self.trainer, "datamodule", None), "ood", None) is not None
        # On all ranks, also where one sees no image.
        self._separation = {n: Separation().to(self.device) for n in self.uncertainty_names} if unknown else None

    def scores(self, stage: Stage) -> dict[str, Tensor]:
        """Values of a stage by name, ``loss`` and ``accuracy`` among them."""
        raise NotImplementedError

    def _log_scores(self, stage: Stage) -> None:
        values = self.scores(stage)
        self._log_exact({f"{stage}/{name}": values.pop(name) for name in _SHOWN}, prog_bar=stage == "val")
        self._log_exact({f"{stage}/{name}": value for name, value in values.items()})

    @override
    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    @override
    def on_test_epoch_end(self) -> None:
        self._log_scores("test")
        found, self._separation = self._separation or {}, None
        self._log_exact({f"test/ood_auroc_{name}": metric.compute() for name, metric in found.items()})


class Classifier(LabelledImages):
    """One class per image, by cross-entropy.

    Batches are those of `datamodules.images.Images`. Steps of validation and test return ``loss``, ``prediction``
    (batch,) int64, ``target`` (batch,) int64, ``probability`` (batch, class) and ``index`` (batch,); predict returns
    the same without ``loss``, and without ``target`` where the label is not known.

    Logged: ``train/`` ``loss`` and ``accuracy`` of the batches as they were trained on; ``val/`` and ``test/``
    ``loss`` and the values of `metrics.classification.ClassificationScores`. All are exact for any number of ranks and
    any batch size. The loss has the label smoothing of the training in it, ``nll`` has not.

    Args:
        net: Maps (batch, channel, height, width) to logits (batch, class).
        optimizer: Partial that takes the parameters, e.g. ``functools.partial(torch.optim.SGD, lr=0.1)``. None: the
            module can only be evaluated.
        scheduler: Partial that takes the optimizer. None: constant learning rate.
        num_classes: Number of classes.
        label_smoothing: Part of the target that is spread over all classes.
        top_k: k of the top-k accuracy; None: not reported.
        num_bins: Bins of the expected calibration error.
        channels_last: Whether convolutions run with channels last in memory, which is faster on GPUs with tensor
            cores.
        scheduler_monitor: Metric given to schedulers that watch one (ReduceLROnPlateau).
        scheduler_interval: When the scheduler steps, after each ``epoch`` or each ``step``.

    Raises:
        ValueError: Names the argument and the remedy, also where network and data do not fit.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label", "index")
    score_names: ClassVar[tuple[str, ...]] = ("scores",)

    def __init__(
        self,
        net: nn.Module,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., Any] | None = None,
        num_classes: int = 10,
        label_smoothing: float = 0.0,
        top_k: int | None = 5,
        num_bins: int = 15,
        channels_last: bool = False,
        scheduler_monitor: str = "val/loss",
        scheduler_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        if num_classes < 2:
            raise ValueError(f"model.num_classes={num_classes}: a classifier needs at least 2")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"model.label_smoothing={label_smoothing}: must be at least 0 and below 1")
        if top_k is not None and not 1 <= top_k <= num_classes:
            raise ValueError(f"model.top_k={top_k}: must be 1 to {num_classes} (model.num_classes), or null")
        if num_bins < 1:
            raise ValueError(f"model.num_bins={num_bins}: must be at least 1")
        net = net.to(memory_format=torch.channels_last) if channels_last else net
        super().__init__(net, optimizer, scheduler, scheduler_monitor, scheduler_interval)
        self.save_hyperparameters(ignore=list(self.objects))
        self.num_classes, self.label_smoothing, self.channels_last = num_classes, label_smoothing, channels_last
        for stage in ("val", "test"):
            setattr(self, f"{stage}_loss", SumRatio())
            setattr(self, f"{stage}_scores", ClassificationScores(num_classes, top_k, num_bins))

    @override
    def forward(self, image: Tensor) -> Tensor:
        """Logits, (batch, class)."""
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        return self.net(image)

    @override
    def setup(self, stage: str) -> None:
        """Compare network and data before the first batch: an error inside a convolution says less."""
        data = getattr(self.trainer, "datamodule", None)
        classes, channels = (getattr(data, name, None) for name in ("num_classes", "num_channels"))
        if classes not in (None, self.num_classes):
            raise ValueError(f"model.num_classes={self.num_classes}, but the data have {classes} classes")
        if getattr(self.net, "num_classes", self.num_classes) != self.num_classes:
            raise ValueError(f"model.net.num_classes={self.net.num_classes}, but model.num_classes={self.num_classes}")
        expected = getattr(self.net, "num_channels", channels)
        if channels not in (None, expected):
            remedy = "set data.to_rgb=true data.num_channels=3 or " if (channels, expected) == (1, 3) else "set "
            raise ValueError(
                f"the model expects {expected} channels, the data have {channels}: {remedy}"
                f"model.net.num_channels={channels}"
            )

    @override
    def _loss(self, logits: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(logits, label, label_smoothing=self.label_smoothing)

    @override
    def update_scores(self, stage: Stage, logits: Tensor, label: Tensor) -> None:
        getattr(self, f"{stage}_scores").update(logits, label)

    @override
    def scores(self, stage: Stage) -> dict[str, Tensor]:
        return {"loss": getattr(self, f"{stage}_loss").compute()} | getattr(self, f"{stage}_scores").compute()
