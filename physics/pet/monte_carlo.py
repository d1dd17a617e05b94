"""Hits of a scanner from decays in an object: photons, scatter, crystals, clocks (section 6). Vectorised and seeded."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from physics.pet.compton import ELECTRON_KEV, perpendicular, remaining_share, sample_cosine, turned
from physics.pet.hits import NO_DECAY, Hits
from physics.pet.scanner import SPEED_OF_LIGHT_MM_NS, Scanner
from physics.pet.sources import Source

FWHM = 2 * math.sqrt(2 * math.log(2))
"""Full width at half maximum of a Gaussian, in deviations."""
DeadTime = Literal["none", "paralysable", "non_paralysable"]


@dataclass(frozen=True)
class Acquisition:
    """What is measured, and which effects count.

    Args:
        activity_bq: Decays per second that make two photons.
        source: Where.
        object_radius_mm: Radius of the cylinder of water around the axis that attenuates and scatters; 0: none.
        object_half_height_mm: Half of its length.
        attenuation_per_mm: Of the object, 0.0096 in water at 511 keV.
        max_scatters: Scatters of a photon in the object, at most; later ones do not happen.
        half_life_s: Of the tracer; None: the activity is constant.
        positron_range_mm: Mean distance from decay to annihilation, exponential; 0.6 for 18F.
        acollinearity_degree: Width (FWHM) of the angle by which photons miss being back to back.
        crystal_scatter: Probability that the rest of a Compton deposit stays in the next crystal around the ring; the
            sum is then recorded in that of the two with more energy.
        perfect: All photons that reach the cylinder are recorded with 511 keV, in any order of depth.
        dead_time_ns: Of a crystal.
        dead_time: ``none``, ``paralysable`` (every hit blocks) or ``non_paralysable`` (recorded hits block).
        dark_rate_hz: Hits of a crystal per second that no decay makes.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    activity_bq: float = 3e8
    source: Source = field(default_factory=Source)
    object_radius_mm: float = 16.0
    object_half_height_mm: float = 15.0
    attenuation_per_mm: float = 0.0096
    max_scatters: int = 1
    half_life_s: float | None = None
    positron_range_mm: float = 0.6
    acollinearity_degree: float = 0.5
    crystal_scatter: float = 0.0
    perfect: bool = False
    dead_time_ns: float = 0.0
    dead_time: DeadTime = "none"
    dark_rate_hz: float = 0.0

    def __post_init__(self) -> None:
        if not self.activity_bq > 0:
            raise ValueError(f"activity_bq={self.activity_bq}: must be above 0")
        for key in (
            "object_radius_mm", "object_half_height_mm", "attenuation_per_mm", "max_scatters", "positron_range_mm",
            "acollinearity_degree", "dead_time_ns", "dark_rate_hz",
        ):  # fmt: skip
            if getattr(self, key) < 0:
                raise ValueError(f"{key}={getattr(self, key)}: must not be negative")
        if self.half_life_s is not None and not self.half_life_s > 0:
            raise ValueError(f"half_life_s={self.half_life_s}: must be above 0, or null")
        if not 0 <= self.crystal_scatter <= 1:
            raise ValueError(f"crystal_scatter={self.crystal_scatter}: must be between 0 and 1")
        if self.dead_time not in ("none", "paralysable", "non_paralysable"):
            raise ValueError(f"dead_time={self.dead_time!r} is unknown; choose none, paralysable, non_paralysable")


class Stream(NamedTuple):
    """Hits in the order of their recorded times, (hit,) each, and how many decays there were."""

    time_ns: np.ndarray
    crystal: np.ndarray
    energy_kev: np.ndarray
    decay: np.ndarray
    decay_time_ns: np.ndarray
    scattered: np.ndarray
    num_decays: int
    duration_ns: float


class Photons(NamedTuple):
    """Photons on their way: places and directions (photon, 3), energies, path so far, decay, whether scattered."""

    place: np.ndarray
    direction: np.ndarray
    energy_kev: np.ndarray
    path_mm: np.ndarray
    decay: np.ndarray
    scattered: np.ndarray


CHUNK = 1 << 18
"""Decays that are simulated at once: what fits into the caches and bounds the memory."""


