"""Delays of crystals from hits without labels."""

from __future__ import annotations

import numpy as np
import pytest

from physics.pet.calibration import estimate_delays
from physics.pet.scanner import make_scanner
from physics.pet.toy import Toy, draw_delays, simulate_toy

SCANNER = make_scanner("toy24")


def simulated(samples, delays):
    return simulate_toy(SCANNER, Toy(num_steps=100, rate=2.0, efficiency=0.3, delay_trials=8), samples, delays, 1)


def test_delays_are_found_up_to_their_median():
    delays = draw_delays(24, 8, 0.5, 3)
    hits = simulated(6000, delays)
    found = estimate_delays(hits, SCANNER, median_delay=float(np.median(delays)))
    assert (np.rint(found) == delays).all()
    moved = estimate_delays(hits, SCANNER, median_delay=20.0)
    assert np.allclose(moved - found, 20 - np.median(delays))


def test_crystals_without_hits_get_the_median():
    delays = np.full(24, 4)
    hits = simulated(2000, delays)
    hits = hits.rows(hits.crystal != 7)
    assert estimate_delays(hits, SCANNER, median_delay=4.0)[7] == 4


def test_nothing_to_calibrate_with():
    hits = simulated(50, np.full(24, 4))
    with pytest.raises(ValueError, match="more samples"):
        estimate_delays(hits.rows(hits.crystal < 3), SCANNER, median_delay=4.0)
