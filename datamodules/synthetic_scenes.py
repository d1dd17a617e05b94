"""Street scenes with a class for every pixel, generated: a stand-in for Cityscapes, which cannot be shipped.

Sky with a gradient above the horizon, ground below it, rectangles for buildings that stand on it, discs for cars in
front of everything that was there before, and Gaussian noise (docs/experiments/daso.md, "Dense prediction").
"""

from __future__ import annotations

from typing import ClassVar, Literal, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from datamodules.loading import WholeBatches, make_loader, whole_batch
from datamodules.random_views import uniform_per_sample

Part = Literal["train", "val", "test"]
CLASSES: tuple[str, ...] = ("sky", "ground", "building", "car")
SKY, GROUND, BUILDING, CAR = range(4)


def draw_scenes(
    number: int, size: int, buildings: tuple[int, int], cars: tuple[int, int], noise: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw scenes.

    Args:
        number: Scenes.
        size: Pixels of a side.
        buildings: Fewest and most buildings of a scene.
        cars: Fewest and most cars.
        noise: Standard deviation of the noise on colours in [0, 1].
        seed: Of everything that is drawn.

    Returns:
        Images ``(number, 3, size, size)`` float32, not clipped, and classes ``(number, size, size)`` int64.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(number, *shape, generator=generator)

    def count(bounds: tuple[int, int]) -> Tensor:
        return torch.randint(bounds[0], bounds[1] + 1, (number,), generator=generator)

    y = (torch.arange(size) + 0.5).view(1, size, 1) / size
    x = (torch.arange(size) + 0.5).view(1, 1, size) / size
    horizon = uniform(0.35, 0.65, 1, 1)
    # From the top to the horizon the sky becomes lighter, from there to the front the ground becomes darker.
    sky = uniform(0.3, 0.7, 3, 1, 1) + uniform(0.1, 0.3, 1, 1, 1) * (y / horizon)[:, None]
    ground = uniform(0.3, 0.6, 3, 1, 1) - uniform(0.0, 0.2, 1, 1, 1) * ((y - horizon) / (1 - horizon))[:, None]
    below = (y >= horizon).expand(number, size, size)
    image = torch.where(below[:, None], ground, sky)
    label = below.long()

    def paint(where: Tensor, kind: int) -> None:
        nonlocal image, label
        colour = uniform(0.0, 1.0, 3, 1, 1)  # says nothing about the class
        image = torch.where(where[:, None], colour, image)
        label = torch.where(where, kind, label)

    present = count(buildings)
    for i in range(buildings[1]):
        middle, half = uniform(0.0, 1.0, 1, 1), uniform(0.05, 0.18, 1, 1)
        top, foot = horizon - uniform(0.08, 0.3, 1, 1), horizon + uniform(0.0, 0.05, 1, 1)
        where = ((x - middle).abs() <= half) & (y >= top) & (y <= foot)
        paint(where & (i < present).view(-1, 1, 1), BUILDING)
    present = count(cars)
    for i in range(cars[1]):
        middle, radius = uniform(0.0, 1.0, 1, 1), uniform(0.04, 0.11, 1, 1)
        depth = horizon + (1 - horizon) * uniform(0.1, 0.9, 1, 1)
        where = (x - middle).square() + (y - depth).square() <= radius.square()
        paint(where & (i < present).view(-1, 1, 1), CAR)
    image = image + noise * torch.randn(image.shape, generator=generator)
    return image, label


class _Scenes(WholeBatches):
    def __init__(self, image: Tensor, label: Tensor) -> None:
        self.image, self.label = image, label

    def __len__(self) -> int:
        return len(self.image)

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(indices)
        return {"image": self.image[index], "label": self.label[index], "index": index}


class SyntheticScenes(LightningDataModule):
    """Generated scenes and the class of every pixel.

    A batch is a dictionary: ``image`` (B, 3, S, S) float32, colours around [0, 1] minus 0.5; ``label`` (B, S, S) int64,
    a number of ``class_names``; ``index`` (B,) int64, the number of the scene in its part.

    Args:
        num_train: Scenes for training.
        num_val: For validation.
        num_test: For the test.
        image_size: S, pixels.
        min_buildings: Fewest buildings of a scene.
        max_buildings: Most.
        min_cars: Fewest cars.
        max_cars: Most.
        noise: Standard deviation of the noise.
        scene_seed: Of the scenes; parts are drawn one by one.
        flip: Mirror training scenes at random, by (seed, epoch, index).
        predict_part: ``train``, ``val`` or ``test``.
        batch_size: Scenes of a step over all processes.
        eval_batch_size: Of an evaluation.
        drop_last: Drop the incomplete last batch of an epoch.
        num_workers: Of loaders.
        seed: Order of training, and views.

    Raises:
        ValueError: Names the argument, its value and the remedy.
    """

    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label", "index")
    class_names: ClassVar[tuple[str, ...]] = CLASSES
    num_classes: ClassVar[int] = len(CLASSES)
    num_channels: ClassVar[int] = 3

    def __init__(
        self,
        num_train: int = 1600,
        num_val: int = 200,
        num_test: int = 400,
        image_size: int = 64,
        min_buildings: int = 1,
        max_buildings: int = 4,
        min_cars: int = 1,
        max_cars: int = 4,
        noise: float = 0.1,
        scene_seed: int = 0,
        flip: bool = True,
        predict_part: Part = "test",
        batch_size: int = 32,
        eval_batch_size: int = 64,
        drop_last: bool = True,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for key, value in (
            ("num_train", num_train), ("num_val", num_val), ("num_test", num_test), ("batch_size", batch_size),
            ("eval_batch_size", eval_batch_size),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        if image_size < 8:
            raise ValueError(f"data.image_size={image_size}: a scene needs 8 pixels or more")
        for what, least, most in (("buildings", min_buildings, max_buildings), ("cars", min_cars, max_cars)):
            if not 0 <= least <= most:
                raise ValueError(f"data.min_{what}={least}, data.max_{what}={most}: give 0 <= min <= max")
        if noise < 0:
            raise ValueError(f"data.noise={noise}: a standard deviation is 0 or more")
        if predict_part not in get_args(Part):
            raise ValueError(f"data.predict_part={predict_part!r}: choose {', '.join(get_args(Part))}")
        self.numbers: dict[Part, int] = {"train": num_train, "val": num_val, "test": num_test}
        self.image_size, self.noise, self.scene_seed, self.flip = image_size, noise, scene_seed, flip
        self.buildings, self.cars = (min_buildings, max_buildings), (min_cars, max_cars)
        self.predict_part, self.num_workers, self.seed = predict_part, num_workers, seed
        self.batch_size, self.eval_batch_size, self.drop_last = batch_size, eval_batch_size, drop_last
        self._parts: dict[Part, _Scenes] = {}

    def part(self, part: Part) -> _Scenes:
        """The scenes of a part, drawn at the first call."""
        if part not in self._parts:
            seed = 3 * self.scene_seed + get_args(Part).index(part)
            drawn = draw_scenes(self.numbers[part], self.image_size, self.buildings, self.cars, self.noise, seed)
            self._parts[part] = _Scenes(drawn[0] - 0.5, drawn[1])
        return self._parts[part]

    def _loader(self, part: Part, shuffle: bool = False) -> DataLoader:
        return make_loader(
            self.part(part), self.batch_size if shuffle else self.eval_batch_size, shuffle=shuffle, seed=self.seed,
            layout=self.trainer.distributed_sampler_kwargs if self.trainer else None, drop_last=self.drop_last,
            collate_fn=whole_batch, num_workers=self.num_workers,
        )  # fmt: skip

    @override
    def train_dataloader(self) -> DataLoader:
        return self._loader("train", shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader:
        return self._loader("val")

    @override
    def test_dataloader(self) -> DataLoader:
        return self._loader("test")

    @override
    def predict_dataloader(self) -> DataLoader:
        return self._loader(self.predict_part)

    @override
    def on_after_batch_transfer(self, batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        if not (self.flip and self.trainer and self.trainer.training):
            return batch
        draws = uniform_per_sample(self.seed, self.trainer.current_epoch, batch["index"].cpu().numpy(), 1)[:, 0]
        mirrored = torch.from_numpy(draws < 0.5).to(batch["image"].device)
        image = torch.where(mirrored.view(-1, 1, 1, 1), batch["image"].flip(-1), batch["image"])
        label = torch.where(mirrored.view(-1, 1, 1), batch["label"].flip(-1), batch["label"])
        return batch | {"image": image, "label": label}
