"""Scanners: one-to-one numbering, distances, what faces what."""

from __future__ import annotations

import numpy as np
import pytest

from physics.pet.scanner import PRESETS, Scanner, make_scanner


@pytest.mark.parametrize("name", PRESETS)
def test_numbering_is_one_to_one(name):
    scanner = PRESETS[name]
    ring, position = np.meshgrid(np.arange(scanner.num_rings), np.arange(scanner.crystals_per_ring), indexing="ij")
    numbers = scanner.crystal(ring, position)
    assert len(np.unique(numbers)) == scanner.num_crystals == numbers.size
    assert (scanner.ring(numbers) == ring).all() and (scanner.position(numbers) == position).all()


@pytest.mark.parametrize("name", ["toy24", "safir2880"])
def test_centres_are_found_again(name):
    scanner = PRESETS[name]
    centres = scanner.centres_mm()
    assert (scanner.locate(centres) == np.arange(scanner.num_crystals)).all()
    assert np.allclose(np.hypot(centres[:, 0], centres[:, 1]), scanner.radius_mm)
    beyond = centres + np.array([0, 0, 2 * scanner.half_length_mm])
    assert (scanner.locate(beyond) == -1).all()


def test_distances_are_those_of_the_centres():
    scanner = PRESETS["safir2880"]
    rng = np.random.default_rng(0)
    a, b = rng.integers(scanner.num_crystals, size=(2, 500))
    apart = scanner.centres_mm()[a] - scanner.centres_mm()[b]
    assert np.allclose(scanner.transaxial_mm(a, b), np.hypot(apart[:, 0], apart[:, 1]))
    assert np.allclose(scanner.axial_mm(a, b), np.abs(apart[:, 2]))


def test_opposite_crystals_face_each_other():
    scanner = PRESETS["safir2880"]
    c = np.arange(scanner.num_crystals)
    opposite = scanner.opposite(c)
    assert (scanner.opposite(opposite) == c).all()
    assert np.allclose(scanner.angle_degree(c, opposite), 180) and np.allclose(scanner.axial_mm(c, opposite), 0)


def test_windows_wrap_around_and_end_at_the_ends():
    scanner = PRESETS["safir2880"]
    window = scanner.opposite_window(2)
    assert window.shape == (2880, 25)
    inner = window[8 * 180]
    assert (inner >= 0).all() and (scanner.steps_apart(8 * 180, inner) >= 88).all()
    assert (window[0] >= 0).sum() == 15  # three of five rings
    assert set(scanner.position(window[0][window[0] >= 0])) == {88, 89, 90, 91, 92}


def test_lines_of_response():
    ring = make_scanner("clinical240")
    lines = ring.lines_of_response(2)
    assert len(lines) == 240 * 5 // 2 and len(np.unique(lines, axis=0)) == 600
    assert (lines[:, 0] < lines[:, 1]).all() and (ring.steps_apart(*lines.T) >= 118).all()
    safir = make_scanner("safir2880")
    assert len(safir.lines_of_response(1, rings=15)) == 2880 * 3 * 16 // 2  # any two rings


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"crystals_per_ring": 23}, "even"),
        ({"num_rings": 0}, "num_rings=0"),
        ({"radius_mm": -1.0}, "radius_mm"),
        ({"photofraction": 1.5}, "photofraction"),
        ({"energy_window_kev": (600.0, 400.0)}, "energy_window_kev"),
        ({"radius": 3.0}, "no 'radius'"),
    ],
)
def test_wrong_values(changes, words):
    with pytest.raises(ValueError, match=words):
        make_scanner("toy24", **changes)


def test_unknown_preset():
    with pytest.raises(ValueError, match="choose toy24"):
        make_scanner("nope")
    with pytest.raises(ValueError, match="spread"):
        Scanner().opposite_window(90)
