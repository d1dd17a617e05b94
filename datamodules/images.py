"""Labelled images for classification: one DataModule over several readers, augmentation and shifts on the device."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.image_choice import ImageChoice, cut_alike, grown
from datamodules.image_files import FilePart, ImageFiles
from datamodules.image_input import Augmentation, Normalization, channel_statistics, shifted
from datamodules.image_predictions import prediction_table
from datamodules.image_set import ImageBatches, ImageSet
from datamodules.image_shifts import NUM_SEVERITIES, SHIFTS
from datamodules.loading import make_loader, whole_batch
from datamodules.readers.stored_images import StoredImages

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Part = Literal["train", "val", "test"]
Reader = Literal["digits", "idx", "image_folder", "npz", "synthetic"]
Normalize = Literal["dataset", "legacy", "none"]
TestFrom = Literal["end", "random"]


class Images(LightningDataModule):
    """Images with one label each.

    A batch is a dictionary:

    ===================== ================== ====================================================================
    key                   shape              meaning
    ===================== ================== ====================================================================
    image                 (B, C, S, S)       float32: value in [0, 1], minus mean, over standard deviation. In training
                                             (samples B, C, S, S) where the module has several samples of its weights
                                             that see views of their own (``view_streams()``)
    label                 (B,) int64         class, 0 to ``num_classes`` - 1
    index                 (B,) int64         number of the image in its part
    ===================== ================== ====================================================================

    Loaders hand out uint8 values. Augmentation (training alone), shifts (test and prediction) and normalisation follow
    on the device, batch by batch. Random numbers depend on (seed, epoch, stream, index) alone, so that runs resume bit
    for bit and do not depend on the number of processes. Nothing is downloaded.

    A module with a method ``view_streams() -> list[int]`` tells the stream of random views of each of its samples; all
    others see stream 0.

    Parts: the test part is that of the files; where they have one part alone, ``test_size`` images of it. ``classes``,
    then ``max_train`` and ``max_test`` choose among them; of the training images ``val_fraction`` of every class are
    set aside for validation.

    Args:
        reader: ``digits`` (embedded), ``idx`` (the files of MNIST), ``image_folder`` (a folder or zip archive with one
            folder per class), ``npz`` (arrays x_train, y_train, x_test, y_test) or ``synthetic``.
        file: Below ``data_dir``. ``idx``: training images, training labels, test images, test labels, each plain or
            ``.gz``; ``image_folder`` and ``npz``: one path; null for the others.
        data_dir: Folder of the files.
        source: Where the data can be obtained; shown when they are missing.
        md5: Expected checksums, one per file (``idx``: of the uncompressed content); null: not checked.
        cache_dir: Where ``image_folder`` keeps decoded images; null: ``wattlight/images`` in the user's cache folder.
        train_folder: ``image_folder``: part below ``file`` that holds one folder per class.
        val_folder: ``image_folder``: the same of the validation part, with ``val_fraction=0``; it may be the test part.
            Null: validation takes ``val_fraction`` of the training images.
        test_folder: ``image_folder``: the same of the test part; null: there is none.
        stored_size: ``image_folder``: height and width that images are resized and cut to when they are decoded; null:
            they have one size already.
        test_size: Images of the test part where the files have one part alone; null: the files have a test part.
        test_from: Where those are taken from: the ``end`` of the file, or ``random`` places (``split_seed``).
        val_fraction: Part of the training images of every class that validation takes; 0: no validation.
        split_seed: Seed of what belongs to which part, of synthetic and of shifted images; ``seed`` is that of the
            training.
        classes: Classes to keep, by label, in the order of their new labels; null: all.
        max_train: Training images to keep (validation included), the first of every class; null: all.
        max_test: Test images to keep; null: all.
        image_size: Height and width of a batch. Stored images of a multiple of it are averaged over blocks. Null: as
            they are.
        num_channels: Channels of a batch: checked against the images; null: as they are.
        num_classes: Number of classes: checked against the images; null: as they are.
        to_rgb: Whether grey images are repeated to three channels.
        normalize: ``dataset``: by mean and standard deviation of the training values of each channel. ``legacy``: by
            the mean over the images of the standard deviation of an image, the smaller numbers that many programs
            write for CIFAR-10. ``none``: values in [0, 1].
        mean: Of each channel, in place of the one that ``normalize`` would compute.
        std: The same of the standard deviation.
        augment: Whether training sees random views.
        flip_probability: Of a horizontal flip.
        rotation_degrees: Largest angle of a rotation.
        padding: Black pixels added at every side, of which a square of ``image_size`` is cut out.
        crop_scale: Least and largest part of the area that is cut out and resized to ``image_size``, as usual for
            ImageNet ([0.08, 1.0]), in place of ``padding``; null: no such cuts.
        crop_ratio: Least and largest width over height of these cuts.
        cutout: Height and width of a square that is set to the mean; 0: none.
        noise: Standard deviation of Gaussian noise, on values in [0, 1]; 0: none.
        shift: Name of a shift of the test images (`datamodules.image_shifts`); null: none.
        severity: Its strength, 1 to 5.
        ood: Images that the network cannot know, of other classes or another source: a test evaluates their test part
            as a second loader, resized to the size of these images and with their statistics. Labels of that loader
            mean nothing here. Null: none.
        predict_part: Part that prediction goes through: ``train``, ``val`` or ``test``.
        batch_size: Images per training step over all devices.
        local_batch_size: Images per training step on each device, in place of ``batch_size``; null: that one.
        samples_per_device: Training images for each device that there is, chosen by class: the set grows with their
            number, and so does that of validation in training, in the same proportion; null: all.
        eval_batch_size: Images per evaluation step over all devices.
        drop_last: Drop the incomplete last batch of a training epoch.
        legacy_eval: Validate on random views and without the incomplete last batch, as some published code does: noisy,
            and pessimistic. Needs ``augment``.
        num_workers: Loader processes.
        pin_memory: Page-locked batches, for GPUs.
        seed: Seed of the order of the training images and of the random views.

    Raises:
        ValueError: Names the argument, or the file, and the remedy.
        FileNotFoundError: Names the file, the folder, and where the data can be obtained.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label", "index")
    input_files: ClassVar[tuple[str, ...]] = ("file",)  # runner/check.py looks for them

    def __init__(
        self,
        reader: Reader = "digits",
        file: str | Sequence[str] | None = None,
        data_dir: str = "data",
        source: str | None = None,
        md5: str | Sequence[str] | None = None,
        cache_dir: str | None = None,
        train_folder: str = "train",
        val_folder: str | None = None,
        test_folder: str | None = "test",
        stored_size: int | None = None,
        test_size: int | None = None,
        test_from: TestFrom = "end",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        classes: Sequence[int] | None = None,
        max_train: int | None = None,
        max_test: int | None = None,
        image_size: int | None = None,
        num_channels: int | None = None,
        num_classes: int | None = None,
        to_rgb: bool = False,
        normalize: Normalize = "dataset",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augment: bool = False,
        flip_probability: float = 0.5,
        rotation_degrees: float = 0.0,
        padding: int = 4,
        crop_scale: Sequence[float] | None = None,
        crop_ratio: Sequence[float] = (3 / 4, 4 / 3),
        cutout: int = 0,
        noise: float = 0.0,
        shift: str | None = None,
        severity: int = 3,
        ood: Images | None = None,
        predict_part: Part = "test",
        batch_size: int = 64,
        local_batch_size: int | None = None,
        samples_per_device: int | None = None,
        eval_batch_size: int = 256,
        drop_last: bool = True,
        legacy_eval: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        choices = {"reader": (reader, Reader), "predict_part": (predict_part, Part)}
        choices |= {"normalize": (normalize, Normalize), "test_from": (test_from, TestFrom)}
        for key, (value, kind) in choices.items():
            if value not in get_args(kind):
                raise ValueError(f"data.{key}={value!r} is unknown; use one of {', '.join(get_args(kind))}")
        self._files = ImageFiles(
            reader=reader,
            data_dir=Path(data_dir),
            files=[] if file is None else [file] if isinstance(file, str) else list(file),
            source=source,
            md5=None if md5 is None else [md5] if isinstance(md5, str) else list(md5),
            cache_dir=_default_cache() if cache_dir is None else Path(cache_dir).expanduser(),
            train_folder=train_folder,
            val_folder=val_folder,
            test_folder=test_folder,
            stored_size=stored_size,
            num_channels=1 if to_rgb else num_channels,
            num_classes=num_classes if classes is None else None,
        )
        self._choice = ImageChoice(
            name=self._files.name,
            classes=None if classes is None else list(classes),
            num_classes=num_classes,
            num_channels=num_channels,
            to_rgb=to_rgb,
            max_images={"train": max_train, "test": max_test},
            image_size=image_size,
            test_size=test_size,
            test_from=test_from,
            val_fraction=val_fraction,
            split_seed=split_seed,
        )
        self._augmentation = Augmentation(
            flip_probability=flip_probability,
            rotation_degrees=rotation_degrees,
            padding=padding,
            crop_scale=None if crop_scale is None else tuple(crop_scale),
            crop_ratio=tuple(crop_ratio),
            cutout=cutout,
            noise=noise,
            seed=seed,
        )
        self.augment, self.split_seed, self.to_rgb = augment, split_seed, to_rgb
        self.normalize, self._given = normalize, {"mean": mean, "std": std}
        self.shift, self.severity, self.ood = shift, severity, ood
        self.predict_part = predict_part
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.legacy_eval = legacy_eval
        self.local_batch_size, self.samples_per_device = local_batch_size, samples_per_device
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self._check_arguments()
        self._sets: dict[str, ImageSet] | None = None
        self._statistics: dict[str, list[float]] = {}

    def _check_arguments(self) -> None:
        """Refuse what the parts of this class have not looked at."""
        if self.shift is not None and self.shift not in SHIFTS:
            raise ValueError(f"data.shift={self.shift!r} is unknown; use one of {', '.join(SHIFTS)}, or null")
        if not 1 <= self.severity <= NUM_SEVERITIES:
            raise ValueError(f"data.severity={self.severity}: must be 1 to {NUM_SEVERITIES}")
        sizes = {key: getattr(self, key) for key in ("local_batch_size", "samples_per_device")}
        sizes |= {key: getattr(self, key) for key in ("batch_size", "eval_batch_size")}
        for key, value in sizes.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        if self.legacy_eval and not self.augment:
            raise ValueError("data.legacy_eval=true validates on random views: set data.augment=true, or leave it out")
        if self.num_workers < 0:
            raise ValueError(f"data.num_workers={self.num_workers}: must not be negative")
        if self.ood is not None and self.ood.ood is not None:
            raise ValueError("data.ood.ood: unknown images have no unknown images of their own; set it to null")
        if self._files.reader == "synthetic":
            needed = {f"max_{part}": number for part, number in self._choice.max_images.items()}
            needed |= {"num_classes": self._choice.num_classes, "num_channels": self._choice.num_channels}
            needed |= {"image_size": self._choice.image_size}
            if missing := [f"data.{key}" for key, value in needed.items() if value is None]:
                raise ValueError(f"data.reader=synthetic needs {', '.join(missing)}: how many images of what kind")

    # -------------------------------------------------------------------------------------------------------- parts

    @override
    def prepare_data(self) -> None:
        """Report missing files and decode image files, once for all processes of a machine."""
        self._files.require()
        if self._files.reader == "image_folder":
            self._open()
        if self.ood is not None:
            self.ood.prepare_data()

    @override
    def setup(self, stage: str | None = None) -> None:
        if self._sets is None:
            self._sets = self._open()
            if self.normalize != "none":
                self._statistics = self._statistics or self._compute_statistics()
            if self.ood is not None:
                self._open_unknown()

    def _open_unknown(self) -> None:
        self.ood.setup()
        here, there = self._shape[0], self.ood._shape[0]
        if here != there:
            raise ValueError(
                f"data.ood: {self.ood.name} has {there} channels, {self.name} has {here}: set "
                f"data.ood.num_channels={here}"
            )

    def _read(self, part: FilePart) -> StoredImages | None:
        """A part as it is stored; None: there is no such part."""
        if self._files.reader != "synthetic":
            return self._files.read(part)
        return None if part == "val" else self._choice.generated(part)

    def _open(self) -> dict[str, ImageSet]:
        """All parts."""
        self._files.require()
        train, val, test = (self._read(part) for part in ("train", "val", "test"))
        sets = self._choice.parts(train, test, val)
        self._peak, self._class_names = train.peak, self._choice.class_names(train.class_names)
        self._shape = self._choice.checked_shape(sets)
        log.info("%s: %s", self.name, ", ".join(f"{len(images.rows)} {part}" for part, images in sets.items()))
        return sets

    def _compute_statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each channel, those that are given and the others of the training images."""
        for key, value in self._given.items():
            if value is not None and len(value) != self._shape[0]:
                raise ValueError(f"data.{key}={list(value)}: {self.name} has {self._shape[0]} channels, one value each")
        given = {key: list(value) for key, value in self._given.items() if value is not None}
        if len(given) == 2:
            return given
        return channel_statistics(self._set("train"), self._peak, self.normalize == "legacy", self.name) | given

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._statistics)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Normalise as the run did that wrote the checkpoint, whatever the training part at hand is."""
        if self.normalize != "none":
            given = {key: list(value) for key, value in self._given.items() if value is not None}
            self._statistics = state_dict | given

    # ------------------------------------------------------------------------------------------------------ loaders

    def _set(self, part: Part) -> ImageSet:
        if self._sets is None:
            raise RuntimeError("call setup() first")
        return self._sets[part]

    def _loader(self, part: Part | ImageSet, batch_size: int, **options: Any) -> DataLoader:
        return make_loader(
            ImageBatches(part if isinstance(part, ImageSet) else self._set(part)),
            batch_size,
            seed=self.seed,
            layout=None if self.trainer is None else self.trainer.distributed_sampler_kwargs,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            collate_fn=whole_batch,
            **options,
        )

    @override
    def train_dataloader(self) -> DataLoader:
        size = self.batch_size if self.local_batch_size is None else self.local_batch_size * self._devices
        return self._loader(self._grown(), size, shuffle=True, drop_last=self.drop_last)

    @property
    def _devices(self) -> int:
        """How many share the images."""
        layout = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        return layout["num_replicas"] if layout else 1

    def _grown(self) -> ImageSet:
        """The training images of the devices that there are (``samples_per_device``)."""
        images = self._set("train")
        if self.samples_per_device is None:
            return images
        return grown(images, self.samples_per_device, self._devices, self.split_seed, self.name)

    @override
    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Give the validation images, as many in training as the training images there call for; none without any."""
        images = self._set("val")
        if self.samples_per_device is not None and self.trainer is not None and self.trainer.state.fn == "fit":
            images = cut_alike(images, len(self._grown().rows) / len(self._set("train").rows), self.split_seed)
        if self.legacy_eval and (whole := len(images.rows) // self.eval_batch_size * self.eval_batch_size):
            images = images.take(np.arange(whole))
        return self._loader(images, self.eval_batch_size) if len(images.rows) else []

    def train_eval_dataloader(self) -> DataLoader:
        """Give the training images in order, for `callbacks.training_evaluation`."""
        return self._loader(self._grown(), self.eval_batch_size)

    @override
    def test_dataloader(self) -> DataLoader | list[DataLoader]:
        """Give the test images; with ``ood`` a list of theirs and those of the unknown images."""
        known = self._loader("test", self.eval_batch_size)
        return known if self.ood is None else [known, self._loader(self.ood.images("test"), self.eval_batch_size)]

    @override
    def predict_dataloader(self) -> DataLoader:
        """Give the images of ``predict_part``, without augmentation."""
        return self._loader(self.predict_part, self.eval_batch_size)

    # ---------------------------------------------------------------------------------------------------- on device

    @override
    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        trainer = self.trainer
        if trainer is None:
            return self.normalized(batch)
        batch = self.unknown(batch) if trainer.testing and dataloader_idx else self._prepared(batch)
        # Lightning casts what loaders give, and these are bytes.
        return batch | {"image": batch["image"].to(trainer.lightning_module.dtype)}

    def _prepared(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The input of the running stage."""
        trainer = self.trainer
        if self.augment and (trainer.training or (trainer.validating and self.legacy_eval)):
            streams = getattr(trainer.lightning_module, "view_streams", None)
            return self.augmented(batch, trainer.current_epoch, [0] if streams is None else streams())
        if trainer.testing or (trainer.predicting and self.predict_part == "test"):
            return self.shifted(batch)
        return self.normalized(batch)

    @property
    def _normalize(self) -> Normalization:
        """With the statistics of this moment: those of a checkpoint replace those of the files."""
        mean, std = (None, None) if self.normalize == "none" else (self.mean, self.std)
        return Normalization(self._peak, mean, std, self.to_rgb)

    def normalized(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn stored values into the input of a network."""
        normalize = self._normalize
        return batch | {"image": normalize(normalize.unit(batch["image"]))}

    def shifted(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with the shift of the test images, if there is one."""
        normalize = self._normalize
        image = normalize.unit(batch["image"])
        if self.shift is not None:
            image = shifted(image, batch["index"], self.shift, self.severity, self.split_seed)
        return batch | {"image": normalize(image)}

    def unknown(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn images of ``ood`` into what a network takes for images of this data set."""
        image = self.ood._normalize.unit(batch["image"])
        if image.shape[-1] != self._shape[-1]:
            image = F.interpolate(image, self._shape[1:], mode="bilinear", align_corners=False, antialias=True)
        return batch | {"image": self._normalize(image)}

    def augmented(self, batch: dict[str, Tensor], epoch: int, streams: Sequence[int] = (0,)) -> dict[str, Tensor]:
        """Turn stored values into random views of an epoch, normalised.

        Args:
            batch: As stored.
            epoch: Number of the epoch.
            streams: Stream of the views of every sample of the weights. If all are equal there is one view of an image
                for all of them, else the views lie one sample after the other, (samples x batch, channel, S, S).
        """
        normalize = self._normalize
        image, view = normalize.unit(batch["image"]), self._augmentation.view
        views = {stream: view(image, batch["index"], normalize, epoch, stream) for stream in sorted(set(streams))}
        images = list(views.values()) if len(views) == 1 else [views[stream] for stream in streams]
        return batch | {"image": images[0] if len(images) == 1 else torch.cat(images)}

    # ------------------------------------------------------------------------------------------- what modules know

    @property
    def name(self) -> str:
        """What error messages call the source."""
        return self._files.name

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def num_channels(self) -> int:
        """Channels of a batch."""
        return 3 if self.to_rgb else self._shape[0]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channel, height, width of a batch."""
        return self.num_channels, *self._shape[1:]

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of their labels."""
        return self._class_names

    @property
    def channel_names(self) -> list[str]:
        """Names of the channels of an image."""
        return {1: ["grey"], 3: ["red", "green", "blue"]}.get(
            self.num_channels, [f"{i}" for i in range(self.num_channels)]
        )

    @property
    def mean(self) -> list[float]:
        """Of each stored channel, in [0, 1]: what is subtracted."""
        return self._statistics["mean"]

    @property
    def std(self) -> list[float]:
        """Of each stored channel: what is divided by."""
        return self._statistics["std"]

    def images(self, part: Part) -> ImageSet:
        """The images of a part."""
        return self._set(part)

    def prediction_table(self, outputs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """Tabulate predict outputs, one row per image; see `datamodules.image_predictions.prediction_table`."""
        return prediction_table(outputs, self._set(self.predict_part).names, self.class_names)


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "wattlight" / "images"
