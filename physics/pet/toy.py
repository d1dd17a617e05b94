"""The paper's simulation: random decays, opposite crystals, a fixed delay of each, nothing else (section 2.2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from physics.pet.hits import Hits
from physics.pet.scanner import Scanner


@dataclass(frozen=True)
class Toy:
    """What the toy draws.

    Args:
        num_steps: Steps T of a sample.
        rate: Mean number of decays in a sample; samples without one get one.
        efficiency: Probability that a photon is detected, the same for all.
        spread: The second photon hits a crystal at most so far from the opposite one, in both directions.
        delay_trials: Delays of crystals are binomial with so many trials ...
        delay_probability: ... of this probability.
        mirrored: Take ``N - i`` as the opposite of i, as the reference code does: a mirror image, no antipode.

    Raises:
        ValueError: Names the argument and the remedy.
    """

    num_steps: int = 1000
    rate: float = 20.0
    efficiency: float = 0.141
    spread: int = 2
    delay_trials: int = 20
    delay_probability: float = 0.5
    mirrored: bool = False

    def __post_init__(self) -> None:
        if self.num_steps <= self.delay_trials:
            raise ValueError(f"num_steps={self.num_steps}: must be more than the largest delay, {self.delay_trials}")
        if not self.rate > 0:
            raise ValueError(f"rate={self.rate}: must be above 0")
        for key in ("efficiency", "delay_probability"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"{key}={getattr(self, key)}: must be between 0 and 1")
        if self.delay_trials < 0 or self.spread < 0:
            raise ValueError("delay_trials and spread must not be negative")


def draw_delays(num_crystals: int, trials: int, probability: float, seed: int) -> np.ndarray:
    """Delay of every crystal in steps, the same for all samples: (crystal,) int64."""
    return np.random.default_rng((seed, 0xDE1A)).binomial(trials, probability, num_crystals)


def simulate_toy(scanner: Scanner, toy: Toy, num_samples: int, delays: np.ndarray, seed: int) -> Hits:
    """Draw samples of the toy; a hit of a decay at step t is recorded at ``t - delay``.

    Args:
        scanner: Its crystals.
        toy: What to draw.
        num_samples: How many samples.
        delays: Steps by crystal (`draw_delays`).
        seed: Of the samples.
    """
    rng = np.random.default_rng(seed)
    earliest = int(delays.max(initial=0))
    decays = np.maximum(rng.poisson(toy.rate, num_samples), 1)
    total = int(decays.sum())
    sample = np.repeat(np.arange(num_samples), decays)
    step = rng.integers(earliest, toy.num_steps, total)
    n = scanner.crystals_per_ring
    ring, position = rng.integers(scanner.num_rings, size=total), rng.integers(n, size=total)
    facing = n - position if toy.mirrored else position + n // 2
    facing = facing + rng.integers(-toy.spread, toy.spread + 1, total)
    low, high = np.maximum(ring - toy.spread, 0), np.minimum(ring + toy.spread, scanner.num_rings - 1)
    crystals = np.stack([scanner.crystal(ring, position), scanner.crystal(rng.integers(low, high + 1), facing)], -1)
    seen = rng.random((total, 2)) < toy.efficiency
    decay, photon = np.nonzero(seen)
    crystal = crystals[decay, photon]
    count = len(decay)
    return Hits(
        sample=sample[decay],
        crystal=crystal,
        step=step[decay] - delays[crystal],
        decay=decay,
        true_step=step[decay],
        energy_kev=np.full(count, 511.0),
        scattered=np.zeros(count, dtype=bool),
        num_samples=num_samples,
        num_crystals=scanner.num_crystals,
        num_steps=toy.num_steps,
    ).sorted()
