"""Loads over time: a step does not depend on its company, and has the statistics that it should."""

from __future__ import annotations

import numpy as np
import pytest

from physics.power_flow.profiles import (
    FRENCH_HOUR,
    Profile,
    ar1,
    injections,
    load_factor,
    solar_factor,
)

LOADS = np.array([0.0, 80.0, 20.0, 5.0]), np.array([0.0, 30.0, -4.0, 1.0])
GENERATION = np.array([60.0, 45.0])
EVERYTHING = Profile(sigma_reactive=0.02, sigma_generation=0.03, solar_share=0.5, shape="french", seed=7)


def test_a_step_is_the_same_alone_and_among_others():
    steps = np.array([2047, 3, 2048, 1_000_000, 3])
    together = injections(steps, *LOADS, GENERATION, EVERYTHING)
    for i, step in enumerate(steps):
        alone = injections([step], *LOADS, GENERATION, EVERYTHING)
        for some, one in zip(together, alone, strict=True):
            np.testing.assert_array_equal(some[i], one[0])


def test_seeds_differ():
    one, other = (injections(np.arange(5), *LOADS, GENERATION, Profile(seed=seed)) for seed in (0, 1))
    assert (one.p_load_mw[:, 1:] != other.p_load_mw[:, 1:]).all()
    assert (one.p_load_mw[:, 0] == 0).all()


@pytest.mark.parametrize("rho", [0.0, 0.9, 0.995])
def test_noise_is_an_ar1_process_of_variance_one(rho):
    z = ar1(3, 0, np.arange(30_000), 40, rho)
    assert z.var() == pytest.approx(1, abs=0.04) and abs(z.mean()) < 0.03
    assert np.mean(z[1:] * z[:-1]) == pytest.approx(rho, abs=0.02)
    # What follows an AR(1) step is white, also where blocks meet, and independent of the other processes.
    innovation = (z[1:] - rho * z[:-1]) / np.sqrt(1 - rho**2)
    assert np.abs(np.corrcoef(innovation.T) - np.eye(40)).max() < 0.03
    assert innovation[1023::1024].var() == pytest.approx(1, abs=0.15) and innovation.var() == pytest.approx(1, abs=0.02)


def test_the_sine_has_days_and_weeks():
    profile = Profile(sigma=0.0, daily=0.2, weekly=0.1)
    t = np.arange(672)
    expected = 1 + 0.2 * np.sin(2 * np.pi * t / 96) + 0.1 * np.sin(2 * np.pi * t / 672)
    np.testing.assert_allclose(load_factor(t, profile), expected, rtol=1e-13)
    found = injections(t, *LOADS, GENERATION, profile)
    np.testing.assert_allclose(found.p_load_mw, expected[:, None] * LOADS[0], rtol=1e-13)
    np.testing.assert_allclose(found.q_load_mvar, expected[:, None] * LOADS[1], rtol=1e-13)
    np.testing.assert_allclose(found.gen_p_mw, expected[:, None] * GENERATION, rtol=1e-13)


def test_the_french_profile_is_that_of_a_monday_in_october():
    profile = Profile(shape="french", steps_per_day=288)
    day = load_factor(np.arange(288), profile)
    np.testing.assert_allclose(day[::12], np.array(FRENCH_HOUR) * 1.01 * 0.94, rtol=1e-12)
    # Hours lie between 0.84 and 1.09; a spline passes them by little.
    assert day.min() > 0.83 * 0.9494 and day.max() < 1.1 * 0.9494
    tuesday, sunday = (load_factor(np.array([288 * d]), profile)[0] for d in (1, 6))
    assert tuesday / day[0] == pytest.approx(1.05 / 1.01) and sunday / day[0] == pytest.approx(0.88 / 1.01)
    january = load_factor(np.array([0]), Profile(shape="french", start="2013-01-07"))[0]
    assert january / day[0] == pytest.approx(1.21 / 0.94)


def test_generators_follow_the_load():
    found = injections(np.arange(50), *LOADS, GENERATION, Profile())
    followed = found.gen_p_mw / GENERATION
    np.testing.assert_allclose(followed, np.repeat(found.p_load_mw.sum(1, keepdims=True) / 105, 2, axis=1), rtol=1e-12)


def test_the_sun_shines_at_noon():
    profile = Profile(solar_share=1.0, solar_fraction=1.0, seed=2)
    factor = solar_factor(np.arange(96 * 20), 30, profile)
    assert factor.min() == 0 and 0.9 < factor.max() <= 1
    hour = np.arange(96 * 20) % 96 / 4
    assert (factor[(hour <= 6) | (hour >= 18)] < 1e-12).all()
    noon = factor[hour == 12]
    assert noon.std() > 0.1 and (noon >= 0.2).all()
    with_sun, without = (
        injections([48], *LOADS, GENERATION, Profile(solar_share=s, solar_fraction=1.0)) for s in (0.5, 0)
    )
    assert (with_sun.p_load_mw[0, 1:] < without.p_load_mw[0, 1:]).all()
    np.testing.assert_array_equal(with_sun.q_load_mvar, without.q_load_mvar)
    some = injections(
        np.arange(48, 49),
        np.ones(1000),
        np.ones(1000),
        GENERATION,
        Profile(sigma=0.0, solar_share=0.5, solar_fraction=0.3),
    )
    assert (some.p_load_mw < 1).mean() == pytest.approx(0.3, abs=0.05)


def test_reactive_noise_and_noise_of_generation():
    steps = np.arange(4000)
    found = injections(steps, *LOADS, GENERATION, Profile(shape="flat", sigma=0.0, sigma_reactive=0.02, rho=0.0))
    np.testing.assert_array_equal(found.p_load_mw, np.broadcast_to(LOADS[0], found.p_load_mw.shape))
    assert (found.q_load_mvar[:, 1] / 30).std() == pytest.approx(0.02, rel=0.05)
    found = injections(steps, *LOADS, GENERATION, Profile(shape="flat", sigma=0.0, sigma_generation=0.03, rho=0.0))
    assert (found.gen_p_mw / GENERATION).std(0) == pytest.approx(0.03, rel=0.05)


def test_times():
    times = Profile(steps_per_day=96).times(np.array([0, 1, 96]))
    assert [str(t) for t in times] == ["2012-10-01T00:00:00", "2012-10-01T00:15:00", "2012-10-02T00:00:00"]


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"shape": "cosine"}, "shape='cosine' is unknown; choose flat, sine, french"),
        ({"steps_per_day": 0}, "steps_per_day=0"),
        ({"rho": 1.0}, "rho=1.0: must be at least 0 and below 1"),
        ({"sigma": -1}, "sigma=-1: must not be negative"),
        ({"solar_share": float("nan")}, "solar_share=nan"),
        ({"solar_fraction": 1.5}, "solar_fraction=1.5: must be from 0 to 1"),
        ({"start": "yesterday"}, "start='yesterday' is no date"),
    ],
)
def test_mistakes(wrong, text):
    with pytest.raises(ValueError, match=text):
        Profile(**wrong)


def test_steps_are_not_negative():
    with pytest.raises(ValueError, match="step -1: steps are counted from 0"):
        injections([-1], *LOADS, GENERATION, Profile())