def simulate(scanner: Scanner, acquisition: Acquisition, duration_ns: float, delays: np.ndarray, seed: int) -> Stream:
    """Simulate hits of a stretch of time.

    Args:
        scanner: Geometry, crystals and clocks.
        acquisition: Activity, object, effects.
        duration_ns: Length of the measurement.
        delays: Steps by crystal; a hit is recorded so much earlier.
        seed: Of everything drawn.
    """
    if not duration_ns > 0:
        raise ValueError(f"duration_ns={duration_ns}: must be above 0")
    rng = np.random.default_rng(seed)
    times = decay_times(acquisition, duration_ns, rng)
    parts = []
    for begin in range(0, len(times), CHUNK):
        some = times[begin : begin + CHUNK]
        photons = scatter(annihilate(acquisition, len(some), rng), acquisition, rng)
        parts.append(_detect(scanner, acquisition, photons, some, begin, rng))
    parts.append(_dark_counts(scanner, acquisition, duration_ns, rng))
    time, crystal, energy, decay, decayed, scattered = (np.concatenate(column) for column in zip(*parts, strict=True))
    jitter = rng.normal(0, scanner.time_resolution_ns / math.sqrt(2) / FWHM, len(time)) if len(time) else time
    time = time + jitter
    order = np.argsort(time, kind="stable")
    keep = order[_alive(time[order], crystal[order], acquisition)]
    time = time - np.asarray(delays)[crystal] * scanner.time_step_ns
    keep = keep[np.argsort(time[keep], kind="stable")]
    return Stream(
        time[keep], crystal[keep], energy[keep], decay[keep], decayed[keep], scattered[keep], len(times), duration_ns
    )


def decay_times(acquisition: Acquisition, duration_ns: float, rng: np.random.Generator) -> np.ndarray:
    """Times of decays in ns, a Poisson process whose rate falls with the half life."""
    if acquisition.half_life_s is None:
        count = rng.poisson(acquisition.activity_bq * duration_ns * 1e-9)
        return np.sort(rng.uniform(0, duration_ns, count))
    mean_life = acquisition.half_life_s * 1e9 / math.log(2)
    decayed = -math.expm1(-duration_ns / mean_life)
    count = rng.poisson(acquisition.activity_bq * 1e-9 * mean_life * decayed)
    return np.sort(-mean_life * np.log1p(-rng.random(count) * decayed))


def annihilate(acquisition: Acquisition, count: int, rng: np.random.Generator) -> Photons:
    """Two photons of each of ``count`` decays; those of decay i are i and ``count + i``."""
    place = acquisition.source.sample(count, rng)
    if acquisition.positron_range_mm:
        away = isotropic(count, rng) * rng.exponential(acquisition.positron_range_mm, count)[:, None]
        place = place + away
    forth = isotropic(count, rng)
    back = -forth
    if acquisition.acollinearity_degree:
        sigma = math.radians(acquisition.acollinearity_degree) / FWHM
        first, second = perpendicular(back)
        back = back + rng.normal(0, sigma, (count, 1)) * first + rng.normal(0, sigma, (count, 1)) * second
        back /= np.linalg.norm(back, axis=-1, keepdims=True)
    return Photons(
        np.concatenate([place, place]), np.concatenate([forth, back]), np.full(2 * count, ELECTRON_KEV),
        np.zeros(2 * count), np.tile(np.arange(count), 2), np.zeros(2 * count, dtype=bool),
    )  # fmt: skip


def isotropic(count: int, rng: np.random.Generator) -> np.ndarray:
    """Unit vectors in all directions alike, (count, 3)."""
    z, phi = rng.uniform(-1, 1, count), rng.uniform(0, 2 * np.pi, count)
    r = np.sqrt(1 - z * z)
    return np.stack([r * np.cos(phi), r * np.sin(phi), z], -1)


def to_cylinder(place: np.ndarray, direction: np.ndarray, radius_mm: float) -> np.ndarray:
    """Distance from places inside of an endless cylinder around z to its surface, (n,); infinite along the axis."""
    a = direction[:, 0] ** 2 + direction[:, 1] ** 2
    b = place[:, 0] * direction[:, 0] + place[:, 1] * direction[:, 1]
    c = place[:, 0] ** 2 + place[:, 1] ** 2 - radius_mm**2
    with np.errstate(divide="ignore", invalid="ignore"):
        distance = (-b + np.sqrt(np.maximum(b * b - a * c, 0))) / a
    return np.where(a > 1e-12, distance, np.inf)


