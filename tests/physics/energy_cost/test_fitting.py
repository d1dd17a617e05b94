from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.stats import t as student

from physics.energy_cost import Configuration, Record, fit_cost, fit_proportional, gradient_updates, leave_one_out
from physics.energy_cost.analysis import analyse, check_sources
from physics.energy_cost.configuration import distinct, mean_over_seeds
from physics.energy_cost.fitting import bootstrap, column

TRUE = {"node": 0.2, "device": 0.07, "samples": 0.5, "updates": 2.0}


def record(
    devices: int, batch: int, samples: int = 40_000, noise: float = 0.0, growth: float = 0.15, **changes
) -> Record:
    """A run whose energy is that of `TRUE`; its time has a cost per step, and grows with every doubling of devices."""
    updates = gradient_updates(samples, devices, batch, 10)
    hours = (0.002 * samples * 10 + 0.01 * devices * updates) / 3600 * (1 + growth * math.log2(devices))
    nodes = math.ceil(devices / 4)
    energy = TRUE["node"] * nodes * hours / devices + TRUE["device"] * hours
    energy += (TRUE["samples"] * samples * 10 + TRUE["updates"] * devices * updates) / 3.6e6
    fields = {
        "series": f"LBS {batch}",
        "devices": devices,
        "nodes": nodes,
        "local_batch_size": batch,
        "num_samples": samples,
        "epochs": 10,
        "samples": samples * 10,
        "updates": updates,
        "energy_kwh": energy * (1 + noise),
        "device_hours": hours,
    }
    return Record(**fields | changes)


GRID = [record(n, b) for n in (1, 2, 4, 8, 16) for b in (16, 64, 256)]


def test_coefficients_that_were_put_in_are_found():
    fit = fit_cost(GRID)
    assert dict(zip(fit.terms, fit.coefficients, strict=True)) == pytest.approx(TRUE, rel=1e-9)
    assert fit.max_error < 1e-9
    assert not fit.warnings
    assert max(map(abs, leave_one_out(GRID))) < 1e-9


def test_the_weighted_fit_is_the_least_squares_of_relative_errors():
    """Against numpy, where no coefficient is at its bound."""
    generator = np.random.default_rng(0)
    noisy = [record(r.devices, r.local_batch_size, noise=0.02 * generator.standard_normal()) for r in GRID]
    rows = np.array([[r.node_hours, r.device_hours, r.samples / 3.6e6, r.device_updates / 3.6e6] for r in noisy])
    energy = np.array([r.energy_kwh for r in noisy])
    expected = np.linalg.lstsq(rows / energy[:, None], np.ones(len(noisy)), rcond=None)[0]
    assert (expected > 0).all()
    assert fit_cost(noisy).coefficients == pytest.approx(expected, rel=1e-6)


def test_no_cost_is_negative():
    cheaper = [dataclasses.replace(r, energy_kwh=0.07 * r.device_hours) for r in GRID]
    assert min(fit_cost(cheaper).coefficients) == 0


def test_full_nodes_do_not_tell_nodes_from_devices():
    full = [r for r in GRID if r.devices >= 4]
    fit = fit_cost(full)
    assert fit.terms == ("node+device", "samples", "updates")
    assert fit.coefficients[0] == pytest.approx(TRUE["device"] + TRUE["node"] / 4)
    assert "4 devices per node" in fit.warnings[0]
    assert fit.condition > 1e12
    other = record(32, 128)
    assert fit.predict(other) == pytest.approx(other.energy_kwh)
    with pytest.raises(ValueError, match="partly filled node"):
        fit.predict(record(2, 64))


def test_one_batch_size_does_not_tell_samples_from_updates():
    one = [r for r in GRID if r.local_batch_size == 64]
    fit = fit_cost(one)
    assert "samples+updates" in fit.terms
    assert "e_s and e_u cannot be told apart" in " ".join(fit.warnings)
    with pytest.raises(ValueError, match="add runs at another local batch size"):
        fit.predict(record(2, 16))
    other = record(32, 64)
    assert fit.predict(other) == pytest.approx(other.energy_kwh, rel=1e-3)


def test_other_collinear_runs_predict_their_like_only():
    """Runs of one device have M = H: node and device merge; with a size of its own for each there is nothing else."""
    alone = [record(1, 16, samples) for samples in (10_000, 20_000, 40_000, 80_000)]
    fit = fit_cost(alone)
    assert fit.warnings
    with pytest.raises(ValueError, match=r"apart|unknown"):
        fit.predict(record(8, 256))
    assert fit.predict(record(1, 16, 30_000)) == pytest.approx(record(1, 16, 30_000).energy_kwh, rel=1e-3)


def test_a_direction_that_the_runs_lack_is_refused_by_itself():
    """At one global batch on one and two devices no column is another's multiple, and four are two all the same."""
    fit = fit_cost([record(1, 32, s, growth=0.0) for s in (10_000, 20_000)]
                   + [record(2, 16, s, growth=0.0) for s in (10_000, 20_000)])  # fmt: skip
    assert fit.devices_per_node is None and fit.local_batch_size is None and fit.unidentified
    like_them = record(2, 16, 30_000, growth=0.0)
    assert fit.predict(like_them) == pytest.approx(like_them.energy_kwh, rel=1e-3)
    with pytest.raises(ValueError, match=r"cannot tell .* apart, .* \(2 devices, 256 samples each\)"):
        fit.predict(record(2, 256, growth=0.0))


