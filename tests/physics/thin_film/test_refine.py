"""Refinement: what it recovers, what it keeps, what it drops. How often it succeeds: the acceptance test."""

from __future__ import annotations

import pytest
import torch

from physics.thin_film.generator import SPACES, StackGenerator
from physics.thin_film.refine import Refiner, tidy
from physics.thin_film.surroundings import Surroundings
from physics.thin_film.targets import make_target, weighted_mae
from tests.physics.thin_film.stacks import catalog

SPACE = SPACES["dielectric6"]
WAVELENGTHS = SPACE.wavelengths()
INDEX = catalog().indices(SPACE.materials, WAVELENGTHS)
GLASS = Surroundings(exit=1.5)


def refiner(**options) -> Refiner:
    return Refiner(INDEX, WAVELENGTHS, GLASS, **options)


def problem(number=20, min_layers=1):
    """Materials, thicknesses of the target, the target, and thicknesses that are some per cent off."""
    vocabulary = SPACE.vocabulary()
    material, thickness = vocabulary.layers(StackGenerator(vocabulary, 6, min_layers, seed=5).tokens(range(number)))
    generator = torch.Generator().manual_seed(1)
    off = thickness * (1 + 0.06 * (2 * torch.rand(thickness.shape, generator=generator, dtype=torch.float64) - 1))
    return material, thickness, refiner().simulate(material, thickness), off


@pytest.mark.parametrize("method", ["adam", "levenberg_marquardt", "lbfgs"])
def test_thicknesses_are_recovered(method):
    material, thickness, target, off = problem(number=10)
    found = refiner(method=method)(material, off, target)
    assert (found.mae < 1e-4).double().mean() >= 0.9
    assert (found.mae <= found.start_mae).all()
    good = found.mae < 1e-6
    assert good.any() and (found.thickness_nm[good] - thickness[good]).abs().max() < 0.05
    assert torch.equal(found.material[good], material[good])


def test_polishing_reaches_the_precision_of_the_machine():
    material, _, target, off = problem(number=10)
    raw, polished = (refiner(polish_steps=n)(material, off, target) for n in (0, 10))
    assert raw.mae.median() > 1e-8 > 1e-14 > polished.mae.median()


def test_single_precision():
    material, _, target, off = problem(number=8)
    single = Refiner(INDEX.to(torch.complex64), WAVELENGTHS, GLASS, polish_steps=5)
    found = single(material, off, target)
    assert found.thickness_nm.dtype == torch.float32 and (found.mae < 1e-3).double().mean() >= 0.8


def test_results_are_what_they_say():
    material, _, target, off = problem()
    found = refiner(steps=20)(material, off, target)
    again = refiner().simulate(found.material, found.thickness_nm)
    torch.testing.assert_close(found.spectrum, again, rtol=0, atol=1e-13)
    torch.testing.assert_close(found.mae, weighted_mae(again, target), rtol=0, atol=1e-13)
    torch.testing.assert_close(found.start_mae, weighted_mae(refiner().simulate(material, off), target))


def test_candidates_do_not_depend_on_their_company(monkeypatch):
    material, _, target, off = problem()
    together = refiner(steps=10)(material, off, target)
    alone = refiner(steps=10)(material[7:8], off[7:8], target[7:8])
    torch.testing.assert_close(alone.thickness_nm[0], together.thickness_nm[7], rtol=1e-9, atol=1e-9)
    monkeypatch.setattr("physics.thin_film.transfer_matrix.CHUNK_ELEMENTS", 200)
    parts = refiner(steps=10)(material, off, target)
    torch.testing.assert_close(parts.thickness_nm, together.thickness_nm, rtol=1e-9, atol=1e-9)
    assert torch.equal(parts.material, together.material)


@pytest.mark.parametrize("method", ["adam", "levenberg_marquardt", "lbfgs"])
def test_bounds_hold(method):
    material, _, target, off = problem()
    found = refiner(method=method, steps=30, bounds_nm=(35.0, 120.0), polish_steps=3)(material, off, target)
    inside = found.thickness_nm[found.material >= 0]
    assert inside.min() >= 35 and inside.max() <= 120


def test_the_grid():
    material, _, target, off = problem(number=10)
    found = refiner(grid_nm=20.0, bounds_nm=(20.0, 200.0))(material, off, target)
    steps = found.thickness_nm / 20
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    assert (found.mae < 1e-12).double().mean() > 0.9  # the targets are on the grid
    # Where the continuous optimum is on no grid, single steps help beyond rounding.
    target = make_target("ar_coating", WAVELENGTHS)
    rounded = refiner(bounds_nm=(0.0, 300.0))(material, off, target.spectrum, target.weight)
    nearest = (rounded.thickness_nm / 10).round() * 10
    plain = weighted_mae(refiner().simulate(rounded.material, nearest), target.spectrum, target.weight)
    moved = refiner(bounds_nm=(0.0, 300.0), grid_nm=10.0)(material, off, target.spectrum, target.weight)
    assert (moved.mae <= plain + 1e-9).all() and (moved.mae < plain - 1e-4).any()


