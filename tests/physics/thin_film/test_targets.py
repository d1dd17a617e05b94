"""Targets made by hand, and the variants of section 2.5."""

from __future__ import annotations

import pytest
import torch

from physics.thin_film.robustness import FILLINGS, add_noise, fill, restore_sum, smooth, variants
from physics.thin_film.targets import TARGETS, make_target, weighted_mae

WAVELENGTHS = torch.arange(300.0, 2001.0, 10.0, dtype=torch.float64)
R, A, T = 0, 1, 2


def at(nm: float) -> int:
    return round((nm - 300) / 10)


def random_spectrum(seed=0, points=171):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(3, points, generator=generator, dtype=torch.float64).softmax(0), generator


@pytest.mark.parametrize("name", list(TARGETS))
@pytest.mark.parametrize("grid", [WAVELENGTHS, WAVELENGTHS[::3]])
def test_targets_are_spectra(name, grid):
    target = make_target(name, grid)
    assert target.name == name and target.spectrum.shape == target.weight.shape == (3, len(grid))
    assert (target.spectrum >= 0).all() and (target.spectrum <= 1).all()
    torch.testing.assert_close(target.spectrum.sum(0), torch.ones(len(grid), dtype=torch.float64))
    assert (target.weight >= 0).all() and (target.weight > 0).any()


def test_bands():
    band = make_target("bandpass", WAVELENGTHS, centre_nm=600, width_nm=100).spectrum
    assert band[T, at(600)] > 0.98 and band[T, at(550)] == 0.5 and band[R, at(800)] > 0.999
    both = make_target("double_bandpass", WAVELENGTHS, centres_nm=[500, 900], width_nm=80).spectrum
    assert both[T, at(500)] > 0.95 and both[T, at(900)] > 0.95 and both[T, at(700)] < 1e-3
    stop = make_target("bandstop", WAVELENGTHS, centre_nm=600, width_nm=100).spectrum
    torch.testing.assert_close(stop[R], band[T])
    narrow = make_target("narrow_bandpass", WAVELENGTHS).spectrum
    assert narrow[T].sum() < band[T].sum() / 2


def test_peaks_and_levels():
    for channel, other in (("R", T), ("A", R), ("T", R)):
        peak = make_target("gaussian_peak", WAVELENGTHS, channel=channel, height=0.8, centre_nm=700).spectrum
        row = "RAT".index(channel)
        assert peak[row].argmax() == at(700) and peak[row].max() == pytest.approx(0.8)
        torch.testing.assert_close(peak[other], 1 - peak[row])
    assert (make_target("flat_absorber", WAVELENGTHS, level=0.3).spectrum[A] - 0.3).abs().max() < 1e-15
    assert (make_target("perfect_absorber", WAVELENGTHS).spectrum[A] == 1).all()
    assert (make_target("flat_reflector", WAVELENGTHS, level=0.3).spectrum[R] == 0.3).all()
    blue = make_target("morpho", WAVELENGTHS).spectrum
    assert blue[R].argmax() == at(460) and blue[R, at(700)] < 0.05 and blue[A, at(700)] > 0.9


def test_what_is_left_open_has_no_weight():
    coating = make_target("ar_coating", WAVELENGTHS)
    assert coating.weight[:, at(400) : at(700) + 1].all() and coating.weight.sum() == 3 * 31
    assert (coating.spectrum[T] == 1).all()
    mirror = make_target("dbr", WAVELENGTHS)
    assert (WAVELENGTHS[mirror.weight[R] > 0] - 550).abs().max() <= 25
    infrared = make_target("nir_reflector", WAVELENGTHS, edge_nm=900)
    assert infrared.weight[R, at(890)] == 0 and infrared.weight[R, at(900)] == 1 and infrared.spectrum[R, at(900)] == 1
    window = make_target("vis_transmit_nir_reflect", WAVELENGTHS)
    assert window.spectrum[T, at(550)] == 1 and window.spectrum[R, at(1000)] == 1
    assert window.weight[T, at(750)] == 0 and window.weight[T, at(350)] == 0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("rainbow", {}, "target='rainbow' is unknown; choose one of bandpass, "),
        ("bandpass", {"center_nm": 5}, "has no option 'center_nm'; it has centre_nm, width_nm, edge_nm"),
        ("bandpass", {"centre_nm": 5000}, "centre_nm=5000: must be between 300 and 2000 nm"),
        ("bandpass", {"width_nm": 0}, "width_nm=0"),
        ("dbr", {"centre_nm": 5000}, "asks for nothing between 300 and 2000 nm"),
        ("flat_absorber", {"level": 1.5}, r"level=1\.5"),
        ("gaussian_peak", {"channel": "X"}, "channel='X'"),
        ("morpho", {"height": 1.0}, r"height \+ floor"),
    ],
)
def test_mistakes(name, options, message):
    with pytest.raises(ValueError, match=message):
        make_target(name, WAVELENGTHS, **options)


def test_weighted_mae():
    one, _ = random_spectrum(0)
    other, _ = random_spectrum(1)
    torch.testing.assert_close(weighted_mae(one, other), (one - other).abs().mean())
    weight = torch.zeros(3, 171)
    weight[R, :10], weight[T, 3] = 2.0, 1.0
    expected = (2 * (one - other)[R, :10].abs().sum() + (one - other)[T, 3].abs()) / 21
    torch.testing.assert_close(weighted_mae(one, other, weight), expected)
    batch = torch.stack([one, other])
    torch.testing.assert_close(weighted_mae(batch, one, weight)[1], expected)
    assert weighted_mae(batch, one, torch.zeros(3, 171)).tolist() == [0, 0]


# --------------------------------------------------------------------------------------------------------- robustness


