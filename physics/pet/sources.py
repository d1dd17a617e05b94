"""Where decays happen: cylinder, point, line, voxels, and two phantoms made of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Shape = Literal["cylinder", "point", "line", "derenzo", "hot_spheres", "voxels"]
SHAPES = ("cylinder", "point", "line", "derenzo", "hot_spheres", "voxels")


@dataclass(frozen=True)
class Source:
    """A distribution of activity.

    Args:
        shape: ``cylinder``, uniform; ``point``; ``line`` along the axis; ``derenzo``: rods of six diameters in six
            sectors; ``hot_spheres``: six spheres, four times as active as the cylinder around them; ``voxels``.
        radius_mm: Of the cylinder and of the phantoms.
        half_height_mm: Half of their length along the axis, and of the line.
        centre_mm: (x, y, z) of all of them.
        voxels: Activity on a grid, (x, y, z), relative; of ``voxels`` alone.
        voxel_mm: Edge of a voxel.
    """

    shape: Shape = "cylinder"
    radius_mm: float = 16.0
    half_height_mm: float = 15.0
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    voxels: np.ndarray | None = None
    voxel_mm: float = 1.0

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"source={self.shape!r} is unknown; choose {', '.join(SHAPES)}")
        if not (self.radius_mm > 0 and self.half_height_mm > 0 and self.voxel_mm > 0):
            raise ValueError("radius_mm, half_height_mm and voxel_mm of a source must be above 0")
        if self.shape == "voxels" and (self.voxels is None or np.ndim(self.voxels) != 3 or np.sum(self.voxels) <= 0):
            raise ValueError("source='voxels' needs an array of activity (x, y, z) that is not empty")

    def sample(self, count: int, rng: np.random.Generator) -> np.ndarray:
        """Places of decays, mm, (count, 3)."""
        draw = {
            "point": lambda n: np.zeros((n, 3)),
            "line": lambda n: np.stack([np.zeros(n), np.zeros(n), self._height(n, rng)], -1),
            "cylinder": lambda n: self._in_cylinder(n, rng),
            "derenzo": lambda n: self._derenzo(n, rng),
            "hot_spheres": lambda n: self._hot_spheres(n, rng),
            "voxels": lambda n: self._in_voxels(n, rng),
        }[self.shape]
        return draw(count) + np.asarray(self.centre_mm, dtype=float)

    def _height(self, count: int, rng: np.random.Generator) -> np.ndarray:
        return rng.uniform(-self.half_height_mm, self.half_height_mm, count)

    def _in_cylinder(self, count: int, rng: np.random.Generator) -> np.ndarray:
        r, phi = self.radius_mm * np.sqrt(rng.random(count)), rng.uniform(0, 2 * np.pi, count)
        return np.stack([r * np.cos(phi), r * np.sin(phi), self._height(count, rng)], -1)

    def derenzo_rods(self) -> np.ndarray:
        """Centres and radii of the rods, (rod, 3): x, y, radius; two diameters from centre to centre."""
        rods = []
        for sector in range(6):
            d = self.radius_mm * (0.06 + 0.02 * sector)  # diameter
            turn = np.pi / 3 * (sector + 0.5)
            for row in range(40):
                along = 2.0 * d * (row + 0.75)
                if along + d / 2 > 0.95 * self.radius_mm:
                    break
                for k in range(row + 1):
                    across = 2.0 * d * (k - row / 2) / np.sqrt(3)
                    x, y = along * np.cos(turn) - across * np.sin(turn), along * np.sin(turn) + across * np.cos(turn)
                    if np.hypot(x, y) + d / 2 <= 0.95 * self.radius_mm:
                        rods.append((x, y, d / 2))
        return np.array(rods)

    def _derenzo(self, count: int, rng: np.random.Generator) -> np.ndarray:
        rods = self.derenzo_rods()
        area = rods[:, 2] ** 2
        chosen = rods[rng.choice(len(rods), count, p=area / area.sum())]
        r, phi = chosen[:, 2] * np.sqrt(rng.random(count)), rng.uniform(0, 2 * np.pi, count)
        return np.stack([chosen[:, 0] + r * np.cos(phi), chosen[:, 1] + r * np.sin(phi), self._height(count, rng)], -1)

    def _hot_spheres(self, count: int, rng: np.random.Generator) -> np.ndarray:
        radii = self.radius_mm * np.array([0.05, 0.065, 0.085, 0.11, 0.14, 0.185])
        volumes = np.concatenate([[2 * np.pi * self.radius_mm**2 * self.half_height_mm], 3 * 4 / 3 * np.pi * radii**3])
        which = rng.choice(7, count, p=volumes / volumes.sum())
        points = self._in_cylinder(count, rng)
        hot = which > 0
        sphere = which[hot] - 1
        inside = rng.normal(size=(len(sphere), 3))
        inside *= (radii[sphere] * rng.random(len(sphere)) ** (1 / 3) / np.linalg.norm(inside, axis=-1))[:, None]
        turn = np.pi / 3 * sphere
        inside[:, 0] += 0.6 * self.radius_mm * np.cos(turn)
        inside[:, 1] += 0.6 * self.radius_mm * np.sin(turn)
        points[hot] = inside
        return points

    def _in_voxels(self, count: int, rng: np.random.Generator) -> np.ndarray:
        share = np.asarray(self.voxels, dtype=float).ravel()
        chosen = np.stack(np.unravel_index(rng.choice(len(share), count, p=share / share.sum()), self.voxels.shape), -1)
        return (chosen + rng.random((count, 3)) - np.array(self.voxels.shape) / 2) * self.voxel_mm
