"""Hits in list mode with what a simulation knows about them, and their true coincidences."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np

NO_DECAY = -1
"""Decay of hits that no annihilation made: dark counts, background of the crystals, files without truth."""


class Pairs(NamedTuple):
    """Coincidences as rows of `Hits`: ``first`` and ``second``, in the order of time, (pair,) int64 each."""

    first: np.ndarray
    second: np.ndarray

    def where(self, keep: np.ndarray) -> Pairs:
        """Some of the pairs."""
        return Pairs(self.first[keep], self.second[keep])


@dataclass(frozen=True)
class Hits:
    """Single hits of several samples, ordered by sample and step.

    Args:
        sample: Sample of every hit, (hit,) int64.
        crystal: 0 to ``num_crystals - 1``, (hit,) int64.
        step: Recorded time in steps, 0 to ``num_steps - 1``, (hit,) int64.
        decay: The annihilation that made the hit, unlike that of any other sample; `NO_DECAY`: none. (hit,) int64.
        true_step: Time of the decay in steps of the sample, (hit,) int64; may lie outside of it.
        energy_kev: Measured energy, (hit,).
        scattered: Whether the photon has changed its direction before it was detected, (hit,) bool.
        num_samples: Samples, empty ones included.
        num_crystals: Crystals of the scanner.
        num_steps: Steps T of a sample.
    """

    sample: np.ndarray
    crystal: np.ndarray
    step: np.ndarray
    decay: np.ndarray
    true_step: np.ndarray
    energy_kev: np.ndarray
    scattered: np.ndarray
    num_samples: int
    num_crystals: int
    num_steps: int

    def __len__(self) -> int:
        return len(self.sample)

    @classmethod
    def columns(cls) -> tuple[str, ...]:
        """Names of the values of every hit."""
        return tuple(field.name for field in fields(cls) if not field.name.startswith("num_"))

    def rows(self, chosen: np.ndarray) -> Hits:
        """Some hits, by mask or number, in their order."""
        return replace(self, **{name: getattr(self, name)[chosen] for name in self.columns()})

    def sorted(self) -> Hits:
        """The same in the order of sample and step; of equal ones in the order in which they are."""
        order = np.lexsort((self.step, self.sample))
        return self if (order[1:] > order[:-1]).all() else self.rows(order)

    def samples(self, first: int, stop: int) -> Hits:
        """The samples from ``first`` to ``stop - 1``, numbered from 0."""
        begin, end = np.searchsorted(self.sample, [first, stop])
        part = self.rows(np.arange(begin, end))
        return replace(part, sample=part.sample - first, num_samples=stop - first)

    def shifted(self, delays: np.ndarray) -> Hits:
        """Recorded times with the delay of every crystal added, in the order of the new times.

        Steps may then lie outside of ``[0, T)``.

        Args:
            delays: Whole steps by crystal, (crystal,).
        """
        if len(delays) != self.num_crystals:
            raise ValueError(f"{len(delays)} delays for {self.num_crystals} crystals")
        shifts = np.asarray(delays)
        if not np.array_equal(shifts, np.rint(shifts)):
            raise ValueError("delays must be whole steps; round them")
        return replace(self, step=self.step + shifts.astype(np.int64)[self.crystal]).sorted()

    def check(self) -> Hits:
        """Return self if everything is inside of its range and in order.

        Raises:
            ValueError: Names what is wrong, with the first such hit.
        """
        for name, values, size in (
            ("sample", self.sample, self.num_samples),
            ("crystal", self.crystal, self.num_crystals),
            ("step", self.step, self.num_steps),
        ):
            wrong = (values < 0) | (values >= size)
            if wrong.any():
                i = int(wrong.argmax())
                raise ValueError(f"hit {i}: {name} {values[i]} is not in 0..{size - 1}")
        later = self.sample * self.num_steps + self.step
        if (np.diff(later) < 0).any():
            raise ValueError("hits must be ordered by sample and step; use Hits.sorted()")
        return self


def true_pairs(hits: Hits) -> Pairs:
    """Hits that two photons of one decay made, in the same sample.

    Decays with more than two hits (scatter from crystal to crystal) give the pair of their first two.
    """
    known = np.flatnonzero(hits.decay != NO_DECAY)
    order = known[np.lexsort((known, hits.decay[known], hits.sample[known]))]
    d, s = hits.decay[order], hits.sample[order]
    same = (d[1:] == d[:-1]) & (s[1:] == s[:-1])
    first_of_decay = np.concatenate([[True], ~same])[:-1] if len(same) else same
    at = np.flatnonzero(same & first_of_decay)
    return Pairs(order[at], order[at + 1])


def concatenate(parts: list[Hits]) -> Hits:
    """Samples of several simulations one after the other, with decays renumbered."""
    sample = decay = 0
    moved = []
    for part in parts:
        known = part.decay != NO_DECAY
        new = np.where(known, part.decay + decay, NO_DECAY)
        moved.append(replace(part, sample=part.sample + sample, decay=new))
        sample += part.num_samples
        decay += int(part.decay.max(initial=-1)) + 1
    joined = {name: np.concatenate([getattr(part, name) for part in moved]) for name in Hits.columns()}
    return replace(parts[0], **joined, num_samples=sample)