def test_thin_layers_are_dropped_and_neighbours_merged():
    material = torch.tensor([[0, 1, 0, 2, -1], [3, -1, 3, 3, 1], [-1, -1, -1, -1, -1]])
    thickness = torch.tensor([[50, 0.4, 30, 20, 9], [10, 7, 5, 1, 2], [1, 1, 1, 1, 1]], dtype=torch.float64)
    kind, size = tidy(material, thickness, drop_below_nm=1.0)
    assert kind.tolist() == [[0, 2, -1, -1, -1], [3, 1, -1, -1, -1], [-1] * 5]
    assert size.tolist() == [[80, 20, 0, 0, 0], [16, 2, 0, 0, 0], [0] * 5]
    assert tidy(material, thickness)[0][0].tolist() == [0, 1, 0, 2, -1]


def test_a_superfluous_layer_disappears():
    """A layer that is best away goes to its bound, is dropped, and its neighbours become one."""
    vocabulary = SPACE.vocabulary()
    names = {name: i for i, name in enumerate(vocabulary.materials)}
    silica, titania = names["SiO2"], names["TiO2"]
    wanted = refiner().simulate(torch.tensor([[silica]]), torch.tensor([[150.0]]))
    found = refiner(steps=300)(torch.tensor([[silica, titania, silica]]), torch.tensor([[70.0, 4.0, 70.0]]), wanted)
    assert found.material.tolist() == [[silica, -1, -1]]
    assert found.thickness_nm[0, 0] == pytest.approx(150, abs=0.5) and found.mae < 1e-3


def test_weights_say_what_counts():
    """One layer of magnesium fluoride on glass: a quarter of the mean wavelength of what is asked for."""
    material = torch.tensor([[SPACE.materials.index("MgF2")]])
    visible = make_target("ar_coating", WAVELENGTHS)
    infrared = make_target("ar_coating", WAVELENGTHS, band_nm=(900, 1300))
    for target, quarter in ((visible, 540 / 4 / 1.38), (infrared, 1080 / 4 / 1.37)):
        for method in ("adam", "levenberg_marquardt", "lbfgs"):
            found = refiner(method=method)(material, torch.tensor([[140.0]]), target.spectrum, target.weight)
            assert found.thickness_nm[0, 0] == pytest.approx(quarter, rel=0.06)
            assert found.mae < 0.013 and found.mae < found.start_mae


def test_robustness():
    material, thickness, target, _ = problem()
    exact = refiner().robustness(material, thickness, target, relative=0.0, draws=3)
    assert exact.shape == (20, 3) and exact.max() < 1e-13
    little, much = (refiner().robustness(material, thickness, target, relative=r, draws=50) for r in (0.01, 0.05))
    assert (little.mean(1) < much.mean(1)).all() and little.mean() > 1e-4
    assert torch.equal(little[4:5], refiner().robustness(material[4:5], thickness[4:5], target[4:5], draws=50))
    weight = torch.zeros(3, len(WAVELENGTHS))
    weight[0, :5] = 1
    assert refiner().robustness(material, thickness, target, weight, draws=4).shape == (20, 4)


def test_a_failed_simulation_is_infinitely_wrong():
    broken = INDEX.clone()
    broken[0] = torch.nan
    material, thickness = torch.tensor([[0, 1], [1, 2]]), torch.full((2, 2), 50.0, dtype=torch.float64)
    target = torch.full((3, len(WAVELENGTHS)), 1 / 3, dtype=torch.float64)
    for method in ("adam", "levenberg_marquardt"):
        found = Refiner(broken, WAVELENGTHS, GLASS, method=method, steps=5)(material, thickness, target)
        assert found.mae[0] == torch.inf and found.start_mae[0] == torch.inf
        assert found.mae[1] < found.start_mae[1] < torch.inf


def test_empty_stacks_and_no_candidates():
    target = torch.zeros(3, len(WAVELENGTHS), dtype=torch.float64)
    nothing = refiner()(torch.full((2, 3), -1), torch.zeros(2, 3), target)
    assert nothing.material.tolist() == [[-1] * 3] * 2 and (nothing.spectrum[:, 0] - 0.04).abs().max() < 1e-15
    assert refiner()(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), target).mae.shape == (0,)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "newton"}, r"refine\.method='newton'"),
        ({"steps": -1}, r"refine\.steps=-1"),
        ({"polish_steps": -1}, r"refine\.polish_steps=-1"),
        ({"lr_nm": 0}, r"refine\.lr_nm=0"),
        ({"bounds_nm": (5, 5)}, r"refine\.bounds_nm=\[5, 5\]"),
        ({"grid_nm": 0}, r"refine\.grid_nm=0"),
        ({"drop_below_nm": -1}, r"refine\.drop_below_nm=-1"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        refiner(**options)


def test_wrong_candidates():
    target = torch.zeros(3, len(WAVELENGTHS))
    with pytest.raises(ValueError, match=r"both must be \(N, L\)"):
        refiner()(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 2), target)
    with pytest.raises(ValueError, match="rows must be from -1"):
        refiner()(torch.full((2, 3), 5), torch.ones(2, 3), target)
