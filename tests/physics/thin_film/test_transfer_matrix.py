"""The simulator against other algorithms, laws of optics and numerical derivatives; further closed forms are in
tests/acceptance/test_thin_film_physics.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from physics.thin_film.surroundings import Surroundings
from physics.thin_film.transfer_matrix import Media, Waves, spectrum, spectrum_and_slopes, transfer_matrix
from tests.physics.thin_film.reference import airy, matrices
from tests.physics.thin_film.stacks import WAVELENGTHS, arrays, catalog, random_stacks

F64 = torch.float64


def few(number=3, layers=4, wavelengths=5, seed=0):
    """Index (N, L, W), absorbing, and thickness (N, L)."""
    generator = torch.Generator().manual_seed(seed)
    n = 1.2 + 2 * torch.rand(number, layers, wavelengths, generator=generator, dtype=F64)
    k = 0.3 * torch.rand(number, layers, wavelengths, generator=generator, dtype=F64)
    d = 20 + 200 * torch.rand(number, layers, generator=generator, dtype=F64)
    return torch.complex(n, k), d, torch.linspace(400, 900, wavelengths, dtype=F64)


def test_products_of_characteristic_matrices():
    index, thickness, wavelength = few(wavelengths=40)
    found = transfer_matrix(index, thickness, wavelength, Surroundings(exit=1.52))
    for i in range(len(index)):
        r, t = matrices(index[i].numpy(), thickness[i].numpy(), wavelength.numpy(), 1.52)
        assert np.abs(found[i, 0].numpy() - r).max() < 1e-13
        assert np.abs(found[i, 2].numpy() - t).max() < 1e-13


@pytest.mark.parametrize("polarization", ["s", "p"])
def test_total_reflection(polarization):
    """From glass at an angle at which nothing can leave into air, through a layer in which the wave is evanescent."""
    index, thickness, wavelength = few(number=1, layers=3)
    index[0, 1] = 1.05
    glass = Surroundings(incident=1.7, angle_rad=0.9, polarization=polarization)
    found = transfer_matrix(index[0], thickness[0], wavelength, glass)
    r, t = airy(index[0].numpy(), thickness[0].numpy(), wavelength.numpy(), 1.7, 1.0, 0.9, polarization)
    assert np.abs(found[0].numpy() - r).max() < 1e-13
    assert np.abs(found[2].numpy()).max() == 0 and np.abs(t).max() < 1e-13
    clear = transfer_matrix(index[0].real + 0j, thickness[0], wavelength, glass)
    assert (clear[0] - 1).abs().max() < 1e-13  # nothing absorbs, so all comes back


@pytest.mark.parametrize("polarization", ["s", "p"])
def test_a_plate_that_light_cannot_enter(polarization):
    """All comes back but for what the layers absorb; at the rear face of a plate that it can enter, too."""
    index, thickness, wavelength = few(number=1)
    around = {"incident": 1.8, "angle_rad": 1.0, "polarization": polarization, "plate_mm": 1.0}
    outside = transfer_matrix(index, thickness.requires_grad_(), wavelength, Surroundings(plate=1.4, **around))
    (slope,) = torch.autograd.grad(outside[:, 0].sum(), thickness)
    assert outside.isfinite().all() and slope.isfinite().all()
    assert (outside[:, 2] == 0).all() and (outside[:, 1] > 0).all()
    behind = transfer_matrix(index.real + 0j, thickness.detach(), wavelength, Surroundings(plate=1.7, **around))
    assert (behind[:, 2] == 0).all() and (behind[:, 0] - 1).abs().max() < 1e-12


def test_unpolarized_light_is_the_mean():
    index, thickness, wavelength = few()
    s, p, mean = (
        transfer_matrix(index, thickness, wavelength, Surroundings(angle_rad=0.6, exit=1.5, polarization=kind))
        for kind in ("s", "p", "unpolarized")
    )
    torch.testing.assert_close(mean, (s + p) / 2, rtol=0, atol=1e-15)
    assert (s - p).abs().max() > 0.01


def test_at_normal_incidence_polarizations_are_equal():
    index, thickness, wavelength = few()
    s, p = (transfer_matrix(index, thickness, wavelength, Surroundings(polarization=kind)) for kind in "sp")
    assert torch.equal(s, p)
    almost = transfer_matrix(index, thickness, wavelength, Surroundings(angle_rad=1e-9, polarization="p"))
    torch.testing.assert_close(almost, s, rtol=0, atol=1e-13)


def test_layers_of_no_thickness_are_not_there():
    index, thickness, wavelength = few()
    some = Surroundings(exit=1.5 + 0.1j, angle_rad=0.4)
    expected = transfer_matrix(index, thickness, wavelength, some)
    wider = torch.cat([index[:, :2], 3 * index[:, :1], index[:, 2:]], dim=1)
    zeros = torch.cat([thickness[:, :2], torch.zeros(3, 1, dtype=F64), thickness[:, 2:]], dim=1)
    torch.testing.assert_close(transfer_matrix(wider, zeros, wavelength, some), expected, rtol=0, atol=1e-14)


def test_no_layers_and_no_stacks():
    _, _, wavelength = few()
    bare = transfer_matrix(torch.zeros(2, 0, 5, dtype=torch.complex128), torch.zeros(2, 0), wavelength,
                           Surroundings(exit=1.5))  # fmt: skip
    assert (bare[:, 0] - 0.04).abs().max() < 1e-15
    index, thickness, _ = few()
    assert transfer_matrix(index[:0], thickness[:0], wavelength).shape == (0, 3, 5)


def test_shapes_broadcast_and_chunks_do_not_matter(monkeypatch):
    index, thickness, wavelength = few()
    shared = transfer_matrix(index[0], thickness, wavelength)
    torch.testing.assert_close(shared, transfer_matrix(index[:1].expand(3, -1, -1), thickness, wavelength))
    grid = transfer_matrix(index[:, None], thickness[None], wavelength)
    assert grid.shape == (3, 3, 3, 5)
    torch.testing.assert_close(grid[1, 2], transfer_matrix(index[1], thickness[2], wavelength), rtol=0, atol=1e-15)
    monkeypatch.setattr("physics.thin_film.transfer_matrix.CHUNK_ELEMENTS", 5)
    torch.testing.assert_close(transfer_matrix(index[0], thickness, wavelength), shared, rtol=0, atol=0)


def test_single_precision():
    vocabulary, tokens = random_stacks(20)
    index, thickness = arrays(vocabulary, tokens)
    exact = transfer_matrix(index, thickness, WAVELENGTHS)
    single = transfer_matrix(index.to(torch.complex64), thickness, WAVELENGTHS)
    assert single.dtype == torch.float32
    assert (single - exact).abs().max() < 1e-4


@pytest.mark.parametrize("polarization", ["s", "p", "unpolarized"])
@pytest.mark.parametrize("plate", [False, True])
def test_gradients(polarization, plate):
    index, thickness, wavelength = few(2, 3, 2)
    angle = 0.5 if polarization != "s" else 0.0
    around = {"plate": 1.5 + 1e-7j, "plate_mm": 0.5} if plate else {"exit": 2.0 + 0.3j}
    some = Surroundings(incident=1.1, angle_rad=angle, polarization=polarization, **around)
    variables = index.requires_grad_(), thickness.requires_grad_()
    assert torch.autograd.gradcheck(lambda n, d: transfer_matrix(n, d, wavelength, some), variables)


def test_gradients_of_shared_layers_and_in_chunks(monkeypatch):
    monkeypatch.setattr("physics.thin_film.transfer_matrix.CHUNK_ELEMENTS", 4)
    index, thickness, wavelength = few(3, 3, 2)
    variables = index[0].clone().requires_grad_(), thickness.requires_grad_()
    assert torch.autograd.gradcheck(lambda n, d: transfer_matrix(n, d, wavelength), variables)


def test_gradients_of_what_is_behind():
    index, thickness, wavelength = few(2, 3, 2)
    exit = torch.tensor([1.5 + 0.1j, 2.0 + 0.2j], dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda n: transfer_matrix(index, thickness, wavelength, Surroundings(exit=n, angle_rad=0.3)), (exit,)
    )


def test_the_adjoint_can_be_run_again():
    index, thickness, wavelength = few()
    total = transfer_matrix(index, thickness.requires_grad_(), wavelength)[:, 0].sum()
    first, second = (torch.autograd.grad(total, thickness, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second) and first.abs().max() > 0


@pytest.mark.parametrize("angle", [0.0, 0.7])
def test_slopes_are_the_jacobian(angle):
    index, thickness, wavelength = few()
    media = Media.of(Surroundings(angle_rad=angle, exit=1.5), wavelength, index.dtype, index.device)
    waves = [Waves.of(index, media, kind) for kind in media.polarizations]
    found, slopes = spectrum_and_slopes(waves, thickness, media)
    torch.testing.assert_close(found, spectrum(waves, thickness, media), rtol=0, atol=1e-15)
    for i in range(len(index)):
        one = [Waves(*(None if part is None else part[i] for part in wave)) for wave in waves]
        expected = torch.autograd.functional.jacobian(
            lambda d, one=one: spectrum(one, d, media), thickness[i]
        )  # (3, W, L)
        torch.testing.assert_close(slopes[i], expected.permute(2, 0, 1), rtol=0, atol=1e-14)


def test_nothing_overflows_where_nothing_gets_through():
    index = catalog().index("Ge", WAVELENGTHS).expand(20, -1)
    found = transfer_matrix(index, torch.full((20,), 5000.0, dtype=F64), WAVELENGTHS)
    assert found.isfinite().all() and (found >= -1e-15).all()
    assert found[2, 0] == 0  # at 300 nm exp(-4 pi k d / wavelength) is below the smallest number
    single = transfer_matrix(index.to(torch.complex64), torch.full((20,), 5000.0), WAVELENGTHS)
    assert single.isfinite().all()


def test_brewster_angle():
    """Light polarized in the plane of incidence is not reflected at tan(angle) = n."""
    found = transfer_matrix(
        torch.zeros(0, 1, dtype=torch.complex128), torch.zeros(0), torch.tensor([500.0]),
        Surroundings(exit=1.5, angle_rad=math.atan(1.5), polarization="p"),
    )  # fmt: skip
    assert found[0].item() < 1e-30


def test_mistakes_are_named():
    index, thickness, wavelength = few()
    with pytest.raises(ValueError, match="index: must be complex"):
        transfer_matrix(index.real, thickness, wavelength)
    with pytest.raises(ValueError, match="same number of layers"):
        transfer_matrix(index, thickness[:, :2], wavelength)
    with pytest.raises(ValueError, match="wavelength_nm"):
        transfer_matrix(index, thickness, wavelength[:2])
    for wrong, message in (
        ({"polarization": "x"}, "polarization='x'"),
        ({"angle_rad": 2.0}, "angle_rad=2.0"),
        ({"incident": -1.0}, "incident"),
        ({"incident": torch.tensor([1.0 + 0.1j])}, "incident"),
        ({"plate": 1.5}, "plate_mm=0"),
        ({"plate_mm": 1.0}, "plate_mm=1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            Surroundings(**wrong)


def test_surroundings_of_configurations():
    wavelength = torch.tensor([550.0, 600.0], dtype=F64)
    assert Surroundings.parse("none", catalog(), wavelength) == Surroundings()
    assert Surroundings.parse("semi_infinite:1.52", catalog(), wavelength).exit == 1.52
    silicon = Surroundings.parse("semi_infinite:Si", catalog(), wavelength, angle_deg=60, polarization="p")
    assert torch.equal(silicon.exit, catalog().index("Si", wavelength))
    assert silicon.angle_rad == pytest.approx(math.pi / 3) and silicon.polarization == "p"
    plate = Surroundings.parse("incoherent:1.5+1e-7i:0.5", catalog(), wavelength)
    assert plate.plate == 1.5 + 1e-7j and plate.plate_mm == 0.5 and plate.exit == 1.0
    for text, message in (
        ("glass", "choose one of none"),
        ("semi_infinite", "choose one of none"),
        ("incoherent:SiO2:thick", "positive number of mm"),
        ("incoherent:SiO2:-1", "positive number of mm"),
        ("semi_infinite:-1.5", "n above 0"),
        ("semi_infinite:nan", "n above 0"),
        ("incoherent:1.5-0.1i:1", "k not below 0"),
        ("semi_infinite:Unobtainium", "unknown material 'Unobtainium'"),
    ):
        with pytest.raises(ValueError, match=message):
            Surroundings.parse(text, catalog(), wavelength)
