"""Classical sorters as they are compared with networks: window and angle chosen on the validation part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from physics.pet.coincidences import POLICIES, Good, gate_policy, single_window
from physics.pet.hits import Hits, Pairs, true_pairs
from physics.pet.matching import count_pairs, precision_recall_f1
from physics.pet.scanner import Scanner

PAPER_WINDOW = 8
SINGLE_WINDOW = ("scw_paper", "scw_raw", "scw_raw_geometry", "scw", "scw_geometry")
"""Single window: as published (8 steps), with the best window, with an angle, on times without delays, with both."""
SORTERS = (*SINGLE_WINDOW, *POLICIES)


@dataclass(frozen=True)
class Sorter:
    """A classical algorithm with its settings.

    Args:
        name: One of `SORTERS`; GATE's policies are named as they are and work on times without delays.
        window: Steps.
        min_angle_degree: Least angle between the crystals of a pair.
    """

    name: str
    window: int
    min_angle_degree: float = 0.0

    @property
    def calibrated(self) -> bool:
        """Whether it works on times from which delays were taken off."""
        return not (self.name == "scw_paper" or self.name.startswith("scw_raw"))

    def find(self, hits: Hits, scanner: Scanner) -> Pairs:
        """Pairs of ``hits``, which are as `calibrated` says."""
        good = Good.by_angle(scanner, self.min_angle_degree)
        if self.name in POLICIES:
            return gate_policy(hits, scanner, self.window, self.name, good)
        pairs = single_window(hits, self.window)
        return pairs.where(good.mask(scanner, hits, pairs)) if self.min_angle_degree else pairs


def tuned(
    name: str, raw: Hits, aligned: Hits, scanner: Scanner, windows: Sequence[int], angles: Sequence[float]
) -> Sorter:
    """The sorter with the window and angle of the largest F1 on these hits.

    Args:
        name: One of `SORTERS`.
        raw: Recorded hits.
        aligned: The same without delays.
        scanner: Their scanner.
        windows: Steps to choose from; sorters of raw times also try wider ones.
        angles: Least angles to choose from, degrees.

    Raises:
        ValueError: For an unknown name.
    """
    if name not in SORTERS:
        raise ValueError(f"model.baselines names {name!r}, which is unknown; choose {', '.join(SORTERS)}")
    sorter = Sorter(name, PAPER_WINDOW)
    if name == "scw_paper":
        return sorter
    hits = aligned if sorter.calibrated else raw
    tried = sorted(set(windows) | (set() if sorter.calibrated else set(range(1, 13))))
    num_true = len(true_pairs(hits).first)
    best, best_f1 = sorter, -1.0
    for window in tried:
        for angle in angles if name in POLICIES or name.endswith("geometry") else (0.0,):
            candidate = replace(sorter, window=window, min_angle_degree=angle)
            counts = count_pairs(hits, candidate.find(hits, scanner), num_true)
            f1 = precision_recall_f1(counts.correct, counts.pairs, counts.true)[2]
            if f1 > best_f1:
                best, best_f1 = candidate, f1
    return best


def counts_by_sample(hits: Hits, found: Pairs, true: Pairs) -> np.ndarray:
    """Correct, found and true pairs of every sample, (sample, 3)."""
    same = (hits.decay[found.first] == hits.decay[found.second]) & (hits.decay[found.first] >= 0)
    size = hits.num_samples
    sample = hits.sample[found.first]
    return np.stack(
        [
            np.bincount(sample[same], minlength=size),
            np.bincount(sample, minlength=size),
            np.bincount(hits.sample[true.first], minlength=size),
        ],
        -1,
    )
