"""Generator of chest X-ray images whose class is a matter of texture, not of brightness (energy study, section 6)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from datamodules.xray import ImageSet, Part, XrayImages

_PHOTONS = 1e4
"""Per pixel where nothing is in the way, at an exposure of 1."""
_DEPTHS = (-0.5, 3.0)
"""Optical depths that black and white stand for."""
_MAX_BLOBS, _MAX_RIBS, _NUM_VESSELS = 12, 10, 12
_RENDERED_AT_ONCE = 2**18  # pixels


class SyntheticXrays(NamedTuple):
    """Generated images and what is in them.

    Attributes:
        images: ``(image, 1, size, size)`` uint8, bright where little light passes (bones), as radiologists see them.
        labels: ``(image,)`` int64, 1 where ground-glass opacities were added.
        lungs: ``(image, 1, size, size)`` bool.
        num_opacities: ``(image,)`` int64, 3 to 12 in positive images, 0 in negative ones.
    """

    images: Tensor
    labels: Tensor
    lungs: Tensor
    num_opacities: Tensor


def synthetic_xrays(num_images: int, size: int, *, contrast: float = 1.0, seed: int = 0) -> SyntheticXrays:
    """Draw chests, half of them with opacities, and photograph them.

    The light that passes is ``I = exp(-(body + spine + ribs + heart + vessels - lungs + opacities))``: an elliptic body
    and two ellipses of little attenuation, 8 to 10 rib arcs, a heart to the right of the middle, branches of vessels
    from the hila. Opacities are 3 to 12 Gaussian blobs of 4 to 12 pixels (of 224) and a contrast of 5 to
    15 % in the outer thirds of the lungs. Lung density, thickness, exposure, size, position and rotation differ from
    image to image by more than the opacities change the brightness of the lungs. Photons are counted (Poisson, 1e4 per
    pixel), the image is the logarithm of the counts.

    The same seed gives the same chests at every size; only the noise of the photons differs.

    Args:
        num_images: Images; positives and negatives alternate in random order.
        size: Height and width.
        contrast: Factor on the contrast of the opacities.
        seed: Seed of everything random.
    """
    chest_seed, noise_seed = np.random.SeedSequence(seed).generate_state(2)
    chests = _draw_chests(num_images, torch.Generator().manual_seed(int(chest_seed)))
    noise = torch.Generator().manual_seed(int(noise_seed))
    images, lungs = [], []
    for part in range(0, num_images, step := max(1, _RENDERED_AT_ONCE // (size * size))):
        depth, inside = _optical_depth({k: v[part : part + step] for k, v in chests.items()}, size, contrast)
        light = _PHOTONS * chests["exposure"][part : part + step].view(-1, 1, 1) * torch.exp(-depth)
        seen = -torch.log(torch.poisson(light, generator=noise).clamp(min=1) / _PHOTONS)
        grey = (seen - _DEPTHS[0]) / (_DEPTHS[1] - _DEPTHS[0])
        images.append((grey.clamp(0, 1) * 255).round().to(torch.uint8).unsqueeze(1))
        lungs.append(inside.unsqueeze(1))
    return SyntheticXrays(torch.cat(images), chests["label"], torch.cat(lungs), chests["num_opacities"])


def _draw_chests(n: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Everything random but the photons; lengths in halves of the image, the first dimension is the image."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    label = torch.randperm(n, generator=generator) % 2
    num_opacities = torch.randint(3, _MAX_BLOBS + 1, (n,), generator=generator) * label
    side = torch.randint(0, 2, (n, _MAX_BLOBS), generator=generator) * 2.0 - 1
    vessel_side = (torch.arange(2 * _NUM_VESSELS) % 2 * 2.0 - 1).expand(n, -1)
    return {
        "label": label,
        "num_opacities": num_opacities,
        "exposure": torch.exp(uniform(-0.3, 0.3)),
        "angle": uniform(-0.1, 0.1),
        "scale": uniform(0.88, 1.08),
        "shift": uniform(-0.06, 0.06, 2),
        "thickness": uniform(1.2, 1.7),
        "air": uniform(0.65, 0.85),
        "lung_width": uniform(0.26, 0.32, 2),
        "lung_height": uniform(0.52, 0.62, 2),
        "heart": uniform(0.5, 0.8),
        "heart_size": uniform(0.85, 1.15),
        "ribs": uniform(0.12, 0.22),
        "num_ribs": torch.randint(8, _MAX_RIBS + 1, (n,), generator=generator),
        "rib_offset": uniform(-0.06, 0.06),
        "rib_slope": uniform(0.25, 0.45),
        "vessel_side": vessel_side,
        "vessel_angle": uniform(-1.3, 1.3, 2 * _NUM_VESSELS),
        "vessel_length": uniform(0.10, 0.22, 2 * _NUM_VESSELS),
        "vessel_width": uniform(0.008, 0.02, 2 * _NUM_VESSELS),
        "vessel_depth": uniform(0.05, 0.16, 2 * _NUM_VESSELS),
        "blob_side": side,
        # In units of the lung's half-axes: the third that is farthest from the middle of the chest.
        "blob_outwards": uniform(1 / 3, 0.9, _MAX_BLOBS),
        "blob_along": uniform(-0.9, 0.9, _MAX_BLOBS),
        "blob_sigma": uniform(4 / 112, 12 / 112, _MAX_BLOBS),
        "blob_contrast": uniform(0.05, 0.15, _MAX_BLOBS),
    }


def _optical_depth(chest: dict[str, Tensor], size: int, contrast: float) -> tuple[Tensor, Tensor]:
    """Attenuation along the ray of every pixel, ``(image, size, size)``, and where the lungs are."""

    def per_image(name: str) -> Tensor:
        return chest[name].view(-1, 1, 1)

    x, y = _coordinates(chest, size)
    body = _half_ellipsoid(x / 0.92, (y - 0.15) / 1.15)
    depth = per_image("thickness") * body
    inside = torch.zeros_like(depth, dtype=torch.bool)
    for i, side in enumerate((-1, 1)):
        width, height = chest["lung_width"][:, i].view(-1, 1, 1), chest["lung_height"][:, i].view(-1, 1, 1)
        lung = _half_ellipsoid((x - side * 0.42) / width, (y + 0.05) / height)
        depth -= per_image("air") * per_image("thickness") * 0.75 * lung
        inside |= lung > 0.25
    heart = _half_ellipsoid((x - 0.14) / (0.27 * per_image("heart_size")), (y - 0.28) / 0.28)
    depth += per_image("heart") * heart
    vertebrae = 1 + 0.15 * torch.cos(2 * math.pi * y / 0.16)
    depth += 0.55 * torch.exp(-0.5 * (x / 0.07) ** 4) * vertebrae * (body > 0)
    depth += _ribs(chest, x, y)
    depth += _vessels(chest, x, y) * inside
    return depth + _opacities(chest, x, y, contrast), inside


def _coordinates(chest: dict[str, Tensor], size: int) -> tuple[Tensor, Tensor]:
    """Position of every pixel in the chest's own axes, -1 to 1 across the image, each ``(image, size, size)``."""
    axis = (torch.arange(size) + 0.5) * 2 / size - 1
    row, column = torch.meshgrid(axis, axis, indexing="ij")
    sine, cosine = chest["angle"].sin().view(-1, 1, 1), chest["angle"].cos().view(-1, 1, 1)
    column, row = column - chest["shift"][:, 0].view(-1, 1, 1), row - chest["shift"][:, 1].view(-1, 1, 1)
    scale = chest["scale"].view(-1, 1, 1)
    return (cosine * column + sine * row) / scale, (cosine * row - sine * column) / scale