def test_noise_has_the_deviation_that_was_asked_for():
    spectrum = torch.full((200, 3, 171), 0.5, dtype=torch.float64)
    noise = add_noise(spectrum, torch.Generator().manual_seed(0), absolute=0.01, relative=0.1, channels=(1, 0, 2))
    noise = noise - spectrum
    assert noise[:, R].std() == pytest.approx(0.06, rel=0.02) and noise[:, T].std() == pytest.approx(0.12, rel=0.02)
    assert (noise[:, A] == 0).all() and abs(noise.mean()) < 1e-3


def test_smoothing():
    spectrum, _ = random_spectrum()
    assert torch.equal(smooth(spectrum, window=1), spectrum)
    level = torch.full((3, 171), 0.3, dtype=torch.float64)
    torch.testing.assert_close(smooth(level), level, rtol=0, atol=1e-15)
    impulse = torch.zeros(1, 171, dtype=torch.float64)
    impulse[0, 80] = 1
    boxcar = smooth(impulse, window=5, kind="boxcar")
    torch.testing.assert_close(boxcar[0, 78:83], torch.full((5,), 0.2, dtype=torch.float64))
    gaussian = smooth(impulse, window=25, sigma=1.5)[0]
    assert gaussian[79] / gaussian[80] == pytest.approx(torch.exp(torch.tensor(-0.5 / 1.5**2)).item(), rel=1e-6)
    torch.testing.assert_close(smooth(spectrum).sum(0), torch.ones(171, dtype=torch.float64))  # linear
    assert smooth(spectrum[:, :7], window=25).shape == (3, 7)  # wider than the spectrum


@pytest.mark.parametrize("mode", FILLINGS)
def test_filling_touches_what_is_open_only(mode):
    spectrum, generator = random_spectrum()
    weight = torch.zeros(3, 171)
    weight[:, 50:100] = 1
    filled = fill(spectrum, weight, generator, mode)
    assert torch.equal(filled[:, 50:100], spectrum[:, 50:100])
    assert (filled[:, :50] != spectrum[:, :50]).double().mean() > 0.9
    assert (filled >= 0).all() and (filled <= 1).all()
    assert torch.equal(fill(spectrum, weight, generator, mode, strength=0.0), spectrum)


def test_kinds_of_filling():
    zero, weight = torch.zeros(3, 171, dtype=torch.float64), torch.zeros(3, 171)
    generator = torch.Generator().manual_seed(1)
    flat = fill(zero, weight, generator, "flat_random", strength=1.0)
    assert (flat.std(1) < 1e-12).all() and (flat[:, 0].unique().numel() == 3)
    tilted = fill(zero, weight, generator, "tilted_random", strength=1.0)
    assert tilted.diff(n=2).abs().max() < 1e-12 and tilted.diff().abs().max() > 1e-4
    smooth_ = fill(zero, weight, generator, "smooth_random", strength=1.0, kernel=50)
    assert smooth_.amin() == 0 and smooth_.amax() == 1
    assert smooth_.diff().abs().max() < 0.3
    half = torch.full((3, 171), 0.5, dtype=torch.float64)
    prior = fill(half, weight, generator, "prior_plus_noise", strength=0.1)
    assert (prior - half).abs().max() == pytest.approx(0.1, abs=1e-9)


@pytest.mark.parametrize("priority", ["R>T>A", "A>R>T", "T>A>R"])
def test_the_sum_is_restored_by_priority(priority):
    generator = torch.Generator().manual_seed(0)
    spectrum = 3 * torch.rand(50, 3, 171, generator=generator, dtype=torch.float64) - 1
    restored = restore_sum(spectrum, priority)
    assert (restored >= 0).all() and (restored <= 1).all()
    torch.testing.assert_close(restored.sum(1), torch.ones(50, 171, dtype=torch.float64), rtol=0, atol=1e-14)
    # The first channel takes all of it where it can; only where it is at a bound do others change.
    order = ["RAT".index(c) for c in priority.split(">")]
    clamped = spectrum.clamp(0, 1)
    inside = (restored[:, order[0]] > 0) & (restored[:, order[0]] < 1)
    for channel in order[1:]:
        assert torch.equal(restored[:, channel][inside], clamped[:, channel][inside])
    valid, _ = random_spectrum()
    torch.testing.assert_close(restore_sum(valid, priority), valid, rtol=0, atol=1e-15)


def test_variants():
    target = make_target("dbr", WAVELENGTHS)
    made = variants(target.spectrum, target.weight, 6, seed=3, mode="smooth_random")
    assert made.shape == (6, 3, 171) and torch.equal(made[0], target.spectrum)
    torch.testing.assert_close(made.sum(1), torch.ones(6, 171, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(made[:3], variants(target.spectrum, target.weight, 3, seed=3, mode="smooth_random"))
    assert not torch.equal(made[1], made[2])
    assert not torch.equal(made[1], variants(target.spectrum, target.weight, 2, seed=4, mode="smooth_random")[1])
    assert (made[1:, :, target.weight[R] > 0] - target.spectrum[None, :, target.weight[R] > 0]).abs().max() < 0.1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, g: add_noise(s, g, absolute=-1), "must not be negative"),
        (lambda s, g: smooth(s, window=4), "window=4"),
        (lambda s, g: smooth(s, kind="median"), "kind='median'"),
        (lambda s, g: smooth(s, sigma=0), "sigma=0"),
        (lambda s, g: fill(s, s, g, mode="fancy"), "mode='fancy'"),
        (lambda s, g: fill(s, s, g, strength=2), "strength=2"),
        (lambda s, g: restore_sum(s, "R>T"), "priority='R>T'"),
    ],
)
def test_wrong_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call(*random_spectrum())
