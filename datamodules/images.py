"""Labelled images for classification: one DataModule over several readers, augmentation and shifts on the device."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.image_set import (
    ImageBatches,
    ImageSet,
    block_means,
    moments,
    stratified,
    stratified_subset,
    whole_batch,
)
from datamodules.image_shifts import NUM_SEVERITIES, SHIFTS, gaussian_noise, num_draws, shift_images
from datamodules.loading import make_loader
from datamodules.random_views import (
    NUM_DRAWS,
    SIZE_DRAWS,
    cut_out,
    random_views,
    resized_views,
    uniform_per_sample,
)
from datamodules.readers.digits import read_digits
from datamodules.readers.idx import read_idx_pair
from datamodules.readers.image_folder import read_image_folder
from datamodules.readers.image_npz import read_image_npz
from datamodules.readers.stored_images import StoredImages, first_of_each_class, require_md5
from datamodules.synthetic_images import synthetic_images

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Part = Literal["train", "val", "test"]
Reader = Literal["digits", "idx", "image_folder", "npz", "synthetic"]

_NUM_FILES: dict[str, int] = {"digits": 0, "idx": 4, "image_folder": 1, "npz": 1, "synthetic": 0}
# Draws of the shifted test images: an epoch that no training reaches.
_SHIFT_EPOCH = 2**31


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
        samples_per_device: Training images for each device that there is, chosen by class (validation not included):
            the set grows with the number of devices; null: all.
        eval_batch_size: Images per evaluation step over all devices.
        drop_last: Drop the incomplete last batch of a training epoch.
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
        test_folder: str | None = "test",
        stored_size: int | None = None,
        test_size: int | None = None,
        test_from: Literal["end", "random"] = "end",
        val_fraction: float = 0.1,
        split_seed: int = 0,
        classes: Sequence[int] | None = None,
        max_train: int | None = None,
        max_test: int | None = None,
        image_size: int | None = None,
        num_channels: int | None = None,
        num_classes: int | None = None,
        to_rgb: bool = False,
        normalize: Literal["dataset", "legacy", "none"] = "dataset",
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
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.reader, self.source, self.data_dir = reader, source, Path(data_dir)
        self.files = [] if file is None else [file] if isinstance(file, str) else list(file)
        self.md5 = None if md5 is None else [md5] if isinstance(md5, str) else list(md5)
        self.cache_dir = _default_cache() if cache_dir is None else Path(cache_dir).expanduser()
        self.train_folder, self.test_folder, self.stored_size = train_folder, test_folder, stored_size
        self.test_size, self.test_from = test_size, test_from
        self.val_fraction, self.split_seed = val_fraction, split_seed
        self.classes = None if classes is None else list(classes)
        self.max_images = {"train": max_train, "test": max_test}
        self.image_size, self.to_rgb = image_size, to_rgb
        self._wanted_channels, self._wanted_classes = num_channels, num_classes
        self.normalize, self._given = normalize, {"mean": mean, "std": std}
        self.augment, self.flip_probability, self.rotation_degrees = augment, flip_probability, rotation_degrees
        self.padding, self.cutout, self.noise = padding, cutout, noise
        self.crop_scale = None if crop_scale is None else tuple(crop_scale)
        self.crop_ratio = tuple(crop_ratio)
        self.shift, self.severity, self.ood = shift, severity, ood
        self.predict_part = predict_part
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.local_batch_size, self.samples_per_device = local_batch_size, samples_per_device
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self._check_arguments()
        self._sets: dict[str, ImageSet] | None = None
        self._statistics: dict[str, list[float]] = {}

    def _check_arguments(self) -> None:
        choices = {"reader": Reader, "predict_part": Part}
        known = {key: get_args(kind) for key, kind in choices.items()}
        known |= {"normalize": ("dataset", "legacy", "none"), "test_from": ("end", "random")}
        for key, values in known.items():
            if getattr(self, key) not in values:
                raise ValueError(f"data.{key}={getattr(self, key)!r} is unknown; use one of {', '.join(values)}")
        if self.shift is not None and self.shift not in SHIFTS:
            raise ValueError(f"data.shift={self.shift!r} is unknown; use one of {', '.join(SHIFTS)}, or null")
        if not 1 <= self.severity <= NUM_SEVERITIES:
            raise ValueError(f"data.severity={self.severity}: must be 1 to {NUM_SEVERITIES}")
        values = {"max_train": self.max_images["train"], "max_test": self.max_images["test"]}
        values |= {"num_channels": self._wanted_channels, "num_classes": self._wanted_classes}
        values |= {key: getattr(self, key) for key in ("stored_size", "test_size", "image_size")}
        values |= {key: getattr(self, key) for key in ("local_batch_size", "samples_per_device")}
        for key, value in {**values, "batch_size": self.batch_size, "eval_batch_size": self.eval_batch_size}.items():
            if value is not None and value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        for key in ("padding", "cutout", "noise", "num_workers", "rotation_degrees"):
            if getattr(self, key) < 0:
                raise ValueError(f"data.{key}={getattr(self, key)}: must not be negative")
        self._check_crops()
        if self.ood is not None and self.ood.ood is not None:
            raise ValueError("data.ood.ood: unknown images have no unknown images of their own; set it to null")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"data.flip_probability={self.flip_probability}: must be between 0 and 1")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"data.val_fraction={self.val_fraction}: must be at least 0 and below 1")
        if len(self.files) != (wanted := _NUM_FILES[self.reader]):
            raise ValueError(f"data.file={self.files or None}: data.reader={self.reader} needs {wanted} file(s)")
        if self.md5 is not None and len(self.md5) != wanted:
            raise ValueError(f"data.md5 has {len(self.md5)} checksums for {wanted} file(s); give one for each, or null")
        if self.classes is not None and (len(set(self.classes)) < len(self.classes) or not self.classes):
            raise ValueError(f"data.classes={self.classes}: name every class once, at least one")
        if self.to_rgb and self._wanted_channels not in (None, 3):
            raise ValueError(f"data.num_channels={self._wanted_channels}: data.to_rgb=true gives 3; set it to 3")
        if self.reader == "synthetic":
            keys = ("max_train", "max_test", "num_classes", "num_channels", "image_size")
            needed = values | {"image_size": self.image_size}
            if missing := [f"data.{key}" for key in keys if needed[key] is None]:
                raise ValueError(f"data.reader=synthetic needs {', '.join(missing)}: how many images of what kind")

    def _check_crops(self) -> None:
        for key, most in (("crop_scale", 1.0), ("crop_ratio", float("inf"))):
            values = getattr(self, key)
            if values is not None and not (len(values) == 2 and 0 < values[0] <= values[1] <= most):
                limit = " and at most 1: parts of the area" if key == "crop_scale" else ": width over height"
                raise ValueError(f"data.{key}={list(values)}: give the least and the largest, both positive{limit}")
        if self.crop_scale is not None and self.padding:
            raise ValueError(
                f"data.padding={self.padding} and data.crop_scale={list(self.crop_scale)} are two ways to cut: set "
                "data.padding=0, or data.crop_scale=null"
            )

    # -------------------------------------------------------------------------------------------------------- parts

    @override
    def prepare_data(self) -> None:
        """Report missing files and decode image files, once for all processes of a machine."""
        self._missing_files()
        if self.reader == "image_folder":
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

    def _path(self, file: str) -> Path:
        """The file, compressed or not, whichever there is."""
        path = self.data_dir / file
        other = path.with_suffix("") if path.suffix == ".gz" else path.with_name(f"{path.name}.gz")
        return other if self.reader == "idx" and not path.exists() and other.is_file() else path

    def _missing_files(self) -> None:
        for file in self.files:
            if not self._path(file).exists():
                obtain = f" It can be obtained from: {self.source}" if self.source else ""
                raise FileNotFoundError(
                    f"no file {self.data_dir / file} (data.data_dir={self.data_dir}, data.file={file}): set "
                    f"data.data_dir to the folder that holds it.{obtain}"
                )

    def _read(self, part: Literal["train", "test"]) -> StoredImages | None:
        """A part as the files have it; None: they have no test part."""
        paths = [self._path(file) for file in self.files]
        if self.reader == "digits":
            return read_digits() if part == "train" else None
        num_classes = None if self.classes is not None else self._wanted_classes
        if self.reader == "synthetic":
            return synthetic_images(
                self.max_images[part],
                num_classes=self._wanted_classes if self.classes is None else max(self.classes) + 1,
                num_channels=1 if self.to_rgb else self._wanted_channels,
                size=self.image_size,
                part=part,
                seed=self.split_seed,
            )
        if self.reader == "idx":
            pair = slice(0, 2) if part == "train" else slice(2, 4)
            md5 = None if self.md5 is None else tuple(self.md5[pair])
            return read_idx_pair(*paths[pair], part=part, num_classes=num_classes, md5=md5)
        if self.reader == "npz":
            return read_image_npz(paths[0], part, num_classes=num_classes, md5=self.md5 and self.md5[0])
        return self._read_folder(paths[0], part)

    def _read_folder(self, root: Path, part: Literal["train", "test"]) -> StoredImages | None:
        if self.md5 is not None and part == "train":
            if root.is_dir():
                raise ValueError(f"data.md5: {root} is a folder, which has no checksum; set data.md5=null")
            require_md5(root, None, self.md5[0])
        folder = self.train_folder if part == "train" else self.test_folder
        if folder is None:
            return None
        read = partial(
            read_image_folder,
            root,
            cache_dir=self.cache_dir,
            num_channels=1 if self.to_rgb else self._wanted_channels,
            stored_size=self.stored_size,
        )
        train = read(self.train_folder)
        return train if part == "train" else read(folder, class_names=train.class_names)

    def _open(self) -> dict[str, ImageSet]:
        """All parts."""
        self._missing_files()
        train, test = self._read("train"), self._read("test")
        if (test is None) != (self.test_size is not None):
            raise ValueError(
                f"{self.name}: there is no test part; set data.test_size to the number of images it shall have"
                if test is None
                else f"data.test_size={self.test_size}: {self.name} has a test part; set data.test_size=null"
            )
        self._check_classes(train.class_names)
        rows = self._rows_of_classes(train.labels)
        if test is None:
            if len(rows) <= self.test_size:
                raise ValueError(
                    f"data.test_size={self.test_size}: {self.name} has {len(rows)} images; leave some to train on"
                )
            if self.test_from == "random":
                order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.split_seed))
                rows = rows[order.numpy()]
            rows, test_rows = rows[: -self.test_size], rows[-self.test_size :]
            test = train
        else:
            test_rows = self._rows_of_classes(test.labels)
        sets = {"test": self._load(test, self._limited(test, test_rows, "test"))}
        chosen = self._load(train, self._limited(train, rows, "train"))
        in_val = stratified(chosen.labels, self.val_fraction, self.split_seed)
        if self.val_fraction and not in_val.any():
            raise ValueError(f"data.val_fraction={self.val_fraction} leaves no image for validation; increase it")
        for part, mask in (("train", ~in_val), ("val", in_val)):
            places = np.flatnonzero(mask)
            names = [chosen.names[i] for i in places]
            sets[part] = ImageSet(chosen.pixels, chosen.rows[places], chosen.labels[places], names)
        if not len(sets["train"].rows) or not len(sets["test"].rows):
            raise ValueError(f"{self.name}: nothing is left to train on or to test; see data.classes and data.max_test")
        self._peak, self._class_names = train.peak, train.class_names
        if self.classes is not None:
            self._class_names = [train.class_names[c] for c in self.classes]
        self._check_shape(sets["train"].pixels.shape[1:], sets["test"].pixels.shape[1:])
        log.info("%s: %s", self.name, ", ".join(f"{len(images.rows)} {part}" for part, images in sets.items()))
        return sets

    def _check_classes(self, names: list[str]) -> None:
        if self.classes is not None and (unknown := [c for c in self.classes if not 0 <= c < len(names)]):
            raise ValueError(f"data.classes: {self.name} has no class {unknown[0]}; it has 0 to {len(names) - 1}")
        number = len(names if self.classes is None else self.classes)
        if self._wanted_classes not in (None, number):
            chosen = f"{', '.join(names[:10])}{', ...' if len(names) > 10 else ''}"
            raise ValueError(
                f"data.num_classes={self._wanted_classes}, but {self.name} has {number} classes"
                + (f" ({chosen})" if self.classes is None else f" (data.classes={self.classes})")
                + f": set data.num_classes={number}"
            )

    def _rows_of_classes(self, labels: np.ndarray) -> np.ndarray:
        if self.classes is None:
            return np.arange(len(labels))
        return np.flatnonzero(np.isin(labels, self.classes))

    def _limited(self, stored: StoredImages, rows: np.ndarray, part: Literal["train", "test"]) -> np.ndarray:
        number = self.max_images[part]
        if number is None:
            return rows
        if number > len(rows):
            raise ValueError(
                f"data.max_{part}={number} is larger than the {part} part of {self.name} ({len(rows)} images); use at "
                f"most {len(rows)}, or null for all"
            )
        return rows[first_of_each_class(stored.labels[rows], number)]

    def _load(self, stored: StoredImages, rows: np.ndarray) -> ImageSet:
        """Pixels of the chosen images at ``image_size``, with the labels they have here."""
        labels = stored.labels[rows]
        if self.classes is not None:
            new = np.full(len(stored.class_names), -1, dtype=np.int64)
            new[self.classes] = np.arange(len(self.classes))
            labels = new[labels]
        pixels = stored.load(rows)
        if self.image_size is not None and pixels.shape[1] != self.image_size:
            pixels = self._averaged(pixels)
        return ImageSet(pixels, np.arange(len(rows)), labels, [stored.names[i] for i in rows])

    def _averaged(self, pixels: np.ndarray) -> np.ndarray:
        """Means over blocks, so that ``image_size`` is left."""
        size, stored = self.image_size, pixels.shape[1]
        if stored % size:
            fitting = [str(n) for n in range(1, stored + 1) if stored % n == 0]
            raise ValueError(
                f"data.image_size={size} does not divide the {stored} pixels of {self.name}; use one of "
                f"{', '.join(fitting)}, or null"
            )
        return block_means(pixels, size)

    def _check_shape(self, shape: tuple[int, ...], test_shape: tuple[int, ...]) -> None:
        if shape != test_shape:
            raise ValueError(f"{self.name}: training images have the shape {shape}, test images {test_shape}")
        self._shape = (shape[2], *shape[:2])
        if self.to_rgb and shape[2] != 1:
            raise ValueError(f"data.to_rgb=true: {self.name} has {shape[2]} channels already; set data.to_rgb=false")
        if self._wanted_channels not in (None, self.num_channels):
            remedy = "set data.to_rgb=true, or " if (shape[2], self._wanted_channels) == (1, 3) else ""
            raise ValueError(
                f"the model expects {self._wanted_channels} channels (data.num_channels), {self.name} has {shape[2]}: "
                f"{remedy}set data.num_channels={self.num_channels}"
            )

    def _compute_statistics(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each channel over the training images, in units of the white value."""
        for key, value in self._given.items():
            if value is not None and len(value) != self._shape[0]:
                raise ValueError(f"data.{key}={list(value)}: {self.name} has {self._shape[0]} channels, one value each")
        if self._given["mean"] is not None and self._given["std"] is not None:
            return {key: list(value) for key, value in self._given.items()}
        first, second = moments(self._set("train"))
        if self.normalize == "legacy":
            std = np.sqrt(np.maximum(second - first**2, 0)).mean(0)
        else:
            std = np.sqrt(np.maximum(second.mean(0) - first.mean(0) ** 2, 0))
        if not (std > 0).all():
            raise ValueError(f"{self.name}: a channel has one value everywhere; set data.normalize=none")
        found = {"mean": (first.mean(0) / self._peak).tolist(), "std": (std / self._peak).tolist()}
        return found | {key: list(value) for key, value in self._given.items() if value is not None}

    @override
    def state_dict(self) -> dict[str, Any]:
        return dict(self._statistics)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Normalise as the run did that wrote the checkpoint, whatever the training part at hand is."""
        if self.normalize != "none":
            self._statistics = state_dict | {
                key: list(value) for key, value in self._given.items() if value is not None
            }

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
        layout = None if self.trainer is None else self.trainer.distributed_sampler_kwargs
        devices = layout["num_replicas"] if layout else 1
        size = self.batch_size if self.local_batch_size is None else self.local_batch_size * devices
        return self._loader(self._grown(devices), size, shuffle=True, drop_last=self.drop_last)

    def _grown(self, devices: int) -> ImageSet:
        """The training images of that many devices (``samples_per_device``)."""
        images = self._set("train")
        if self.samples_per_device is None:
            return images
        wanted = self.samples_per_device * devices
        if wanted > len(images.rows):
            raise ValueError(
                f"data.samples_per_device={self.samples_per_device} on {devices} devices: {self.name} has "
                f"{len(images.rows)} training images; use at most {len(images.rows) // devices}"
            )
        places = stratified_subset(images.labels, wanted, self.split_seed)
        names = [images.names[i] for i in places]
        return ImageSet(images.pixels, images.rows[places], images.labels[places], names)

    @override
    def val_dataloader(self) -> DataLoader | list[DataLoader]:
        """Give the validation images; none without a ``val_fraction``."""
        return self._loader("val", self.eval_batch_size) if len(self._set("val").rows) else []

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
        if trainer.training and self.augment:
            streams = getattr(trainer.lightning_module, "view_streams", None)
            return self.augmented(batch, trainer.current_epoch, [0] if streams is None else streams())
        if trainer.testing or (trainer.predicting and self.predict_part == "test"):
            return self.shifted(batch)
        return self.normalized(batch)

    def normalized(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn stored values into the input of a network."""
        return batch | {"image": self._normalized(self._unit(batch))}

    def shifted(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with the shift of the test images, if there is one."""
        image = self._unit(batch)
        if self.shift is not None:
            draws = self._draws(_SHIFT_EPOCH, batch, num_draws(self.shift, image.shape[1:]), self.split_seed)
            image = shift_images(image, draws, self.shift, self.severity)
        return batch | {"image": self._normalized(image)}

    def unknown(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn images of ``ood`` into what a network takes for images of this data set."""
        image = self.ood._unit(batch)
        if image.shape[-1] != self._shape[-1]:
            image = F.interpolate(image, self._shape[1:], mode="bilinear", align_corners=False, antialias=True)
        return batch | {"image": self._normalized(image)}

    def augmented(self, batch: dict[str, Tensor], epoch: int, streams: Sequence[int] = (0,)) -> dict[str, Tensor]:
        """Turn stored values into random views of an epoch, normalised.

        Args:
            batch: As stored.
            epoch: Number of the epoch.
            streams: Stream of the views of every sample of the weights. If all are equal there is one view of an image
                for all of them, else the views lie one sample after the other, (samples x batch, channel, S, S).
        """
        unit = self._unit(batch)
        views = {stream: self._view(unit, batch, epoch, stream) for stream in sorted(set(streams))}
        images = list(views.values()) if len(views) == 1 else [views[stream] for stream in streams]
        return batch | {"image": images[0] if len(images) == 1 else torch.cat(images)}

    def _view(self, image: Tensor, batch: dict[str, Tensor], epoch: int, stream: int) -> Tensor:
        pixels = image[0].numel() if self.noise else 0
        sizes = 0 if self.crop_scale is None else SIZE_DRAWS
        draws = self._draws(epoch, batch, NUM_DRAWS + 2 + pixels + sizes, self.seed, stream)
        how = {"flip_probability": self.flip_probability, "rotation_degrees": self.rotation_degrees}
        size = image.shape[-1]
        if self.crop_scale is not None:
            of_view = torch.cat([draws[:, :NUM_DRAWS], draws[:, -SIZE_DRAWS:]], 1)
            image = resized_views(image, of_view, size=size, scale=self.crop_scale, ratio=self.crop_ratio, **how)
        elif self.padding or any(how.values()):
            image = random_views(image, draws[:, :NUM_DRAWS], size=size, padding=self.padding, **how)
        if self.noise:
            image = gaussian_noise(image, draws[:, NUM_DRAWS + 2 : NUM_DRAWS + 2 + pixels], self.noise)
        image = self._normalized(image)
        return cut_out(image, draws[:, NUM_DRAWS : NUM_DRAWS + 2], self.cutout) if self.cutout else image

    @staticmethod
    def _draws(epoch: int, batch: dict[str, Tensor], number: int, seed: int, stream: int = 0) -> Tensor:
        return torch.from_numpy(uniform_per_sample(seed, epoch, batch["index"].cpu().numpy(), number, stream))

    def _unit(self, batch: dict[str, Tensor]) -> Tensor:
        """Values in [0, 1]; the gathered pixels have their channels last in memory, a batch has them first."""
        return batch["image"].contiguous().float() / self._peak

    def _normalized(self, image: Tensor) -> Tensor:
        if self.to_rgb:
            image = image.expand(-1, 3, -1, -1)
        if self.normalize == "none":
            return image
        mean, std = (image.new_tensor(self._statistics[key]).view(-1, 1, 1) for key in ("mean", "std"))
        return (image - mean) / std

    # ------------------------------------------------------------------------------------------- what modules know

    @property
    def name(self) -> str:
        """What error messages call the source."""
        if self.reader in ("digits", "synthetic"):
            return {"digits": "the embedded digits", "synthetic": "synthetic images"}[self.reader]
        return str(self.data_dir / self.files[0])

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
        """Tabulate predict outputs, one row per image.

        Args:
            outputs: Outputs of a predict step, or a list of them: ``prediction`` (batch,) class, ``probability``
                (batch, class), ``index`` (batch,), and where known ``target``, ``entropy`` and ``mutual_information``,
                (batch,) each.

        Returns:
            Columns image (its name), prediction (name of the class), probability (of that class), entropy and
            mutual_information (nats) where the module delivers them, label where it is known, and origin, the number of
            the image in its part, by which the rows are sorted.
        """
        import pandas as pd

        frames = [self._table_of_batch(batch) for batch in ([outputs] if isinstance(outputs, Mapping) else outputs)]
        return pd.concat(frames, ignore_index=True)

    def _table_of_batch(self, outputs: Mapping[str, Any]) -> pd.DataFrame:
        import pandas as pd

        names, index = self._set(self.predict_part).names, outputs["index"].tolist()
        prediction = outputs["prediction"].cpu()
        probability = outputs["probability"].cpu().gather(1, prediction[:, None])[:, 0]
        columns: dict[str, Any] = {
            "image": [names[i] for i in index],
            "prediction": [self.class_names[c] for c in prediction.tolist()],
            "probability": probability.double().numpy().round(6),
        }
        for name in ("entropy", "mutual_information"):
            if outputs.get(name) is not None:
                columns[name] = outputs[name].cpu().double().numpy().round(6)
        if outputs.get("target") is not None:
            columns["label"] = [self.class_names[c] for c in outputs["target"].tolist()]
        return pd.DataFrame(columns | {"origin": index})


def _default_cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "wattlight" / "images"