def _half_ellipsoid(u: Tensor, v: Tensor) -> Tensor:
    """Thickness of an ellipsoid along the ray, 1 in its middle and 0 outside."""
    return (1 - u * u - v * v).clamp(min=0).sqrt()


def _ribs(chest: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """8 to 10 arcs per side that fall outwards."""
    outwards = x.abs()
    across = torch.sigmoid((outwards - 0.12) / 0.02) * torch.sigmoid((0.86 - outwards) / 0.02)
    level = y - chest["rib_slope"].view(-1, 1, 1) * outwards * outwards
    rib = torch.arange(_MAX_RIBS)
    heights = -0.72 + 1.25 / chest["num_ribs"][:, None] * rib + chest["rib_offset"][:, None]
    there = (rib < chest["num_ribs"][:, None]) * chest["ribs"][:, None]
    one = torch.ones_like(heights)
    exponent = torch.stack([heights**2, -2 * heights, one], 2) / 0.026**2
    return across * _bells([torch.ones_like(level), level, level * level], exponent, there)


def _vessels(chest: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Narrow branches that leave the hila in all directions: as dark as opacities, but of another shape."""
    side, angle, length, width = (chest[f"vessel_{name}"] for name in ("side", "angle", "length", "width"))
    sine, cosine = angle.sin(), angle.cos()
    # (along / length)^2 + (beside / width)^2 with along = c s x + n y - p and beside = c y - n s x - q.
    p, q = 0.22 * cosine + length, -0.22 * sine
    a, b = 1 / length**2, 1 / width**2
    exponent = torch.stack(
        [
            a * p * p + b * q * q,
            2 * side * (b * q * sine - a * p * cosine),
            -2 * (a * p * sine + b * q * cosine),
            a * cosine**2 + b * sine**2,
            2 * side * sine * cosine * (a - b),
            a * sine**2 + b * cosine**2,
        ],
        2,
    )
    return _bells([torch.ones_like(x), x, y, x * x, x * y, y * y], exponent, chest["vessel_depth"])


def _opacities(chest: dict[str, Tensor], x: Tensor, y: Tensor, contrast: float) -> Tensor:
    """Ground glass in the outer thirds of the lungs of positive images, as additional optical depth."""
    outwards, along = chest["blob_outwards"], chest["blob_along"]
    centre_x = chest["blob_side"] * (0.42 + 0.29 * outwards)
    centre_y = -0.05 + 0.57 * along * (1 - outwards**2).sqrt()
    there = torch.arange(_MAX_BLOBS) < chest["num_opacities"][:, None]
    one = torch.ones_like(centre_x)
    exponent = torch.stack([centre_x**2 + centre_y**2, -2 * centre_x, -2 * centre_y, one], 2)
    strength = -torch.log1p(-(contrast * chest["blob_contrast"]).clamp(max=0.99)) * there
    return _bells([torch.ones_like(x), x, y, x * x + y * y], exponent / chest["blob_sigma"][..., None] ** 2, strength)


def _bells(features: list[Tensor], exponent: Tensor, height: Tensor) -> Tensor:
    """Sum of bells ``height * exp(-exponent * features / 2)``, ``(image, size, size)``.

    Args:
        features: Each ``(image, size, size)``; the squared distances are linear in them.
        exponent: ``(image, bell, feature)``.
        height: ``(image, bell)``.
    """
    shape = features[0].shape
    squared = exponent @ torch.stack(features, 1).flatten(2)
    squared.clamp_(max=60.0)  # numbers too small for float32's normal range take ten times as long
    return torch.einsum("nk,nkp->np", height, squared.mul_(-0.5).exp_()).view(shape)


class GeneratedImages:
    """An `datamodules.xray.ImageSet` of generated images, all in memory."""

    def __init__(self, name: str, xrays: SyntheticXrays) -> None:
        self.names = [f"{name}_{i:05d}" for i in range(len(xrays.labels))]
        self.labels, self._images = xrays.labels, xrays.images

    def read(self, index: Sequence[int]) -> Tensor:
        """See `datamodules.xray.ImageSet`."""
        return self._images[list(index)]


class SyntheticXrayDataModule(XrayImages):
    """Generated X-ray images; the batch is that of `datamodules.xray.XrayImages`.

    Args:
        num_train: Images of the training part.
        num_val: Images of the validation part.
        num_test: Images of the test part.
        contrast: Factor on the contrast of the opacities (5 to 15 %); larger is easier.
        data_seed: Seed of the images (``seed`` orders the training images), so that repeated trainings share data.
        image_size: As in `datamodules.xray.XrayDataModule`, like all that follow.
        stored_size: Height and width before augmentation.
        augment: Whether training sees random views.
        flip_probability: Of a horizontal flip.
        rotation_degrees: Largest angle of a rotation.
        padding: Black pixels added at every side before cutting.
        mean: Of the grey values.
        std: Standard deviation of the grey values.
        predict_part: Part that prediction goes through: ``train``, ``val`` or ``test``.
        repeat: How often prediction goes through it.
        batch_size: Images per training step over all devices.
        eval_batch_size: Images per evaluation step over all devices.
        drop_last: Drop the incomplete last batch of a training epoch.
        num_workers: Loader processes.
        seed: Seed of the order of the training images and of the random views.
    """

    # Repeated as a literal: the check of a configuration reads it without importing torch.
    batch_keys: ClassVar[tuple[str, ...]] = ("image", "label", "index")

    def __init__(
        self,
        num_train: int = 1024,
        num_val: int = 256,
        num_test: int = 256,
        contrast: float = 1.0,
        data_seed: int = 0,
        image_size: int = 64,
        stored_size: int = 68,
        augment: bool = True,
        flip_probability: float = 0.5,
        rotation_degrees: float = 30.0,
        padding: int = 3,
        mean: float = 0.348,
        std: float = 0.174,
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
        self.sizes: dict[str, int] = {"train": num_train, "val": num_val, "test": num_test}
        for part, number in self.sizes.items():
            if number < 2:
                raise ValueError(f"data.num_{part}={number}: must be at least 2, one image of each class")
        if contrast < 0:
            raise ValueError(f"data.contrast={contrast}: must not be negative")
        self.contrast, self.data_seed = contrast, data_seed

    @property
    @override
    def name(self) -> str:
        return "synthetic X-ray images"

    @override
    def open(self, part: Part, size: int) -> ImageSet:
        seed = int(np.random.SeedSequence((self.data_seed, get_args(Part).index(part))).generate_state(1)[0])
        return GeneratedImages(part, synthetic_xrays(self.sizes[part], size, contrast=self.contrast, seed=seed))