def path_in_object(place: np.ndarray, direction: np.ndarray, radius_mm: float, half_height_mm: float) -> np.ndarray:
    """Length of the way out of a cylinder with ends, (n,); 0 for places outside of it."""
    inside = (np.hypot(place[:, 0], place[:, 1]) < radius_mm) & (np.abs(place[:, 2]) < half_height_mm)
    with np.errstate(divide="ignore"):
        ends = (np.copysign(half_height_mm, direction[:, 2]) - place[:, 2]) / direction[:, 2]
    return np.where(inside, np.minimum(to_cylinder(place, direction, radius_mm), np.abs(ends)), 0.0)


def scatter(photons: Photons, acquisition: Acquisition, rng: np.random.Generator) -> Photons:
    """Photons as they leave the object: a share ``1 - exp(-mu L)`` has been scattered on the way."""
    mu, radius, half = (
        acquisition.attenuation_per_mm, acquisition.object_radius_mm, acquisition.object_half_height_mm,
    )  # fmt: skip
    if not (mu and radius and half):
        return photons
    place, direction, energy, path, decay, scattered = (values.copy() for values in photons)
    inside = np.arange(len(energy))
    for _ in range(acquisition.max_scatters):
        length = path_in_object(place[inside], direction[inside], radius, half)
        # Where the next interaction is, if the object were endless.
        free = rng.exponential(1 / mu, len(inside))
        hit = free < length
        inside, free = inside[hit], free[hit]
        if not len(inside):
            break
        place[inside] += free[:, None] * direction[inside]
        path[inside] += free
        cosine = sample_cosine(energy[inside], rng)
        energy[inside] *= remaining_share(cosine, energy[inside])
        direction[inside] = turned(direction[inside], cosine, rng)
        scattered[inside] = True
    return Photons(place, direction, energy, path, decay, scattered)


def _detect(
    scanner: Scanner, acquisition: Acquisition, photons: Photons, times: np.ndarray, first: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, ...]:  # fmt: skip
    """Time, crystal, energy, decay, its time and scatter of the photons that are recorded."""
    # Most photons miss the scanner: they go first.
    distance = to_cylinder(photons.place, photons.direction, scanner.radius_mm)
    reach = np.abs(photons.place[:, 2] + distance * photons.direction[:, 2]) < scanner.half_length_mm
    rows = np.flatnonzero(reach)
    point = photons.place[rows] + distance[rows, None] * photons.direction[rows]
    crystal, energy = scanner.locate(point), photons.energy_kev[rows]
    if not acquisition.perfect:
        stops = -math.expm1(-scanner.attenuation_per_mm * scanner.crystal_depth_mm) * scanner.packing_fraction
        seen = rng.random(len(rows)) < stops
        rows, crystal, energy = rows[seen], crystal[seen], energy[seen].copy()
        partial = np.flatnonzero(rng.random(len(rows)) >= scanner.photofraction)
        deposit = energy[partial] * (1 - remaining_share(sample_cosine(energy[partial], rng), energy[partial]))
        if acquisition.crystal_scatter:
            stays = rng.random(len(partial)) < acquisition.crystal_scatter
            moved = stays & (deposit < energy[partial] / 2)
            side = rng.choice([-1, 1], len(partial))
            beside = scanner.crystal(scanner.ring(crystal[partial]), scanner.position(crystal[partial]) + side)
            crystal[partial] = np.where(moved, beside, crystal[partial])
            deposit = np.where(stays, energy[partial], deposit)
        energy[partial] = deposit
        sigma = scanner.energy_resolution / FWHM * np.sqrt(np.maximum(energy, 0) * ELECTRON_KEV)
        energy = energy + sigma * rng.normal(size=len(energy))
        low, high = scanner.energy_window_kev
        kept = (energy >= low) & (energy <= high)
        rows, crystal, energy = rows[kept], crystal[kept], energy[kept]
    decay = photons.decay[rows]
    flight = (photons.path_mm[rows] + distance[rows]) / SPEED_OF_LIGHT_MM_NS
    return times[decay] + flight, crystal, energy, first + decay, times[decay], photons.scattered[rows]