def fit_of_repetitions(generator: np.random.Generator, noise: float, count: int, seed: int = 0):
    """Of `GRID`, each configuration run ``count`` times."""
    runs = [
        record(r.devices, r.local_batch_size, noise=noise * generator.standard_normal(), seed=repetition)
        for r in GRID
        for repetition in range(count)
    ]
    means = mean_over_seeds(runs)
    groups = [[r for r in runs if r.key == mean.key] for mean in means]
    return fit_cost(means, draws=bootstrap(groups, 200, seed=seed))


def test_intervals_cover_what_was_put_in():
    fit = fit_of_repetitions(np.random.default_rng(1), 0.01, 5)
    for term, (low, high) in zip(fit.terms, fit.intervals, strict=True):
        assert low < TRUE[term] < high
        assert high - low < TRUE[term]


def test_intervals_without_repetitions_come_from_the_residuals():
    """Of ordinary least squares: statsmodels' formula, written out; and they cover as often as they say."""
    generator, covered = np.random.default_rng(3), []
    for _ in range(200):
        runs = [record(r.devices, r.local_batch_size, noise=0.002 * generator.standard_normal()) for r in GRID]
        fit = fit_cost(runs)
        covered += [low <= TRUE[term] <= high for term, (low, high) in zip(fit.terms, fit.intervals, strict=True)]
    assert 0.92 <= np.mean(covered) < 1.0
    matrix = np.array([[column(term, run) for term in fit.terms] for run in runs])
    matrix /= np.array([run.energy_kwh for run in runs])[:, None]
    freedom = len(runs) - len(fit.terms)
    variance = np.linalg.inv(matrix.T @ matrix) * np.square(fit.errors).sum() / freedom
    for i, (low, high) in enumerate(fit.intervals):
        width = student.ppf(0.975, freedom) * math.sqrt(variance[i, i])
        assert (high - low) / 2 == pytest.approx(width, rel=1e-6)
    assert fit_cost([GRID[i] for i in (0, 2, 4, 8)]).intervals[0][1] == math.inf  # nothing was tested


def test_intervals_of_two_repetitions_cover_as_often_as_they_say():
    """Of 400 intervals of 95 %; 0.7 to 0.85 cover if two repetitions are taken for their own distribution."""
    generator = np.random.default_rng(2)
    covered = []
    for trial in range(100):
        fit = fit_of_repetitions(generator, 0.002, 2, trial)
        covered += [low < TRUE[term] < high for term, (low, high) in zip(fit.terms, fit.intervals, strict=True)]
    assert 0.91 <= np.mean(covered) < 1.0


def test_means_over_repetitions_are_of_the_population():
    runs = [record(2, 16, noise=noise, seed=seed) for seed, noise in enumerate((-0.01, 0.0, 0.04))]
    (mean,) = mean_over_seeds(runs)
    energies = np.array([r.energy_kwh for r in runs])
    assert mean.energy_kwh == pytest.approx(energies.mean())
    assert mean.energy_rms_kwh == pytest.approx(energies.std())
    assert mean.repetitions == 3
    assert mean.seed is None


def test_through_the_origin():
    found = fit_proportional([record(4, 64), record(8, 64)])
    pairs = [(r.device_hours, r.energy_kwh) for r in (record(4, 64), record(8, 64))]
    kappa = sum(h * e for h, e in pairs) / sum(h * h for h, _ in pairs)
    assert found.kappa_kw == pytest.approx(kappa)
    assert found.errors == pytest.approx([kappa * h / e - 1 for h, e in pairs])
    residuals = [kappa * h - e for h, e in pairs]
    width = student.ppf(0.975, 1) * math.sqrt(sum(r * r for r in residuals) / sum(h * h for h, _ in pairs))
    assert (found.low, found.high) == pytest.approx((max(0, kappa - width), kappa + width))
    assert (fit_proportional([record(4, 64)]).low, fit_proportional([record(4, 64)]).high) == (0.0, math.inf)


def test_refusals():
    with pytest.raises(ValueError, match="3 configurations for 4 costs"):
        fit_cost(GRID[:3])
    with pytest.raises(ValueError, match="fit each by itself"):
        fit_cost([*GRID, record(1, 8, hardware="H100")])
    with pytest.raises(ValueError, match=r"terms=\['watts'\]"):
        fit_cost(GRID, ("watts",))
    with pytest.raises(ValueError, match="energy_kwh=0"):
        record(1, 16, energy_kwh=0.0)
    mixed = [record(1, 16, name="a", estimated=1.0), record(2, 16, name="b"), record(4, 16, name="c")]
    with pytest.raises(ValueError, match="estimated: a"):
        check_sources(mixed)
    check_sources(mixed, allow_mixed=True)
    found = analyse([record(2, 16), record(2, 64)])
    assert "two numbers of devices" in found["refused"]["scaling"]
    assert len(found["rows"]) == 2


def test_updates_and_nodes_of_a_plan():
    plan = Configuration(3, 10, 100, 2)
    assert (plan.updates, plan.nodes, plan.global_batch_size, plan.samples) == (2 * math.ceil(33 / 10), 1, 30, 200)
    assert Configuration(5, 10, 100, 2).nodes == 2
    with pytest.raises(ValueError, match="devices=0"):
        Configuration(0, 1, 1, 1)
    with pytest.raises(ValueError, match="no sample"):
        Configuration(8, 1, 4, 1)


def test_a_shared_run_counts_once():
    runs = [record(2, 16), record(2, 16, series="GBS 32"), record(4, 16)]
    assert len(distinct(runs)) == 2
