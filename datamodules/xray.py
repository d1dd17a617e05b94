"""Chest X-ray images with a binary label: the image workload of the energy study (sections 2.3 and 6)."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.loading import WholeBatches, make_loader, whole_batch
from datamodules.random_views import random_views, uniform_per_sample
from datamodules.readers.image_table import read_grey, read_labels

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)

Part = Literal["train", "val", "test"]
CLASSES = ("negative", "positive")


class ImageSet(Protocol):
    """Images of one part at one size.

    Attributes:
        names: What the images are called.
        labels: ``(image,)`` int64, 1 = positive; None if they are not known.
    """

    names: Sequence[str]
    labels: Tensor | None

    def read(self, index: Sequence[int]) -> Tensor:
        """Return grey values, ``(len(index), 1, size, size)`` uint8."""


class XrayBatches(WholeBatches):
    """An image set as a data set of whole batches, if wanted several times over."""

    def __init__(self, images: ImageSet, repeat: int = 1) -> None:
        self.images, self.repeat = images, repeat

    def __len__(self) -> int:
        return len(self.images.names) * self.repeat

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        """Gather a whole batch."""
        index = torch.as_tensor(indices)
        stored = index % len(self.images.names)
        batch = {"image": self.images.read(stored.tolist()), "index": index}
        if self.images.labels is not None:
            batch["label"] = self.images.labels[stored]
        return batch


MODELS = {"xray_vgg_small": (32, 95), "xray_vgg": (122, 607)}
"""Least and greatest ``image_size`` of the options of the group ``model`` for these images."""


def _fitting_models(size: int) -> str:
    """A size that the data can give may still be none that the chosen network takes: which one does."""
    fitting = [name for name, (least, most) in MODELS.items() if least <= size <= most]
    if fitting:
        return f", and a network for images of that size: model={fitting[0]}"
    known = ", ".join(f"model={name}: {least} to {most}" for name, (least, most) in MODELS.items())
    return f". No network takes images of that size ({known} pixels)"


class XrayImages(LightningDataModule):
    """Everything behind the source of the images: loaders, augmentation, tables.

    Subclasses say where the images come from (`open`, `name`). A batch is a dictionary:

    ===================== ================== ====================================================================
    key                   shape              meaning
    ===================== ================== ====================================================================
    image                 (B, 1, S, S)       float32, (grey value in [0, 1] - ``mean``) / ``std``; S = ``image_size``
    label                 (B,) int64         1 positive, 0 negative; not in images without labels
    index                 (B,) int64         number of the image in its part; repetitions count on
    ===================== ================== ====================================================================

    Loaders hand out stored images (uint8, in training of ``stored_size``); augmentation and normalisation follow on the
    device, batch by batch, when the Trainer has moved them there. Random views depend on (seed, epoch, index) alone, so
    that runs resume bit for bit and do not depend on the number of processes.

    The arguments are those of `XrayDataModule`.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label", "index")

    def __init__(
        self,
        *,
        image_size: int,
        stored_size: int,
        augment: bool,
        flip_probability: float,
        rotation_degrees: float,
        padding: int,
        mean: float,
        std: float,
        predict_part: Part,
        repeat: int,
        batch_size: int,
        eval_batch_size: int,
        drop_last: bool,
        num_workers: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.image_size, self.stored_size, self.augment = image_size, stored_size, augment
        self.flip_probability, self.rotation_degrees, self.padding = flip_probability, rotation_degrees, padding
        self.mean, self.std = mean, std
        self.predict_part, self.repeat = predict_part, repeat
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self.num_workers, self.seed = num_workers, seed
        self._sets: dict[tuple[Part, int], ImageSet] = {}
        self._check_arguments()

    @property
    @abstractmethod
    def name(self) -> str:
        """What error messages call the source."""

    @abstractmethod
    def open(self, part: Part, size: int) -> ImageSet:
        """Return the images of a part, resized to ``size``."""

    def _check_arguments(self) -> None:
        for key in ("image_size", "stored_size", "repeat", "batch_size", "eval_batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key}={getattr(self, key)}: must be at least 1")
        for key in ("padding", "num_workers", "rotation_degrees"):
            if getattr(self, key) < 0:
                raise ValueError(f"data.{key}={getattr(self, key)}: must not be negative")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"data.flip_probability={self.flip_probability}: must be between 0 and 1")
        if self.std <= 0:
            raise ValueError(f"data.std={self.std}: must be above 0")
        if self.predict_part not in get_args(Part):
            raise ValueError(
                f"data.predict_part={self.predict_part!r} is unknown; use one of {', '.join(get_args(Part))}"
            )
        if self.augment and self.image_size > self.stored_size + 2 * self.padding:
            raise ValueError(
                f"data.image_size={self.image_size} cannot be cut out of data.stored_size={self.stored_size} with "
                f"data.padding={self.padding}: use at least data.stored_size={self.image_size - 2 * self.padding}"
                f"{_fitting_models(self.image_size)}"
            )

    # ------------------------------------------------------------------------------------------------------ loaders

    @override
    def setup(self, stage: str) -> None:
        """Open what the stage needs, so that missing files are reported before anything starts."""
        parts: dict[str, list[tuple[Part, int]]] = {
            "fit": [("train", self._train_size), ("val", self.image_size)],
            "validate": [("val", self.image_size)],
            "test": [("test", self.image_size)],
            "predict": [(self.predict_part, self.image_size)],
        }
        for part, size in parts[stage]:
            self.images(part, size)

    @property
    def _train_size(self) -> int:
        return self.stored_size if self.augment else self.image_size

    def images(self, part: Part, size: int) -> ImageSet:
        """The images of a part at a size, opened once."""
        if (part, size) not in self._sets:
            found = self.open(part, size)
            if part != "test" and found.labels is None:
                raise ValueError(f"{self.name}: the {part} part has no labels; only the test part may lack them")
            if found.labels is not None:
                positive = int(found.labels.sum())
                log.info("%s: %s, %d images (%d positive)", self.name, part, len(found.names), positive)
            self._sets[part, size] = found
        return self._sets[part, size]

    def _loader(self, part: Part, size: int, batch_size: int, repeat: int = 1, **options: Any) -> DataLoader:
        return make_loader(
            XrayBatches(self.images(part, size), repeat),
            batch_size,
            seed=self.seed,
            layout=None if self.trainer is None else self.trainer.distributed_sampler_kwargs,
            num_workers=self.num_workers,
            collate_fn=whole_batch,
            **options,
        )

    @override
    def train_dataloader(self) -> DataLoader:
        return self._loader("train", self._train_size, self.batch_size, shuffle=True, drop_last=self.drop_last)

    @override
    def val_dataloader(self) -> DataLoader:
        return self._loader("val", self.image_size, self.eval_batch_size)

    @override
    def test_dataloader(self) -> DataLoader:
        if self.images("test", self.image_size).labels is None:
            raise ValueError(
                f"{self.name}: the test images have no labels, so that nothing can be tested; set test=false and "
                "predict=true"
            )
        return self._loader("test", self.image_size, self.eval_batch_size)

    @override
    def predict_dataloader(self) -> DataLoader:
        """Give the images of ``predict_part``, ``repeat`` times, without augmentation."""
        return self._loader(self.predict_part, self.image_size, self.eval_batch_size, self.repeat)

    # ---------------------------------------------------------------------------------------------------- on device

    @override
    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        trainer = self.trainer
        training = trainer is not None and trainer.training and self.augment
        batch = self.augmented(batch, trainer.current_epoch) if training else self.normalized(batch)
        # Lightning casts what loaders give, and these are bytes.
        return batch if trainer is None else batch | {"image": batch["image"].to(trainer.lightning_module.dtype)}

    def normalized(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn stored grey values into the input of a network."""
        return batch | {"image": (batch["image"].float() / 255 - self.mean) / self.std}

    def augmented(self, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        """Turn stored grey values into the random views of an epoch, normalised."""
        draws = uniform_per_sample(self.seed, epoch, batch["index"].cpu().numpy())
        views = random_views(
            batch["image"].float() / 255,
            torch.from_numpy(draws),
            size=self.image_size,
            flip_probability=self.flip_probability,
            rotation_degrees=self.rotation_degrees,
            padding=self.padding,
        )
        return batch | {"image": (views - self.mean) / self.std}

    # ------------------------------------------------------------------------------------------- what modules know

    @property
    def num_classes(self) -> int:
        """Negative and positive."""
        return len(CLASSES)

    @property
    def num_channels(self) -> int:
        """Grey images have one channel."""
        return 1

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Channel, height, width."""
        return 1, self.image_size, self.image_size

    @property
    def class_names(self) -> list[str]:
        """Names of the labels 0 and 1."""
        return list(CLASSES)

    @property
    def channel_names(self) -> list[str]:
        """Names of the channels of an image."""
        return ["grey"]

    def prediction_table(self, outputs: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> pd.DataFrame:
        """Tabulate predict outputs, one row per image; repetitions of an image are left out.

        Args:
            outputs: Outputs of a predict step, or a list of them: ``prediction`` (batch,) class, ``probability``
                (batch,) of the positive class, ``index`` (batch,), and where known ``target`` (batch,).

        Returns:
            Columns image, prediction (``positive`` or ``negative``), probability, label where it is known, and origin,
            the number of the image in its part, by which the rows are sorted.
        """
        import pandas as pd

        frames = [self._table_of_batch(batch) for batch in ([outputs] if isinstance(outputs, Mapping) else outputs)]
        return pd.concat(frames, ignore_index=True)

    def _table_of_batch(self, outputs: Mapping[str, Any]) -> pd.DataFrame:
        import pandas as pd

        names = self.images(self.predict_part, self.image_size).names
        first = outputs["index"].cpu() < len(names)
        index = outputs["index"].cpu()[first].tolist()
        columns: dict[str, Any] = {
            "image": [names[i] for i in index],
            "prediction": [CLASSES[i] for i in outputs["prediction"].cpu()[first].tolist()],
            "probability": outputs["probability"].cpu()[first].double().numpy().round(6),
        }
        if outputs.get("target") is not None:
            columns["label"] = [CLASSES[i] for i in outputs["target"].cpu()[first].tolist()]
        return pd.DataFrame(columns | {"origin": index})


class ImageFiles:
    """An `ImageSet` of files.

    Args:
        folder: Folder of the images.
        names: File names.
        labels: See `ImageSet`.
        size: Height and width that images are resized to.
        cache: Whether every image is read once and kept.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], labels: Tensor | None, size: int, cache: bool = False
    ) -> None:
        self.folder, self.names, self.labels, self.size = folder, names, labels, size
        self._kept = torch.stack([self._decode(i) for i in range(len(names))]) if cache else None

    def _decode(self, index: int) -> Tensor:
        return read_grey(self.folder / self.names[index], self.size)

    def read(self, index: Sequence[int]) -> Tensor:
        """See `ImageSet`."""
        if self._kept is not None:
            return self._kept[list(index)]
        return torch.stack([self._decode(i) for i in index])


class XrayDataModule(XrayImages):
    """X-ray images in a folder, listed with their labels in CSV files; the batch is that of `XrayImages`.

    In training an image is resized to ``stored_size``, flipped, rotated, padded and cut to ``image_size``; in
    evaluation it is resized to ``image_size``. Prediction takes a whole part without augmentation.

    Args:
        data_dir: Folder of the tables.
        train_file: Table of the training part: CSV with ``image_column`` and ``label_column``.
        val_file: Table of the validation part.
        test_file: Table of the test part; it may lack labels, then only predictions can be made of it.
        image_folder: Folder of the images, below ``data_dir`` or absolute.
        source: Where the data can be obtained; shown when they are missing.
        image_column: Column of the file names.
        label_column: Column of the labels.
        positive: The label that counts as positive.
        cache: Whether decoded images are kept in memory (57 kB each at 240 x 240), so that only the first epoch reads
            files.
        image_size: Height and width of the input of the network.
        stored_size: Height and width before augmentation.
        augment: Whether training sees random views.
        flip_probability: Of a horizontal flip.
        rotation_degrees: Largest angle of a rotation.
        padding: Black pixels added at every side before cutting.
        mean: Of the grey values (0 to 1).
        std: Standard deviation of the grey values.
        predict_part: Part that prediction goes through: ``train``, ``val`` or ``test``.
        repeat: How often prediction goes through it: a longer run gives a steadier energy figure. Rows are written
            once.
        batch_size: Images per training step over all devices.
        eval_batch_size: Images per evaluation step over all devices.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes.
        seed: Seed of the order of the training images and of the random views.

    Raises:
        ValueError: Names the argument, or file, column and line, and the remedy.
        FileNotFoundError: Names the expected path and where the data can be obtained.
    """

    # Repeated as a literal: the check of a configuration reads it without importing torch.
    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label", "index")
    input_files: ClassVar[tuple[str, ...]] = (
        "train_file",
        "val_file",
        "test_file",
        "image_folder",
    )  # runner/check.py looks for them

    def __init__(
        self,
        data_dir: str,
        train_file: str = "train.csv",
        val_file: str = "valid.csv",
        test_file: str = "test.csv",
        image_folder: str = "imgs",
        source: str | None = None,
        image_column: str = "image",
        label_column: str = "label",
        positive: str = "positive",
        cache: bool = False,
        image_size: int = 224,
        stored_size: int = 240,
        augment: bool = True,
        flip_probability: float = 0.5,
        rotation_degrees: float = 30.0,
        padding: int = 10,
        mean: float = 0.8180,
        std: float = 0.1748,
        predict_part: Part = "test",
        repeat: int = 1,
        batch_size: int = 64,
        eval_batch_size: int = 64,
        drop_last: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            image_size=image_size,
            stored_size=stored_size,
            augment=augment,
            flip_probability=flip_probability,
            rotation_degrees=rotation_degrees,
            padding=padding,
            mean=mean,
            std=std,
            predict_part=predict_part,
            repeat=repeat,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            drop_last=drop_last,
            num_workers=num_workers,
            seed=seed,
        )
        self.folder, self.source = Path(data_dir), source
        self.files: dict[str, str] = {"train": train_file, "val": val_file, "test": test_file}
        self.image_folder = self.folder / image_folder
        self.image_column, self.label_column, self.positive = image_column, label_column, positive
        self.cache = cache

    @property
    @override
    def name(self) -> str:
        return str(self.folder)

    @override
    def open(self, part: Part, size: int) -> ImageSet:
        path = self.folder / self.files[part]
        obtain = f" It can be obtained from: {self.source}" if self.source else ""
        if not path.is_file():
            raise FileNotFoundError(
                f"no file {path} (data.data_dir={self.folder}, data.{part}_file={self.files[part]}): set data.data_dir "
                f"to the folder that holds it.{obtain}"
            )
        names, labels = read_labels(
            path, image_column=self.image_column, label_column=self.label_column, positive=self.positive
        )
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"no folder {self.image_folder}: set data.image_folder.{obtain}")
        return ImageFiles(self.image_folder, names, labels, size, self.cache)
