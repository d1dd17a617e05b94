"""The Monte Carlo against closed forms: geometry, attenuation, scatter, rates, dead time, cuts."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from physics.pet.coincidences import candidate_pairs
from physics.pet.compton import ELECTRON_KEV, klein_nishina, perpendicular, remaining_share, sample_cosine, turned
from physics.pet.hits import Hits, true_pairs
from physics.pet.monte_carlo import Acquisition, Stream, annihilate, cut, decay_times, path_in_object, scatter, simulate
from physics.pet.scanner import make_scanner
from physics.pet.sources import Source

SCANNER = make_scanner("safir2880")
NO_SKEW = np.zeros(2880, dtype=np.int64)
POINT = Source("point")
IDEAL = Acquisition(
    activity_bq=1e8, source=POINT, object_radius_mm=0.0, positron_range_mm=0.0, acollinearity_degree=0.0, perfect=True
)


def poisson_test(found, expected, deviations=4.5):
    assert abs(found - expected) < deviations * math.sqrt(expected), (found, expected)


def test_sensitivity_of_a_point_source_at_the_centre():
    stream = simulate(SCANNER, IDEAL, 2e6, NO_SKEW, 0)
    h, r = SCANNER.half_length_mm, SCANNER.radius_mm
    expected = h / math.hypot(r, h)
    share = len(stream.time_ns) / 2 / stream.num_decays
    assert share == pytest.approx(expected, rel=0.01) and expected == pytest.approx(0.2652, abs=1e-4)
    # Back to back from the centre: either both photons are recorded, or none, in crystals that face each other.
    hits = cut(stream, SCANNER, 2_000_000).hits
    pairs = true_pairs(hits)
    assert len(pairs.first) * 2 == len(hits)
    assert SCANNER.steps_apart(hits.crystal[pairs.first], hits.crystal[pairs.second]).min() == 90


def test_hits_are_spread_evenly_around_the_ring():
    stream = simulate(SCANNER, IDEAL, 5e5, NO_SKEW, 1)
    counts = np.bincount(SCANNER.position(stream.crystal), minlength=180)
    chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum() / 179
    assert 0.55 < chi2 < 1.5  # opposite crystals have the same number: 90 degrees of freedom, doubled


def test_attenuation_of_water():
    acquisition = Acquisition(source=POINT, object_radius_mm=30.0, object_half_height_mm=1e6, positron_range_mm=0.0)
    rng = np.random.default_rng(0)
    photons = annihilate(acquisition, 150_000, rng)
    flat = photons._replace(direction=photons.direction.copy())
    flat.direction[:, 2] = 0
    flat.direction[:] /= np.linalg.norm(flat.direction, axis=1, keepdims=True)
    out = scatter(flat, acquisition, rng)
    assert (~out.scattered).mean() == pytest.approx(math.exp(-0.0096 * 30), rel=0.01)
    assert (out.energy_kev[~out.scattered] == ELECTRON_KEV).all() and (out.energy_kev[out.scattered] < 511).all()
    assert np.allclose(np.linalg.norm(out.direction, axis=1), 1)


def test_paths_in_a_cylinder():
    place = np.array([[0.0, 0, 0], [3, 0, 0], [0, 0, 4], [20, 0, 0]])
    direction = np.array([[1.0, 0, 0], [-1, 0, 0], [0, 0, 1], [1, 0, 0]])
    assert np.allclose(path_in_object(place, direction, 10.0, 5.0), [10, 13, 1, 0])
    oblique = np.array([[math.sqrt(0.5), 0, math.sqrt(0.5)]])
    assert path_in_object(np.zeros((1, 3)), oblique, 10.0, 5.0) == pytest.approx(5 * math.sqrt(2))


@pytest.mark.parametrize("energy", [150.0, ELECTRON_KEV, 1200.0])
def test_angles_follow_klein_and_nishina(energy):
    rng = np.random.default_rng(1)
    cosine = sample_cosine(np.full(60_000, energy), rng)
    edges = np.linspace(-1, 1, 41)
    fine = np.linspace(-1, 1, 4001)
    mid = (fine[1:] + fine[:-1]) / 2
    density, _ = np.histogram(mid, edges, weights=klein_nishina(mid, energy))
    expected = density / density.sum() * len(cosine)
    counts, _ = np.histogram(cosine, edges)
    assert ((counts - expected) ** 2 / expected).sum() / (len(expected) - 1) < 1.5
    mean = (remaining_share(mid, energy) * klein_nishina(mid, energy)).sum() / klein_nishina(mid, energy).sum()
    assert remaining_share(cosine, energy).mean() == pytest.approx(mean, rel=0.005)


def test_known_energies_of_compton_scatter():
    assert remaining_share(np.array([1.0, 0.0, -1.0])) == pytest.approx([1, 1 / 2, 1 / 3])


def test_directions_turn_by_the_angle():
    rng = np.random.default_rng(2)
    direction = rng.normal(size=(1000, 3))
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    cosine = rng.uniform(-1, 1, 1000)
    new = turned(direction, cosine, rng)
    assert np.allclose((new * direction).sum(1), cosine) and np.allclose(np.linalg.norm(new, axis=1), 1)
    first, second = perpendicular(direction)
    gram = np.einsum("ani,bni->abn", np.stack([direction, first, second]), np.stack([direction, first, second]))
    assert np.allclose(gram, np.eye(3)[:, :, None])


def test_rate_of_decays_and_half_life():
    rng = np.random.default_rng(0)
    poisson_test(len(decay_times(Acquisition(activity_bq=1e8), 1e6, rng)), 1e5)
    short = decay_times(Acquisition(activity_bq=1e8, half_life_s=1e-3), 2e6, rng)
    mean_life = 1e-3 / math.log(2)
    poisson_test(len(short), 1e8 * mean_life * (1 - 2**-2))
    poisson_test((short < 1e6).sum(), 1e8 * mean_life * (1 - 2**-1))


def test_acollinearity_has_its_width():
    photons = annihilate(Acquisition(acollinearity_degree=0.5), 40_000, np.random.default_rng(0))
    forth, back = photons.direction[:40_000], photons.direction[40_000:]
    angle = np.degrees(np.arccos(np.clip(-(forth * back).sum(1), -1, 1)))
    # Two Gaussian components: the mean square is twice the variance of one.
    assert math.sqrt((angle**2).mean() / 2) * 2.3548 == pytest.approx(0.5, rel=0.02)


def test_rate_of_randoms():
    """Two detectors of equal singles rates S have ``2 tau S_1 S_2`` accidental pairs a second."""
    rate, duration = 2e4, 1e9
    acquisition = replace(IDEAL, activity_bq=1e-3, dark_rate_hz=rate / 1440)
    hits = cut(simulate(SCANNER, acquisition, duration, NO_SKEW, 4), SCANNER, 1_000_000_000).hits
    half = hits.crystal >= 1440
    s1, s2 = (~half).sum() / duration, half.sum() / duration
    window = 4000  # whole steps of 1 ns: differences of floors up to w have the width of w + 1/2 on either side
    pairs = candidate_pairs(hits, window)
    across = (half[pairs.first] != half[pairs.second]).sum()
    assert across == pytest.approx(2 * (window + 0.5) * s1 * s2 * duration, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "formula"),
    [("non_paralysable", lambda n, tau: n / (1 + n * tau)), ("paralysable", lambda n, tau: n * math.exp(-n * tau))],
)
def test_dead_time(kind, formula):
    scanner = make_scanner("toy24")
    rate, tau, duration = 4e5, 1000.0, 5e7
    acquisition = replace(IDEAL, activity_bq=1e-3, dark_rate_hz=rate, dead_time=kind, dead_time_ns=tau)
    stream = simulate(scanner, acquisition, duration, np.zeros(24), 5)
    expected = formula(rate * 1e-9, tau) * duration * 24
    assert len(stream.time_ns) == pytest.approx(expected, rel=0.01)
    for crystal in (0, 23):
        assert kind == "paralysable" or np.diff(stream.time_ns[stream.crystal == crystal]).min() > tau - 5


def test_time_resolution_of_pairs():
    scanner = make_scanner("safir2880", time_resolution_ns=3.0)
    stream = simulate(scanner, IDEAL, 2e5, NO_SKEW, 6)
    order = np.argsort(stream.decay, kind="stable")
    pairs = stream.time_ns[order].reshape(-1, 2)
    gap = np.diff(pairs, axis=1).ravel()
    # In the order of time, signs are lost; the root mean square is not.
    assert math.sqrt((gap**2).mean()) * 2.3548 == pytest.approx(3.0, rel=0.03)


def test_energies_and_window():
    stream = simulate(SCANNER, Acquisition(activity_bq=1e8), 1e6, NO_SKEW, 7)
    assert stream.energy_kev.min() >= 400 and stream.energy_kev.max() <= 600
    whole = stream.energy_kev[~stream.scattered]
    assert np.median(whole) == pytest.approx(511, abs=4)


def test_skew_is_taken_off_recorded_times():
    skew = np.arange(2880) % 20
    one, two = (simulate(SCANNER, IDEAL, 1e5, delays, 8) for delays in (NO_SKEW, skew))
    order = np.argsort(two.time_ns + skew[two.crystal], kind="stable")
    assert np.allclose((two.time_ns + skew[two.crystal])[order], one.time_ns) and (np.diff(two.time_ns) >= 0).all()


def test_same_seed_same_hits():
    one, two, other = (simulate(SCANNER, Acquisition(), 1e5, NO_SKEW, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    assert not np.array_equal(one.time_ns, other.time_ns)


@pytest.mark.parametrize("overlap", [0, 30, 60])
def test_cuts_lose_no_pair_silently(overlap):
    stream = simulate(SCANNER, Acquisition(activity_bq=5e8), 2e5, NO_SKEW, 9)
    hits, lost = cut(stream, SCANNER, 100, overlap)
    hits.check()
    end = (hits.num_samples - 1) * (100 - overlap) + 100
    within = (stream.time_ns >= 0) & (stream.time_ns < end)
    pairs = (np.bincount(stream.decay[within & (stream.decay >= 0)]) == 2).sum()
    together = len(np.unique(hits.decay[true_pairs(hits).first]))
    assert together + lost == pairs and (lost > 0) == (overlap == 0)
    absolute = hits.sample * (100 - overlap) + hits.step
    for k in (0, len(hits) // 2, len(hits) - 1):
        assert np.abs(np.floor(stream.time_ns) - absolute[k]).min() == 0


def test_a_hit_is_in_every_sample_that_covers_it():
    time = np.array([25.0, 75.0])
    stream = Stream(time, np.array([3, 4]), np.ones(2), np.array([0, 1]), time, np.zeros(2, bool), 2, 200.0)
    hits, _ = cut(stream, make_scanner("toy24"), 100, 50)
    assert list(zip(hits.sample.tolist(), hits.step.tolist(), strict=True)) == [(0, 25), (0, 75), (1, 25)]
    assert isinstance(hits, Hits)


@pytest.mark.parametrize("shape", ["cylinder", "line", "derenzo", "hot_spheres"])
def test_sources_are_where_they_should_be(shape):
    source = Source(shape, radius_mm=20.0, half_height_mm=10.0, centre_mm=(1.0, 2.0, 3.0))
    points = source.sample(20_000, np.random.default_rng(0)) - [1, 2, 3]
    r = np.hypot(points[:, 0], points[:, 1])
    assert r.max() <= 20 and np.abs(points[:, 2]).max() <= 10
    if shape == "cylinder":
        assert (r < 10).mean() == pytest.approx(0.25, abs=0.02)
    if shape == "derenzo":
        rods = source.derenzo_rods()
        assert len(rods) > 40
        apart = np.hypot(points[:, None, 0] - rods[:, 0], points[:, None, 1] - rods[:, 1])
        assert (apart <= rods[:, 2] + 1e-9).any(1).all()


def test_voxels():
    activity = np.zeros((3, 4, 5))
    activity[2, 0, 4] = 2.0
    points = Source("voxels", voxels=activity, voxel_mm=2.0).sample(500, np.random.default_rng(0))
    assert (points >= [1, -4, 3]).all() and (points <= [3, -2, 5]).all()


def test_crystal_scatter_saves_events_and_moves_some():
    acquisition = Acquisition(activity_bq=1e8, crystal_scatter=0.5)
    without, with_it = (
        simulate(SCANNER, replace(acquisition, crystal_scatter=share), 1e6, NO_SKEW, 3) for share in (0.0, 0.5)
    )
    assert len(with_it.time_ns) > 1.5 * len(without.time_ns)  # sums of both deposits are inside of the window


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"activity_bq": 0.0}, "activity_bq"),
        ({"max_scatters": -1}, "max_scatters"),
        ({"dead_time": "some"}, "dead_time"),
        ({"half_life_s": 0.0}, "half_life_s"),
        ({"crystal_scatter": 2.0}, "crystal_scatter"),
    ],
)
def test_wrong_values(changes, words):
    with pytest.raises(ValueError, match=words):
        Acquisition(**changes)


def test_wrong_sources():
    with pytest.raises(ValueError, match="choose cylinder"):
        Source("nope")
    with pytest.raises(ValueError, match="voxels"):
        Source("voxels")
    with pytest.raises(ValueError, match="duration_ns"):
        simulate(SCANNER, IDEAL, 0.0, NO_SKEW, 0)
    stream = simulate(SCANNER, IDEAL, 1e4, NO_SKEW, 0)
    with pytest.raises(ValueError, match="overlap=100"):
        cut(stream, SCANNER, 100, 100)