def _dark_counts(
    scanner: Scanner, acquisition: Acquisition, duration_ns: float, rng: np.random.Generator
) -> tuple[np.ndarray, ...]:
    count = rng.poisson(acquisition.dark_rate_hz * duration_ns * 1e-9 * scanner.num_crystals)
    time = rng.uniform(0, duration_ns, count)
    return (
        time, rng.integers(scanner.num_crystals, size=count), rng.uniform(*scanner.energy_window_kev, count),
        np.full(count, NO_DECAY), time, np.zeros(count, dtype=bool),
    )  # fmt: skip


def _alive(time: np.ndarray, crystal: np.ndarray, acquisition: Acquisition) -> np.ndarray:
    """Rows, of hits in the order of time, that dead time leaves, in that order."""
    everything = np.arange(len(time))
    if acquisition.dead_time == "none" or not acquisition.dead_time_ns or not len(time):
        return everything
    order = np.lexsort((time, crystal))
    t, c = time[order], crystal[order]
    starts = np.concatenate([[True], c[1:] != c[:-1]])
    if acquisition.dead_time == "paralysable":
        alive = starts | np.concatenate([[True], np.diff(t) >= acquisition.dead_time_ns])
    else:
        # From the first hit of every crystal to the next one that it does not block, all crystals at once.
        span = t[-1] if len(t) == 1 else t.max() - t.min() + 2 * acquisition.dead_time_ns
        line = t - t.min() + c * span
        following = np.searchsorted(line, line + acquisition.dead_time_ns)
        alive = np.zeros(len(t), dtype=bool)
        now = np.flatnonzero(starts)
        while len(now):
            alive[now] = True
            after = following[now]
            stays = after < len(t)
            now, after = now[stays], after[stays]
            now = after[c[after] == c[now]]
    return np.sort(order[alive])


class Cut(NamedTuple):
    """Samples of a stream, and how many true pairs lie in no sample together."""

    hits: Hits
    lost_pairs: int


def cut(stream: Stream, scanner: Scanner, num_steps: int, overlap: int = 0) -> Cut:
    """Discretise times and cut a stream into samples of ``num_steps`` steps.

    Hits in the overlap of two samples are in both. A true pair is lost if no sample has both of its hits.

    Args:
        stream: Hits.
        scanner: For the step of its clock.
        num_steps: Steps of a sample.
        overlap: Steps that a sample shares with the next one.
    """
    if not 0 <= overlap < num_steps:
        raise ValueError(f"overlap={overlap}: use 0 to {num_steps - 1} steps")
    stride = num_steps - overlap
    step = np.floor(stream.time_ns / scanner.time_step_ns).astype(np.int64)
    true_step = np.floor(stream.decay_time_ns / scanner.time_step_ns).astype(np.int64)
    num_samples = max(1, int((stream.duration_ns / scanner.time_step_ns - overlap) // stride))
    rows, samples = [], []
    latest = np.floor_divide(step, stride)
    for back in range(math.ceil(num_steps / stride)):
        sample = latest - back
        inside = (sample >= 0) & (sample < num_samples) & (step - sample * stride < num_steps)
        rows.append(np.flatnonzero(inside))
        samples.append(sample[inside])
    row, sample = np.concatenate(rows), np.concatenate(samples)
    hits = Hits(
        sample=sample,
        crystal=stream.crystal[row],
        step=step[row] - sample * stride,
        decay=stream.decay[row],
        true_step=true_step[row] - sample * stride,
        energy_kev=stream.energy_kev[row],
        scattered=stream.scattered[row],
        num_samples=num_samples,
        num_crystals=scanner.num_crystals,
        num_steps=num_steps,
    ).sorted()
    return Cut(hits, _lost_pairs(stream, hits, stride * (num_samples - 1) + num_steps, step))


def _lost_pairs(stream: Stream, hits: Hits, end: int, step: np.ndarray) -> int:
    """True pairs within the samples' stretch of time, less those that are in a sample together."""
    within = (step >= 0) & (step < end) & (stream.decay != NO_DECAY)
    pairs = int((np.bincount(stream.decay[within], minlength=1) > 1).sum())
    known = np.flatnonzero(hits.decay != NO_DECAY)
    key = np.stack([hits.decay[known], hits.sample[known]], -1)
    together, counts = np.unique(key, axis=0, return_counts=True)
    return pairs - len(np.unique(together[counts > 1, 0]))
