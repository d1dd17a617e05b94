"""Detector rings of PET scanners: numbering of crystals, their places, angles between them, lines of response."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

SPEED_OF_LIGHT_MM_NS = 299.792458
"""Vacuum, mm per ns."""


@dataclass(frozen=True)
class Scanner:
    """A cylinder of crystals, read out one by one.

    Crystal ``ring * crystals_per_ring + position`` lies at the angle ``2 pi (position + 1/2) / crystals_per_ring`` and
    at the height ``(ring - (num_rings - 1) / 2) * axial_pitch_mm``: the numbering is one to one.

    Args:
        name: What tables call it.
        crystals_per_ring: Crystals around the axis; even, so that every crystal has an opposite one.
        num_rings: Rings along the axis.
        radius_mm: From the axis to the front faces.
        axial_pitch_mm: From ring to ring.
        crystal_depth_mm: Radial length of a crystal.
        attenuation_per_mm: Of the crystals at 511 keV; LYSO 0.083.
        photofraction: Interactions that deposit the whole energy; the others are Compton scatters in the crystal.
        packing_fraction: Part of the cylinder that crystals cover.
        energy_resolution: Full width at half maximum at 511 keV, relative; grows with the square root below.
        energy_window_kev: Lowest and highest energy of a hit.
        time_resolution_ns: Coincidence time resolution (FWHM of the difference of two hits); a hit alone has
            ``1 / sqrt(2)`` of it.
        time_step_ns: Step of the time stamps.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    name: str = "custom"
    crystals_per_ring: int = 180
    num_rings: int = 16
    radius_mm: float = 64.0
    axial_pitch_mm: float = 2.2
    crystal_depth_mm: float = 13.0
    attenuation_per_mm: float = 0.083
    photofraction: float = 0.34
    packing_fraction: float = 1.0
    energy_resolution: float = 0.12
    energy_window_kev: tuple[float, float] = (400.0, 600.0)
    time_resolution_ns: float = 0.5
    time_step_ns: float = 1.0

    def __post_init__(self) -> None:
        if self.crystals_per_ring < 4 or self.crystals_per_ring % 2:
            raise ValueError(
                f"crystals_per_ring={self.crystals_per_ring}: use an even number of at least 4, so that every crystal "
                "has an opposite one"
            )
        if self.num_rings < 1:
            raise ValueError(f"num_rings={self.num_rings}: must be at least 1")
        for key in ("radius_mm", "axial_pitch_mm", "crystal_depth_mm", "attenuation_per_mm", "time_step_ns"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}={getattr(self, key)}: must be above 0")
        for key in ("photofraction", "packing_fraction"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be between 0 and 1")
        if self.energy_resolution < 0 or self.time_resolution_ns < 0:
            raise ValueError("energy_resolution and time_resolution_ns must not be negative")
        low, high = self.energy_window_kev
        if not low < high:
            raise ValueError(f"energy_window_kev={self.energy_window_kev}: the lower limit comes first")

    @property
    def num_crystals(self) -> int:
        """Crystals in all."""
        return self.crystals_per_ring * self.num_rings

    @property
    def half_length_mm(self) -> float:
        """Half of the axial field of view."""
        return self.num_rings * self.axial_pitch_mm / 2

    def crystal(self, ring: np.ndarray, position: np.ndarray) -> np.ndarray:
        """Number of the crystals at places in rings; positions wrap around."""
        return np.asarray(ring) * self.crystals_per_ring + np.asarray(position) % self.crystals_per_ring

    def ring(self, crystal: np.ndarray) -> np.ndarray:
        """Ring of crystals."""
        return np.asarray(crystal) // self.crystals_per_ring

    def position(self, crystal: np.ndarray) -> np.ndarray:
        """Place of crystals in their ring."""
        return np.asarray(crystal) % self.crystals_per_ring

    def opposite(self, crystal: np.ndarray) -> np.ndarray:
        """Crystal on the other side of the axis, in the same ring."""
        return self.crystal(self.ring(crystal), self.position(crystal) + self.crystals_per_ring // 2)

    def steps_apart(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Crystals from a to b along the ring, the shorter way: 0 to ``crystals_per_ring / 2``."""
        n = self.crystals_per_ring
        d = np.abs(self.position(a) - self.position(b))
        return np.minimum(d, n - d)

    def angle_degree(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Angle between crystals as seen from the axis: 0 to 180."""
        return self.steps_apart(a, b) * (360.0 / self.crystals_per_ring)

    def transaxial_mm(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Distance of crystals across the axis, the chord between their front faces."""
        return 2 * self.radius_mm * np.sin(np.pi * self.steps_apart(a, b) / self.crystals_per_ring)

    def axial_mm(self, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Distance of crystals along the axis."""
        return np.abs(self.ring(a) - self.ring(b)) * self.axial_pitch_mm

    def centres_mm(self) -> np.ndarray:
        """Centres of the front faces: (crystal, 3)."""
        c = np.arange(self.num_crystals)
        phi = 2 * np.pi * (self.position(c) + 0.5) / self.crystals_per_ring
        z = (self.ring(c) - (self.num_rings - 1) / 2) * self.axial_pitch_mm
        return np.stack([self.radius_mm * np.cos(phi), self.radius_mm * np.sin(phi), z], axis=-1)

    def locate(self, points_mm: np.ndarray) -> np.ndarray:
        """Crystal whose front face holds points on the cylinder, -1 beyond its ends.

        Args:
            points_mm: (..., 3).
        """
        phi = np.arctan2(points_mm[..., 1], points_mm[..., 0])
        position = np.floor(phi / (2 * np.pi) * self.crystals_per_ring).astype(np.int64)
        ring = np.floor((points_mm[..., 2] + self.half_length_mm) / self.axial_pitch_mm).astype(np.int64)
        inside = (ring >= 0) & (ring < self.num_rings)
        return np.where(inside, self.crystal(ring, position), -1)

    def opposite_window(self, spread: int, rings: int | None = None) -> np.ndarray:
        """Crystals near the opposite one.

        Args:
            spread: Positions around the ring, at most.
            rings: Rings along the axis, at most; None: ``spread``.

        Returns:
            (crystal, (2 spread + 1) (2 rings + 1)), or (crystal, 2 spread + 1) with one ring; -1 beyond the ends of the
            scanner.
        """
        if not 0 <= spread < self.crystals_per_ring // 2:
            raise ValueError(f"spread={spread}: use 0 to {self.crystals_per_ring // 2 - 1} crystals")
        c = np.arange(self.num_crystals)
        along = np.arange(-spread, spread + 1)
        reach = 0 if self.num_rings == 1 else spread if rings is None else rings
        axial = np.arange(-reach, reach + 1)
        ring = self.ring(c)[:, None, None] + axial[None, :, None]
        position = self.position(c)[:, None, None] + self.crystals_per_ring // 2 + along[None, None, :]
        found = np.where((ring >= 0) & (ring < self.num_rings), self.crystal(ring, position), -1)
        return found.reshape(self.num_crystals, -1)

    def lines_of_response(self, spread: int, rings: int | None = None) -> np.ndarray:
        """Pairs of crystals that face each other within `opposite_window`, each once: (line, 2), a < b."""
        window = self.opposite_window(spread, rings)
        a = np.repeat(np.arange(self.num_crystals), window.shape[1])
        b = window.reshape(-1)
        keep = (b >= 0) & (a < b)
        return np.stack([a[keep], b[keep]], axis=-1)


PRESETS = {
    "toy24": Scanner("toy24", crystals_per_ring=24, num_rings=1, radius_mm=64.0, axial_pitch_mm=13.0),
    "clinical240": Scanner(
        "clinical240", crystals_per_ring=240, num_rings=1, radius_mm=400.0, axial_pitch_mm=4.0, crystal_depth_mm=20.0
    ),
    "safir2880": Scanner("safir2880"),
    "biograph": Scanner(
        "biograph", crystals_per_ring=672, num_rings=52, radius_mm=421.0, axial_pitch_mm=4.06, crystal_depth_mm=20.0,
        energy_window_kev=(435.0, 650.0), energy_resolution=0.115,
    ),
}  # fmt: skip
"""Scanners by name: a ring of 24 for tests, the paper's clinical-like and SAFIR-like systems, a clinical one."""


def make_scanner(preset: str, **changes: object) -> Scanner:
    """A preset with some of its values changed.

    Args:
        preset: One of `PRESETS`.
        **changes: Values by name; None keeps that of the preset.

    Raises:
        ValueError: For an unknown preset or value.
    """
    if preset not in PRESETS:
        raise ValueError(f"scanner={preset!r} is unknown; choose {', '.join(PRESETS)}")
    known = {field.name for field in fields(Scanner)}
    if unknown := sorted(set(changes) - known):
        raise ValueError(f"a scanner has no {unknown[0]!r}; it has {', '.join(sorted(known))}")
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in changes.items() if v is not None}
    return replace(PRESETS[preset], **given)
